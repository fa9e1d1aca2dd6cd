"""The installer: it refuses what was changed anywhere, before it writes, and installs the rest whole or not at all."""

import _ctypes
import ast
import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from bundle_files import FAKE_NORMISTRAL, write_small_artifact, write_wheel, write_wheels
from planted import AS_ROOT, KINDS, NOBODY, look, plant

import normistral
from normistral.bundle import check, install
from normistral.bundle import pack as bundling
from normistral.bundle.archive import ArchiveEntry, with_sums, write_archive
from normistral.bundle.check import InstallError, check_bundle, is_member_name, member_header
from normistral.bundle.pack import BundleOptions, make_bundle
from normistral.bundle.wheels import choose_target
from normistral.errors import UsageError

DESCRIPTION = {
    "schema": 1,
    "artifact": "liten",
    "requirement": "normistral==0.1.0",
    "python": "{}.{}".format(*sys.version_info),
    "machine": "x86_64",
    "glibc": "2.17",
    "bytes": 100,
}
LONG = "wheels/" + "lang-" * 16 + "1-py3-none-any.whl"  # more than 100 bytes


def pack(**contents):
    """A small archive; `contents` replace or add files."""
    files = {
        "install.py": b"print()",
        "bundle.json": json.dumps(DESCRIPTION).encode(),
        "sbom.cdx.json": b"{}",
        "artifact/config.json": "ærlig".encode(),
        "artifact/tom": b"",
        LONG: b"\0" * 600,
    }
    stream = io.BytesIO()
    write_archive(stream, with_sums([ArchiveEntry.of_bytes(*item) for item in (files | contents).items()]))
    return stream.getvalue()


def read(raw):
    return check._read_members(check._Reader(io.BytesIO(raw), None))


def refusal(raw, tmp_path, **trust):
    file = tmp_path / "bundle.tar"
    file.write_bytes(raw)
    with pytest.raises(InstallError) as caught:
        check_bundle(file, **trust)
    assert caught.value.hint
    return caught.value.message


# What is checked


def test_the_archive_is_one_that_standard_tools_write_and_read(tmp_path):
    raw = pack()
    (tmp_path / "bundle.tar").write_bytes(raw)
    bundle = check_bundle(tmp_path / "bundle.tar")
    with tarfile.open(tmp_path / "bundle.tar") as archive:
        assert archive.getnames() == list(bundle.members)
        assert archive.extractfile(LONG).read() == b"\0" * 600


def test_every_flipped_byte_of_a_small_archive_is_refused():
    """Without a signature: headers, padding, list and end too."""
    raw, chance = pack(), random.Random(1)
    read(raw)
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << chance.randrange(8)
        with pytest.raises(InstallError):
            read(bytes(flipped))


def test_flipped_bytes_are_refused_by_signature_and_sum(signed_bundle, tmp_path):
    raw, chance = signed_bundle.read_bytes(), random.Random(2)
    signers = signed_bundle.parent / "signers"
    shutil.copy(f"{signed_bundle}.sig", tmp_path / "bundle.tar.sig")
    whole = check_bundle(signed_bundle, signers)
    assert whole.signer == "utgiver@example.no"
    for position in [0, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(20))]:
        flipped = bytearray(raw)
        flipped[position] ^= 1 << chance.randrange(8)
        assert "is not of this file" in refusal(bytes(flipped), tmp_path, signers=signers)
        assert "has the SHA-256" in refusal(bytes(flipped), tmp_path, sha256=whole.sha256)


def test_every_flipped_byte_of_the_signature_is_refused(signed_bundle, tmp_path):
    raw = Path(f"{signed_bundle}.sig").read_bytes()
    file, chance = tmp_path / "bundle.tar.sig", random.Random(3)
    spelled, asked = 0, []
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        try:
            check._require_one_spelling(file)
        except InstallError:
            spelled += 1
        else:
            asked.append(bytes(flipped))
    assert spelled > len(raw) / 4
    for flipped in chance.sample(asked, 10):  # the others would all have to be asked of ssh-keygen
        file.write_bytes(flipped)
        assert str(file) in refusal(signed_bundle.read_bytes(), tmp_path, signers=signed_bundle.parent / "signers")


def with_member(info, content=b""):
    """The archive with one more member behind the others."""
    raw = pack()[: -len(check.END)]
    return raw + info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512) + check.END


