"""`normistral publish` to a hub on the loopback: what is sent, what is not sent again, and every refusal."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub, leave_own_hub, serve
from sample_artifacts import make_manifest

from normistral.artifact.card import CardOptions, render_card
from normistral.artifact.download import find_or_download
from normistral.artifact.manifest import Source, check_files, hash_files, read_manifest, write_manifest
from normistral.artifact.store import remove_artifact
from normistral.cli import main
from normistral.errors import NormistralError, PublishError
from normistral.export.publish import plan_publication
from normistral.export.publish import publish as send
from normistral.progress import NoProgress

NAME, TOKEN = "me/tiny", "hf_secret"
BIG, SECOND = "openvino_model.bin", "tokenizer.json"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    leave_own_hub(tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    reset_sessions()
    return tmp_path / "home" / "artifacts"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "norsk"
    folder.mkdir()
    (folder / "config.json").write_text('{"name": "ærlig"}', encoding="utf-8")
    (folder / BIG).write_bytes(bytes(range(256)) * 1000)
    (folder / SECOND).write_bytes(b"{}" * 15_000)
    source = Source("hub", "norallm/normistral-7b-warm-instruct", "a" * 40, {})
    manifest = make_manifest(files=hash_files(folder), source=source)
    write_manifest(folder, manifest)
    (folder / "README.md").write_bytes(render_card(manifest, "norsk"))
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants

    with serve(None, NAME) as running:
        running.token = TOKEN
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)  # read once, when it is imported
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def publish(artifact: Path, *options: str, name: str = NAME) -> int:
    return main(["publish", str(artifact), name, "--yes", *options])


def test_a_card_that_was_rewritten_on_the_hub_stays(
    hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(artifact)
    hub.files["README.md"] = b"---\nlicense: mit\n---\n# Mine\n"
    old = read_manifest(artifact)
    write_manifest(artifact, replace(old, created="2026-11-30T00:00:00Z"))
    assert publish(artifact) == 0
    assert hub.uploads[-1] == ["normistral.json"]
    assert "was rewritten there, and stays as it is" in capsys.readouterr().err
    (artifact / "README.md").write_bytes(b"---\nlicense: mit\n---\n# Mine, in the folder\n")
    assert publish(artifact) == 0
    assert hub.files["README.md"] == (artifact / "README.md").read_bytes()


def put(hub: LoopbackHub) -> list[str]:
    return [line for line in hub.requests if line.startswith("PUT")]


def test_published_and_used_from_an_empty_store(
    hub: LoopbackHub, artifact: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(artifact, "--debug") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{hub.endpoint}/{NAME}\n"
    size = sum(len(data) for data in hub.files.values())
    assert f"to send: {size / 1000:.3g} kB in 5 files; 0 are there already" in shown.err
    assert "a new repository, for everybody, licence apache-2.0" in shown.err
    assert TOKEN not in shown.out + shown.err
    assert hub.uploads == [[*hub.uploads[0]]]
    assert hub.files.keys() == {*read_manifest(artifact).files, "normistral.json", "README.md"}
    assert hub.files["README.md"] == render_card(read_manifest(artifact), "norsk", CardOptions(NAME))
    uploads = [headers for line, headers in zip(hub.requests, hub.headers_seen, strict=True) if "/upload/" in line]
    assert len(uploads) == 2
    assert not any("Authorization" in headers for headers in uploads)
    copy = find_or_download(f"{NAME}@main")
    check_files(copy, read_manifest(artifact), thorough=True)
    assert not (artifact.parent / "hf").exists() or not [*(artifact.parent / "hf").rglob("*xet*")]


def test_a_second_time_nothing_is_sent(hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(artifact)
    hub.requests.clear()
    assert publish(artifact) == 0
    assert "nothing is to be sent" in capsys.readouterr().err
    assert not [line for line in hub.requests if not line.startswith("GET")]


def test_only_what_changed_is_sent_and_what_is_gone_is_deleted(hub: LoopbackHub, artifact: Path) -> None:
    publish(artifact)
    hub.files["picture.png"] = b"the owner's"
    (artifact / SECOND).unlink()
    (artifact / "more.json").write_text("{}")
    old = read_manifest(artifact)
    names = ("config.json", BIG, "more.json")
    write_manifest(artifact, make_manifest(source=old.source, files={n: hash_files(artifact)[n] for n in names}))
    hub.requests.clear()
    assert publish(artifact) == 0
    assert put(hub) == []
    assert set(hub.uploads[-1]) >= {"more.json", "normistral.json", SECOND}
    assert not {"config.json", BIG} & set(hub.uploads[-1])
    assert SECOND not in hub.files
    assert hub.files["picture.png"] == b"the owner's"


def test_broken_off_and_again(hub: LoopbackHub, artifact: Path) -> None:
    class Breaks(NoProgress):
        def stage(self, title: str, total: int | None = None, unit: str = "") -> Any:
            from contextlib import nullcontext

            class Stage:
                def advance(self, amount: int) -> None:
                    if title == "sending":
                        raise KeyboardInterrupt

                def set_total(self, total: int | None) -> None:
                    pass

            return nullcontext(Stage())

    plan = plan_publication(artifact, NAME, CardOptions(), private=False, progress=Breaks())
    with pytest.raises(KeyboardInterrupt):
        send(plan, Breaks())
    assert hub.files == {}
    assert [*hub.sent] == [read_manifest(artifact).files[BIG].sha256]  # the largest first
    hub.requests.clear()
    assert publish(artifact) == 0
    assert len(put(hub)) == 1  # the other large one
    assert len(hub.files) == 5


def test_private(hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(artifact, "--private") == 0
    assert hub.private
    assert "for you alone" in capsys.readouterr().err
    copy = find_or_download(f"{NAME}@main")  # with the token
    remove_artifact(copy)
    hub.private = False
    assert publish(artifact, "--private") == 2
    assert "is there and public" in capsys.readouterr().err


def shown_error(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err
    assert "hint:" in shown
    assert "Traceback" not in shown
    assert TOKEN not in shown
    return shown


def test_refusals(
    hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(artifact, name="tiny") == 2
    assert "OWNER/NAME" in shown_error(capsys)
    assert publish(artifact, name="other/tiny") == 1
    assert "may not write to other/tiny" in shown_error(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert publish(artifact) == 1
    assert "does not know the token" in shown_error(capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert publish(artifact) == 1
    assert "there is no token" in shown_error(capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.status = (503, "")
    assert publish(artifact) == 1
    shown_error(capsys)
    hub.status = None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert publish(artifact) == 1
    assert "HF_HUB_OFFLINE" in shown_error(capsys)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert publish(artifact) == 1
    assert "the connection to 127.0.0.1:9 broke off, or there is none" in shown_error(capsys)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    assert publish(artifact) == 1
    assert "is not HTTPS" in shown_error(capsys)
    assert hub.uploads == []


def test_a_name_that_is_taken(hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.exists = True
    hub.files = {".gitattributes": b"x", "README.md": b"# mine", "model.safetensors": b"x"}
    assert publish(artifact) == 1
    assert f"{NAME} is taken: it holds model.safetensors" in shown_error(capsys)
    hub.files["normistral.json"] = b"{}"
    assert publish(artifact) == 1
    assert "cannot be read" in shown_error(capsys)
    assert hub.uploads == []
    hub.files = {".gitattributes": b"x", "README.md": b"# made in the browser"}
    assert publish(artifact) == 0


def test_the_licence(hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = read_manifest(artifact).files
    write_manifest(artifact, make_manifest(files=files, source=Source("folder", "mine", None, {})))
    assert publish(artifact) == 2
    assert "--license ID" in shown_error(capsys)
    assert publish(artifact, "--license", "x\ny") == 2
    (artifact / "README.md").write_text("---\nlanguage: nb\n---\n# Mine\nlicense: mit\n")
    assert publish(artifact) == 2
    assert "names no licence" in shown_error(capsys)
    assert publish(artifact, "--license", "mit") == 2
    assert "was rewritten" in shown_error(capsys)
    assert hub.requests == []
    own = b"---\nlicense: mit\n---\n# Mine\n"
    (artifact / "README.md").write_bytes(own)
    assert publish(artifact) == 0
    assert hub.files["README.md"] == own
    (artifact / "README.md").unlink()
    del hub.files["README.md"]  # that of the author's own would stay
    assert publish(artifact, "--base-model", "norallm/normistral-7b-warm") == 0
    assert b'license: "apache-2.0"' in hub.files["README.md"]


def test_a_card_that_is_a_link_is_not_followed(
    hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact.parent / "secret").write_text("---\nlicense: mit\n---\nsecret\n")
    (artifact / "README.md").unlink()
    (artifact / "README.md").symlink_to(artifact.parent / "secret")
    assert publish(artifact) == 1
    assert "is a symbolic link" in shown_error(capsys)
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["flip", "missing", "link"])
def test_a_damaged_artifact_is_not_sent(
    hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    if damage == "flip":
        (artifact / BIG).write_bytes(b"x" + (artifact / BIG).read_bytes()[1:])
    else:
        (artifact / BIG).rename(artifact.parent / "elsewhere")
        if damage == "link":
            (artifact / BIG).symlink_to(artifact.parent / "elsewhere")
    assert publish(artifact) == 1
    assert BIG in shown_error(capsys)
    assert hub.uploads == []
    assert not hub.exists


def test_changed_while_it_is_published(hub: LoopbackHub, artifact: Path) -> None:
    plan = plan_publication(artifact, NAME, CardOptions(), private=False, progress=NoProgress())
    (artifact / BIG).write_bytes(b"x" + (artifact / BIG).read_bytes()[1:])
    with pytest.raises(NormistralError, match="was changed while it was published"):
        send(plan, NoProgress())
    assert hub.files == {}


def test_changed_by_somebody_else_meanwhile(hub: LoopbackHub, artifact: Path) -> None:
    publish(artifact)
    (artifact / "README.md").write_text("---\nlicense: mit\n---\n")
    plan = plan_publication(artifact, NAME, CardOptions(), private=False, progress=NoProgress())
    hub.commit = "f" * 40
    with pytest.raises(PublishError, match="by somebody else"):
        send(plan, NoProgress())


def test_nobody_is_there_to_be_asked(hub: LoopbackHub, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(artifact), NAME]) == 2
    assert "add --yes" in shown_error(capsys)
    assert not hub.exists


def test_without_the_extra(artifact: Path, hub: LoopbackHub) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; from normistral.cli import main\n"
        f"sys.exit(main(['publish', {str(artifact)!r}, {NAME!r}, '--yes']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "normistral[export]"' in done.stderr


def test_the_real_card_of_a_copy_is_no_problem(hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    """What was fetched can be published again; the record of where it came from stays here."""
    publish(artifact)
    copy = shutil.copytree(find_or_download(f"{NAME}@main"), tmp_path / "copy")
    assert publish(copy) == 0
    assert len(hub.uploads) == 1
    assert hashlib.sha256(hub.files[BIG]).hexdigest() == read_manifest(copy).files[BIG].sha256