def member(name, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("artifact/extra"),  # not in the list
        member("artifact/config.json"),
        member("artifact/../../etc/passwd"),
        member("/etc/passwd"),
        member("artifact//config"),
        member("artifact/folder/file"),
        member("artifact", tarfile.DIRTYPE),
        member("artifact/link", tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("artifact/link", tarfile.LNKTYPE, linkname="artifact/config.json"),
        member("artifact/device", tarfile.CHRTYPE),
        member("artifact/fifo", tarfile.FIFOTYPE),
        member("artifact/sparse", tarfile.GNUTYPE_SPARSE),
        member("artifact/other", mode=0o4755),
        member("artifact/other", uid=1),
        member("artifact/other", mtime=1),
        member("artifact/a\\b"),
        member("other.py"),
        member("artifact/" + "x" * 600),
    ],
    ids=lambda info: f"{info.name[:30]} {info.type.decode()}",
)
def test_a_member_that_does_not_belong_there_is_refused(info, tmp_path):
    refusal(with_member(info), tmp_path)


def test_other_forms_of_the_same_archive_are_refused(tmp_path):
    raw = pack()
    for size in range(0, len(raw), 97):
        refusal(raw[:size], tmp_path)
    refusal(raw + b"\0", tmp_path)
    refusal(raw + bytes(10240), tmp_path)
    refusal(raw + raw, tmp_path)
    for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(raw)) as old, tarfile.open(fileobj=stream, mode="w", format=format) as new:
            for info in old.getmembers():
                new.addfile(info, old.extractfile(info))
        refusal(stream.getvalue(), tmp_path)


def test_a_huge_member_costs_no_memory(tmp_path):
    head = pack()[: -len(check.END)]
    assert "ends too early" in refusal(head + member_header("artifact/big", 2**50), tmp_path)
    assert "too large" in refusal(member_header("SHA256SUMS", 2**50), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"artifact": "../other"},
        {"artifact": ""},
        {"python": "3"},
        {"glibc": "new"},
        {"schema": True},
        {"bytes": "1"},
        {"machine": None},
    ],
)
def test_a_description_that_cannot_be_is_refused(changes, tmp_path):
    assert "bundle.json" in refusal(pack(**{"bundle.json": json.dumps(DESCRIPTION | changes).encode()}), tmp_path) or (
        "name of an artifact" in refusal(pack(**{"bundle.json": json.dumps(DESCRIPTION | changes).encode()}), tmp_path)
    )
    for raw in (b"[]", b"{", b"\xff", b"[" * 100_000):
        assert "bundle.json" in refusal(pack(**{"bundle.json": raw}), tmp_path)


def test_a_newer_schema_names_the_installer_that_knows_it(tmp_path):
    raw = pack(**{"bundle.json": json.dumps(DESCRIPTION | {"schema": 2}).encode()})
    assert "schema 2" in refusal(raw, tmp_path)


def test_names_that_no_list_could_hold_are_not_written():
    for name in ("artifact/a\nb", "artifact/" + "x" * 600, "wheels/..", "elsewhere"):
        assert not is_member_name(name)
        with pytest.raises(UsageError, match="cannot hold"):
            with_sums([ArchiveEntry.of_bytes(name, b"")])


def test_only_keys_of_the_signers_file_count(signed_bundle, tmp_path):
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    public = other.with_suffix(".pub").read_text()
    (tmp_path / "signers").write_text(f"utgiver@example.no {public}")
    raw = signed_bundle.read_bytes()
    assert "bundle.tar.sig is missing" in refusal(raw, tmp_path, signers=tmp_path / "signers")
    shutil.copy(f"{signed_bundle}.sig", tmp_path / "bundle.tar.sig")
    assert "by nobody" in refusal(raw, tmp_path, signers=tmp_path / "signers")
    assert "none is missing" in refusal(raw, tmp_path, signers=tmp_path / "none")
    for_mail = ["ssh-keygen", "-Y", "sign", "-f", other, "-n", "file", tmp_path / "bundle.tar"]
    (tmp_path / "bundle.tar.sig").unlink()
    subprocess.run(for_mail, check=True, capture_output=True)
    assert "is not of this file" in refusal(raw, tmp_path, signers=tmp_path / "signers")


def test_without_ssh_keygen_another_way_is_named(signed_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InstallError, match="ssh-keygen") as caught:
        check_bundle(signed_bundle, signed_bundle.parent / "signers")
    assert "--sha256" in caught.value.hint


# Installing, as a user runs it: by another Python process, in a home of its own


@pytest.fixture
def run(signed_bundle, tmp_path):
    """Runs the installer out of the bundle; without `trust`, by its signature."""
    (tmp_path / "home").mkdir()
    subprocess.run(["tar", "-xf", signed_bundle, "install.py"], cwd=tmp_path, check=True)

    def call(*options, bundle=signed_bundle, trust=None, **environment):
        trust = ["--signers", signed_bundle.parent / "signers"] if trust is None else trust
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH")}
        return subprocess.run(
            [sys.executable, "-I", tmp_path / "install.py", bundle, *trust, *options],
            env=kept | {"HOME": str(tmp_path / "home"), "PIP_INDEX_URL": "nowhere:"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    call.home = tmp_path / "home" / ".local" / "share" / "normistral"
    return call


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if "runtimes/" not in str(path))


def test_it_installs_once_and_again(run, signed_bundle):
    done = run()
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "trying it")
    assert "signed by utgiver@example.no; all" in done.stdout
    command = run.home / "bin" / "normistral"
    assert f"{command} chat liten" in done.stdout
    echoed = subprocess.run([command, "chat", "liten"], capture_output=True, text=True, check=True, env={})
    assert echoed.stdout == "blåbær chat liten\n"
    present = files(run.home)
    assert [path for path in present if path.startswith("artifacts/liten/")] == [
        f"artifacts/liten/{name}" for name in ("config.json", "model.bin", "normistral.json")
    ]
    assert not [path for path in present if ".installing" in path]
    again = run()
    assert again.returncode == 0
    assert "unpacking" not in again.stderr  # the runtime and the artifact are there
    assert files(run.home) == present

    config = run.home / "artifacts" / "liten" / "config.json"
    config.write_text("mine")
    refused = run()
    assert refused.returncode == 1
    assert "is there already, and is not what the bundle holds" in refused.stderr
    assert "hint: give another --name" in refused.stderr
    assert run("--name", "annen").returncode == 0
    assert config.read_text() == "mine"
    assert (run.home / "artifacts" / "annen" / "config.json").is_file()


def test_nothing_is_written_for_a_bundle_that_is_not_trusted(run, signed_bundle, tmp_path):
    raw = bytearray(signed_bundle.read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "b.tar").write_bytes(raw)
    shutil.copy(f"{signed_bundle}.sig", tmp_path / "b.tar.sig")
    for trust in (None, ["--allow-unsigned"], ["--sha256", "a" * 64]):
        done = run(bundle=tmp_path / "b.tar", trust=trust)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 3), done.stderr
        assert "error: " in done.stderr
        assert "hint: do not use it" in done.stderr
    assert run(trust=[]).returncode == 2  # somebody has to vouch for it, or be left out in so many words
    assert run("--name", "../x").returncode == 2
    assert not list((tmp_path / "home").iterdir())
    checked = run("--check", trust=["--allow-unsigned"])
    assert checked.returncode == 0
    assert "warning: nobody vouches for this bundle" in checked.stderr
    assert not list((tmp_path / "home").iterdir())


def test_kernels_that_cannot_be_loaded_are_left_out(tmp_path, monkeypatch, capsys):
    wheels = write_wheels(tmp_path / "wheels")
    write_wheel(wheels, "normistral", normistral.__version__, FAKE_NORMISTRAL, ("leaf>=1", "openvino"))
    write_wheel(wheels, "openvino", "1.0", "")
    loadable = Path(_ctypes.__file__).read_bytes()
    kernels = [
        ArchiveEntry.of_bytes("kernels/good.so", loadable),
        ArchiveEntry.of_bytes("kernels/strange.so", loadable[:100]),
    ]
    monkeypatch.setattr(bundling, "_compile_kernels", lambda *arguments: kernels)
    artifact = write_small_artifact(tmp_path / "liten")
    make_bundle(artifact, tmp_path / "b.tar", BundleOptions(choose_target(), wheels=wheels))
    bundle = check_bundle(tmp_path / "b.tar")
    for _ in range(2):
        install.install(bundle, tmp_path / "p", "liten")
        assert [path.name for path in (tmp_path / "p" / "kernels").iterdir()] == ["good.so"]
        assert (tmp_path / "p" / "kernels" / "good.so").read_bytes() == loadable
        assert "left out, because it cannot be loaded here: strange.so" in capsys.readouterr().err


@pytest.fixture
def bundle(signed_bundle):
    return check_bundle(signed_bundle)


def test_a_runtime_that_does_not_work_leaves_nothing(bundle, tmp_path, monkeypatch):
    def make_broken_runtime(bundle, runtime):
        (runtime / "bin").mkdir()
        (runtime / "bin" / "normistral").write_text("#!/bin/sh\necho 'error: no such engine' >&2\nexit 1\n")
        (runtime / "bin" / "normistral").chmod(0o755)

    monkeypatch.setattr(install, "_make_runtime", make_broken_runtime)
    with pytest.raises(InstallError, match="the runtime does not run here: error: no such engine"):
        install.install(bundle, tmp_path / "p", "liten")
    assert files(tmp_path / "p") == [".install.lock", "artifacts", "bin", "runtimes"]
    assert list((tmp_path / "p" / "runtimes").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "3.9"}, r"for Python 3\.9; this is"),
        ({"machine": "riscv64"}, "for Linux riscv64"),
        ({"glibc": "2.999"}, r"needs glibc 2\.999; this system has"),
    ],
)
def test_another_machine_is_told_what_it_lacks(bundle, changes, message):
    with pytest.raises(InstallError, match=message) as caught:
        install.require_machine(bundle.description | changes)
    assert caught.value.hint


def test_interrupts_leave_the_place_as_it_was(bundle, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    def interrupt_unpacking(bundle, folder, target):
        target.mkdir()
        raise KeyboardInterrupt

    fast = {"_make_runtime": lambda *arguments: None, "_run": lambda *arguments: None}
    steps = {"_unpack": interrupt_unpacking, "_make_runtime": interrupt, "_run": interrupt, "_write_command": interrupt}
    for step, stop in steps.items():
        with monkeypatch.context() as patch:
            for name, replacement in (fast | {step: stop}).items():
                patch.setattr(install, name, replacement)
            with pytest.raises(KeyboardInterrupt):
                install.install(bundle, tmp_path / "p", "liten")
        present = files(tmp_path / "p")
        assert not [name for name in present if ".installing" in name or name == "bin/normistral"]
        if step != "_write_command":  # then all is there but the command
            assert "artifacts/liten" not in present
            assert list((tmp_path / "p" / "runtimes").iterdir()) == []


def test_a_bundle_that_changes_while_it_is_unpacked_is_noticed(signed_bundle, tmp_path):
    file = shutil.copy(signed_bundle, tmp_path / "b.tar")
    bundle = check_bundle(Path(file))
    raw = bytearray(signed_bundle.read_bytes())
    raw[bundle.members["artifact/model.bin"].offset] ^= 1
    Path(file).write_bytes(raw)
    with pytest.raises(InstallError, match=r"model\.bin changed while"):
        install.install(bundle, tmp_path / "p", "liten")
    assert not (tmp_path / "p" / "artifacts" / "liten").exists()


def test_a_full_disk_and_another_installation_are_said(bundle, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(install.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
        with pytest.raises(InstallError, match="too full"):
            install.install(bundle, tmp_path / "p", "liten")
    with install._locked(tmp_path / "p"), pytest.raises(InstallError, match="another installation"):
        install.install(bundle, tmp_path / "p", "liten")


def test_a_signature_in_another_spelling_is_refused(signed_bundle, tmp_path):
    lines = Path(f"{signed_bundle}.sig").read_text().splitlines()
    blob = base64.b64decode("".join(lines[1:-1]))
    for text in (
        "\n".join([*lines, "", ""]),
        "\n".join([lines[0], *(f" {line}" for line in lines[1:-1]), lines[-1], ""]),
        base64.b64encode(blob).decode(),
        "",
    ):
        (tmp_path / "bundle.tar.sig").write_text(text)
        found = refusal(signed_bundle.read_bytes(), tmp_path, signers=signed_bundle.parent / "signers")
        assert "not a signature" in found


# Code and folders of others


@pytest.mark.parametrize("options", [[], ["-I"]], ids=["plain", "isolated"])
def test_nothing_that_lies_beside_the_installer_is_run(signed_bundle, tmp_path, options):
    """Modules with the names of the standard library, hooks of site, a .pth file: in its folder and the current one."""
    subprocess.run(["tar", "-xf", signed_bundle, "install.py"], cwd=tmp_path, check=True)
    ran = tmp_path / "ran"
    for name in {*sys.stdlib_module_names, "sitecustomize", "usercustomize"} - {"install"}:
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write('{name} ')\nraise SystemExit(3)\n")
    (tmp_path / "x.pth").write_text(f"import sys; open({str(ran)!r}, 'a').write('pth ')\n")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "base64.py")}
    for arguments in (["--help"], [signed_bundle, "--check", "--signers", signed_bundle.parent / "signers"]):
        done = subprocess.run(
            [sys.executable, *options, "install.py", *arguments],
            cwd=tmp_path,
            env=environment | ({"PYTHONPATH": str(tmp_path)} if options else {}),
            capture_output=True,
            text=True,
        )
        assert not ran.exists(), ran.read_text()
        assert done.returncode == 0, done.stderr
    assert "signed by utgiver@example.no" in done.stdout


def test_an_old_python_is_told_so():
    """The check comes before anything that an old Python does not know; here it is read, as there is no old one."""
    text = bundling.installer_source().decode()
    ast.parse(text, feature_version=(3, 6))  # python3 of RHEL 8; it has to get as far as the check
    head = text[: text.index("import argparse")]
    assert "from __future__" not in head
    assert 'sys.exit("error: this needs Python 3.11' in head


def test_the_installer_imports_the_standard_library_alone():
    """It is made of two modules of the package; tests run it where the package can be imported."""
    nodes = list(ast.walk(ast.parse(bundling.installer_source())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {"." * node.level + node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {"argparse", "hashlib", "pathlib"} < imported
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def crowd(prefix):
    """What a user may have in PREFIX, and what others plant there."""
    for name in ("artifacts", "kernels", "runtimes", "bin"):
        folder = prefix / name
        (folder / "thesis").mkdir(parents=True)
        (folder / "thesis" / "chapter").write_text("years of work")
        (folder / ".installing-mine").mkdir()
        (folder / ".installing-mine" / "chapter").write_text("years of work")
        (folder / ".installing-file").write_text("mine")
        (folder / ".installing-link").symlink_to(folder / "thesis")
        (folder / "marked by a link").mkdir()
        (folder / "marked by a link" / install._MARK).symlink_to(folder / "thesis")
        os.mkfifo(folder / "fifo")
    (prefix / "runtimes" / "file").write_text("mine")


def test_only_what_carries_our_mark_is_deleted(bundle, tmp_path, monkeypatch):
    prefix = tmp_path / "p"
    crowd(prefix)
    half = prefix / "runtimes" / "0.0-half"
    half.mkdir()
    (half / install._MARK).touch()
    before = {name: found for name, found in look(prefix).items() if "0.0-half" not in name}
    with monkeypatch.context() as patch:
        patch.setattr(install.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
        with pytest.raises(InstallError, match="too full"):
            install.install(bundle, prefix, "liten")
    assert {name: found for name, found in look(prefix).items() if name != ".install.lock"} == before
    install.install(bundle, prefix, "liten")
    after = look(prefix)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after.keys() - before.keys() if ".installing" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [".install.lock", "bin/normistral", "runtimes/NAME", "artifacts/liten"])
def test_what_is_in_the_way_is_refused_and_kept(bundle, tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(install, "_make_runtime", lambda *arguments: None)
    monkeypatch.setattr(install, "_run", lambda *arguments: None)
    name = name.replace("NAME", install._runtime_name(bundle))
    prefix = tmp_path / "p"
    (prefix / name).parent.mkdir(parents=True)
    plant(prefix / name, kind)
    before = look(prefix)
    with pytest.raises(InstallError) as refused:
        install.install(bundle, prefix, "liten")
    assert refused.value.hint
    assert {path: found for path, found in look(prefix).items() if path in before} == before


@AS_ROOT
@pytest.mark.parametrize("name", ["", "runtimes", "artifacts", "bin"])
def test_a_place_that_others_can_exchange_is_refused(bundle, tmp_path, name):
    place = tmp_path / "p" / name
    place.mkdir(parents=True)
    for change in (lambda: os.chown(place, NOBODY, NOBODY), lambda: (os.chown(place, 0, 0), place.chmod(0o777))):
        change()
        with pytest.raises(InstallError, match=r"another user|by everybody"):
            install.install(bundle, tmp_path / "p", "liten")
    assert not list((tmp_path / "p").rglob(install._WHOLE))


@AS_ROOT
def test_a_runtime_of_somebody_else_is_not_run(bundle, tmp_path):
    runtime = tmp_path / "p" / "runtimes" / install._runtime_name(bundle)
    (runtime / "bin").mkdir(parents=True)
    (runtime / install._WHOLE).touch()
    (runtime / "bin" / "normistral").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (runtime / "bin" / "normistral").chmod(0o755)
    os.chown(runtime, NOBODY, NOBODY)
    with pytest.raises(InstallError, match="no installation made it"):
        install.install(bundle, tmp_path / "p", "liten")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("bundle_name", ["fifo", "nothing", "."])
def test_a_bundle_is_a_file(tmp_path, bundle_name):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InstallError, match="no file"):
        check_bundle(tmp_path / bundle_name)


def test_a_prefix_of_no_user_is_refused(bundle):
    with pytest.raises(InstallError, match="names a user"):
        install.install(bundle, Path("~nosuchuser/x"), "liten")
