"""Downloads of published artifacts from a hub on the loopback: resumed, refused, lied to, and offline afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loopback_hub import COMMIT, LoopbackHub, leave_own_hub, serve
from sample_artifacts import make_manifest

import normistral
from normistral.artifact import download as download_module
from normistral.artifact import hub as hub_module
from normistral.artifact import store
from normistral.artifact.artifact import Artifact
from normistral.artifact.download import download_published, find_or_download
from normistral.artifact.extra_files import ORIGIN_NAME, parse_published, read_origin
from normistral.artifact.manifest import (
    FileRecord,
    check_files,
    hash_files,
    read_manifest,
    serialise_manifest,
    write_manifest,
)
from normistral.cli import main
from normistral.commands.eval import EvalArgs, remember_repeat
from normistral.errors import (
    ArtifactError,
    DownloadError,
    ModelNotFoundError,
    NormistralError,
    ResourceError,
    UsageError,
)
from normistral.evaluation.metrics import Estimate
from normistral.export.staging import Unfinished, find_unfinished
from normistral.files import locked, make_own_folder
from normistral.progress import NoProgress

NAME, BIG = "norallm/tiny", "openvino_model.bin"
COPY = "norallm--tiny"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "artifact"
    folder.mkdir()
    (folder / "config.json").write_text('{"name": "ærlig"}', encoding="utf-8")
    (folder / BIG).write_bytes(bytes(range(256)) * 1000)
    write_manifest(folder, make_manifest(files=hash_files(folder)))
    (folder / "README.md").write_text("# mine")
    (folder / "evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and an empty working folder beside it; the folder of artifacts."""
    leave_own_hub(tmp_path, monkeypatch)
    monkeypatch.setattr(hub_module, "_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(hub_module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(download_module, "_PAUSE_S", 0.01)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home" / "artifacts"


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with serve(published, NAME) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


class Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def refusal(kind: type[NormistralError], name: str = NAME) -> NormistralError:
    with pytest.raises(kind) as caught:
        find_or_download(name)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def nothing_looks_whole(home: Path) -> bool:
    return not home.exists() or all(path.name.startswith(".") for path in home.iterdir())


def publish_manifest(hub: LoopbackHub, **changes: Any) -> None:
    """Put another manifest on the hub, well-formed, over the files that are there."""
    files = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in hub.files.items()}
    ours = {name: files[name] for name in ("config.json", BIG)}
    hub.files["normistral.json"] = serialise_manifest(make_manifest(**{"files": ours, **changes}))


def test_whole_download_pinned_and_without_a_second_connection(hub: LoopbackHub, home: Path, published: Path) -> None:
    progress = Notes()
    folder = find_or_download(NAME, progress)
    assert folder == home / COPY
    assert {path.name for path in folder.iterdir()} == {"config.json", BIG, "normistral.json", ORIGIN_NAME}
    check_files(folder, read_manifest(folder), thorough=True)
    assert (folder / "normistral.json").read_bytes() == (published / "normistral.json").read_bytes()
    assert all(f"/resolve/{COMMIT}/" in line for line in hub.requests[1:])
    host = hub.endpoint.removeprefix("http://")
    assert progress.notes == [f"downloading 256 kB from {host}: {NAME}, commit {COMMIT[:12]}, to {folder}"]
    origin = read_origin(folder)
    assert origin is not None
    assert (origin.repository, origin.commit, origin.revision) == (NAME, COMMIT, None)
    hub.requests.clear()
    assert find_or_download(NAME) == find_or_download(f"{NAME}@{COMMIT}") == store.resolve_artifact(NAME) == folder
    assert hub.requests == []
    assert [path.name for path in home.iterdir()] == [COPY]


def test_with_the_hub_gone(published: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(published, NAME) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        folder = find_or_download(NAME)
    assert find_or_download(NAME) == folder
    assert main(["info", NAME]) == 0
    assert "no connection to 127.0.0.1" in refusal(DownloadError, "norallm/other").message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_or_download(NAME) == folder
    assert "HF_HUB_OFFLINE" in refusal(DownloadError, "norallm/other").message


def test_a_folder_always_wins(hub: LoopbackHub, tmp_path: Path) -> None:
    here = tmp_path / "work" / "norallm" / "tiny"
    here.mkdir(parents=True)
    assert find_or_download(NAME) == Path(NAME)  # no artifact, but a folder
    here.rmdir()
    error = refusal(ModelNotFoundError)  # more likely a path with an error in it than a name
    assert "@main" in error.hint
    assert hub.requests == []
    assert find_or_download(f"{NAME}@main").name == f"{COPY}@main"
    here.mkdir()
    assert find_or_download(NAME) == Path(NAME)
    here.rmdir()
    here.write_text("a file")
    assert "is a file" in refusal(ModelNotFoundError).message


def test_nothing_is_downloaded_unasked(hub: LoopbackHub) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        normistral.load(NAME)
    assert "download=True" in caught.value.hint
    for name in (
        "tiny",
        "./norallm/tiny",
        "norallm/tiny/x",
        "a..b/c",
        "a--b/c",
        "models/x.gguf",
        "norallm/tiny@../x",
        "/norallm/tiny",
    ):
        assert parse_published(name) is None
        refusal(ModelNotFoundError, name)
    assert hub.requests == []


def test_a_checkpoint_gets_the_hint_to_export(hub: LoopbackHub) -> None:
    assert refusal(ModelNotFoundError, "norallm/normistral-7b-warm").hint.endswith("normistral export 7b-warm")
    assert hub.requests == []
    del hub.files["normistral.json"]
    error = refusal(ModelNotFoundError)
    assert "is a checkpoint and no artifact" in error.message
    assert error.hint == f"make one with: normistral export {NAME}"


def test_revisions_stay_apart(hub: LoopbackHub, home: Path) -> None:
    hub.revisions = ("v1", "main", COMMIT)
    first = find_or_download(f"{NAME}@v1")
    assert first == home / f"{COPY}@v1"
    assert find_or_download(NAME) == home / COPY
    assert "no such revision" in refusal(ModelNotFoundError, f"{NAME}@v2").message


def test_broken_connections_are_resumed(hub: LoopbackHub, home: Path) -> None:
    hub.cut[BIG] = [30_000, 20_000]
    find_or_download(NAME)
    assert [line.split(" ")[2] for line in hub.asked_for(BIG)] == ["", "bytes=30000-", "bytes=50000-"]


def test_a_connection_that_always_breaks(hub: LoopbackHub, home: Path) -> None:
    hub.cut[BIG] = [10_000] + [0] * 50
    error = refusal(DownloadError)
    assert "broke off after 10000 of 256000 bytes" in error.message
    assert "it continues" in error.hint
    assert nothing_looks_whole(home)
    assert len(hub.asked_for(BIG)) < 10
    hub.cut.clear()
    find_or_download(NAME)
    assert hub.asked_for(BIG)[-1].endswith("bytes=10000-")
    assert len(hub.asked_for("config.json")) == 1


def test_listing_or_manifest_that_end_early(hub: LoopbackHub) -> None:
    hub.cut = {"": [100], "normistral.json": [100]}
    assert "no connection to 127.0.0.1" in refusal(DownloadError).message
    assert "broke off (it ended early)" in refusal(DownloadError).message
    find_or_download(NAME)


def test_a_hub_that_sends_no_parts_and_always_breaks(
    hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut[BIG] = [10_000] * 50
    hub.headers["Content-Range"] = "bytes 0-1/2"
    assert "broke off" in refusal(DownloadError).message
    hub.cut.clear()
    check_files(find_or_download(NAME), make_manifest(files=hash_files(home / COPY)), thorough=False)


def test_killed_in_the_middle_and_again(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    hub.files[BIG] = os.urandom(40 * 2**20)
    publish_manifest(hub)
    code = "import sys; from normistral.cli import main; sys.exit(main(['info', 'norallm/tiny']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    partial = home / f".{COPY}.download" / "partial" / hashlib.sha256(hub.files[BIG]).hexdigest()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 2**20):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert nothing_looks_whole(home)
    reached = partial.stat().st_size
    assert 0 < reached < 40 * 2**20
    hub.requests.clear()
    assert main(["info", NAME]) == 0
    assert hub.asked_for(BIG)[0].endswith(f"bytes={reached}-")
    assert hub.asked_for("config.json") == []
    assert [path.name for path in home.iterdir()] == [COPY]


def test_what_was_left_may_be_spoilt(hub: LoopbackHub, home: Path) -> None:
    hub.cut[BIG] = [10_000] + [0] * 50
    refusal(DownloadError)
    hub.cut.clear()
    partial = next((home / f".{COPY}.download" / "partial").iterdir())
    for spoilt in (b"x" * partial.stat().st_size, b"x" * 300_000):
        partial.write_bytes(spoilt)
        (home / f".{COPY}.download" / "artifact" / "config.json").write_text("x" * 18)
        (home / f".{COPY}.download" / "artifact" / "leftover").write_text("of another commit")
        folder = find_or_download(NAME)
        check_files(folder, read_manifest(folder), thorough=True)
        assert not (folder / "leftover").exists()
        store.remove_artifact(folder)
        (home / f".{COPY}.download").mkdir(0o700)
        (home / f".{COPY}.download" / ".made-by-normistral").touch()
        for part in ("artifact", "partial"):
            (home / f".{COPY}.download" / part).mkdir()


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("name", [BIG, "config.json", "normistral.json"])
def test_wrong_bytes(hub: LoopbackHub, home: Path, name: str) -> None:
    hub.swapped[name] = flip(hub.files[name])
    error = refusal(DownloadError)
    assert name in error.message
    assert nothing_looks_whole(home)
    assert hashlib.sha256(hub.files[name]).hexdigest() not in {path.name for path in home.rglob("*")}
    hub.swapped.clear()
    find_or_download(NAME)


@pytest.mark.parametrize("name", [BIG, "config.json", "normistral.json"])
def test_too_many_bytes(hub: LoopbackHub, home: Path, name: str) -> None:
    hub.swapped[name] = hub.files[name] + b"more"
    refusal(DownloadError)
    assert nothing_looks_whole(home)
    assert all(path.stat().st_size <= len(hub.files[BIG]) for path in home.rglob("*") if path.is_file())


def test_manifest_and_listing_disagree(hub: LoopbackHub, home: Path) -> None:
    hub.listed[BIG] = {"size": 7}
    assert f"another {BIG} than its manifest" in refusal(ArtifactError).message
    hub.listed[BIG] = {"lfs": {"sha256": "0" * 64, "size": 256_000}}
    refusal(ArtifactError)
    hub.listed.clear()
    del hub.files[BIG]
    assert f"lacks {BIG}" in refusal(ArtifactError).message
    assert hub.asked_for(BIG) == []
    assert nothing_looks_whole(home)


@pytest.mark.parametrize(
    "name",
    [".hidden", "normistral-published.json", "README.md", "Config.JSON", "CONFIG.json", "a b", "-x", "x\n", "ø", "x."],
)
def test_names_that_no_export_writes(hub: LoopbackHub, home: Path, name: str) -> None:
    hub.files[name] = b"x"
    one, files = FileRecord(1, hashlib.sha256(b"x").hexdigest()), make_manifest().files
    names = {name: one} if name != "CONFIG.json" else {name: one, "config.json": one}
    if name != "CONFIG.json":
        names |= {"config.JSON": one} if name == "Config.JSON" else {}
    publish_manifest(hub, files=names)
    assert "names a file" in refusal(ArtifactError).message
    assert nothing_looks_whole(home)
    assert files


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a/b", "a\\b", "c:x", "\0"])
def test_paths_in_a_manifest(hub: LoopbackHub, home: Path, tmp_path: Path, name: str) -> None:
    raw = hub.files["normistral.json"].replace(b'"config.json"', json.dumps(name).encode(), 1)
    empty = raw.replace(raw.split(b'"checksum": "')[1][:64], b"0" * 64)
    hub.files["normistral.json"] = raw.replace(
        raw.split(b'"checksum": "')[1][:64], hashlib.sha256(empty).hexdigest().encode()
    )
    hub.files[name] = hub.files["config.json"]
    assert "not a valid manifest" in refusal(ArtifactError).message
    assert {path.name for path in tmp_path.iterdir()} <= {"work", "home"}


def test_a_damaged_or_newer_manifest(hub: LoopbackHub) -> None:
    hub.files["normistral.json"] = flip(hub.files["normistral.json"])
    assert f"of {NAME} was changed" in refusal(ArtifactError).message
    hub.files["normistral.json"] = b"{" * 5_000_000
    assert "has a normistral.json of 5000000 bytes" in refusal(DownloadError).message


@pytest.mark.parametrize(
    "sha", ["../../../etc/x", "0" * 39, "G" * 40, None, 7, "0123456789abcdef0123456789abcdef0123456\n"]
)
def test_no_commit(hub: LoopbackHub, home: Path, sha: Any) -> None:
    hub.commit = sha
    refusal(DownloadError)
    assert nothing_looks_whole(home)


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        ((401, "RepoNotFound"), ModelNotFoundError, "there is no norallm/tiny here or at 127.0.0.1"),
        ((404, "RepoNotFound"), ModelNotFoundError, "or it is private"),
        ((403, "GatedRepo"), DownloadError, "is gated"),
        ((403, ""), DownloadError, "refused norallm/tiny (HTTP 403)"),
        ((503, ""), DownloadError, "answered HTTP 503"),
    ],
)
def test_refusals(hub: LoopbackHub, status: tuple[int, str], kind: type[NormistralError], text: str) -> None:
    hub.status = status
    assert text in refusal(kind).message


def test_certificates_that_are_named_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    for named in ("none.pem", "no.pem"):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / named))
        assert f"{named}, which cannot be read" in refusal(UsageError).message
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
    assert refusal(DownloadError)


def test_a_server_that_fails_for_a_moment(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = hub_module.Repository._request

    def fail_once(self: Any, address: str, start: int) -> Any:
        hub.status = (503, "") if address.endswith(BIG) and not hub.asked_for(BIG) else None
        return sent(self, address, start)

    monkeypatch.setattr(hub_module.Repository, "_request", fail_once)
    find_or_download(NAME)
    assert len(hub.asked_for(BIG)) == 2


def test_it_needs_nothing_but_the_runtime(hub: LoopbackHub) -> None:
    code = "import sys; from normistral.artifact.download import find_or_download; find_or_download('norallm/tiny')\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert not imported & {"huggingface_hub", "requests", "httpx", "torch", "transformers", "openvino", "tokenizers"}


def test_full_disk(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(download_module, "free_disk_bytes", lambda path: 1000)
        assert "needs 256 kB more; 1 kB are free" in refusal(ResourceError).message
    assert hub.asked_for(BIG) == []
    code = """
import resource, sys
from normistral.artifact.download import find_or_download
from normistral.errors import ResourceError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    find_or_download('norallm/tiny')
except ResourceError as error:
    print(error.message, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "while downloading norallm/tiny" in done.stdout
    assert "it continues" in done.stdout
    assert nothing_looks_whole(home)
    find_or_download(NAME)
    assert not hub.asked_for(BIG)[-1].endswith("GET ")


def test_two_at_the_same_time(hub: LoopbackHub, home: Path) -> None:
    hub.files[BIG] = os.urandom(5 * 2**20)
    publish_manifest(hub)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_or_download(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [home / COPY] * 4
    assert len(hub.asked_for(BIG)) == 1
    assert [path.name for path in home.iterdir()] == [COPY]


def test_links_and_strange_files_in_the_store(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    home.mkdir(parents=True)
    work = home / f".{COPY}.download"
    work.symlink_to(outside)
    assert "no download of normistral" in refusal(UsageError).message
    work.unlink()
    work.mkdir()
    assert "no download of normistral" in refusal(UsageError).message
    work.rmdir()
    make_own_folder(work)
    (work / "artifact").symlink_to(outside)
    (work / "partial").mkdir()
    (work / "partial" / read_digest(hub)).symlink_to(outside / "mine")
    (work / "partial" / "folder").mkdir()
    folder = find_or_download(NAME)
    assert not folder.is_symlink()
    assert [path.name for path in outside.iterdir()] == ["mine"]
    assert (outside / "mine").read_text() == "mine"


def read_digest(hub: LoopbackHub) -> str:
    return hashlib.sha256(hub.files[BIG]).hexdigest()


def test_something_else_has_the_copys_name(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    for plant in (
        lambda path: path.mkdir(),
        lambda path: path.write_text("x"),
        lambda path: path.symlink_to("nowhere"),
    ):
        home.mkdir(parents=True, exist_ok=True)
        plant(home / COPY)
        assert "is no copy of norallm/tiny" in refusal(UsageError).message
        (home / COPY).rename(tmp_path / os.urandom(4).hex())


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[dict[str, str]], list[Callable[[BaseHTTPRequestHandler], None]]]]:
    """Another host: its address, the headers it saw, and how it answers."""
    seen: list[dict[str, str]] = []
    answers: list[Callable[[BaseHTTPRequestHandler], None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            answers[0](self)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen, answers
    server.shutdown()
    server.server_close()


def test_the_token_stays_with_the_hub(
    hub: LoopbackHub, elsewhere: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, seen, answers = elsewhere
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def answer(handler: BaseHTTPRequestHandler) -> None:
        data = hub.files["normistral.json"]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    answers.append(answer)
    hub.redirect = f"{address}/blob"
    assert main(["info", NAME, "--debug"]) == 1  # the other files are not those of the manifest
    assert {headers.get("Authorization") for headers in hub.headers_seen} == {"Bearer hf_secret"}
    assert seen
    assert not any("Authorization" in headers or "hf_secret" in repr(headers) for headers in seen)
    shown = capsys.readouterr()
    assert "hf_secret" not in shown.out + shown.err


def test_what_another_host_answers_is_not_taken_for_the_hubs_word(hub: LoopbackHub, elsewhere: Any) -> None:
    address, _, answers = elsewhere
    answers.append(lambda handler: handler.send_error(404))
    hub.redirect = f"{address}/blob"
    host = address.removeprefix("http://")
    assert f"{host}, where 127.0.0.1:" in refusal(DownloadError).message
    hub.redirect = "http://127.0.0.1:9/blob"
    assert "broke off (127.0.0.1:9: " in refusal(DownloadError).message


def test_proxies_see_no_token_and_no_message_shows_their_password(
    elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, seen, answers = elsewhere
    answers.append(lambda handler: handler.send_error(403))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("http_proxy", address)
    refusal(DownloadError)
    assert seen
    assert "Authorization" not in seen[0]
    monkeypatch.setenv("http_proxy", "user:secret")
    error = refusal(UsageError)
    assert "HTTP_PROXY" in error.hint
    assert "secret" not in "".join(traceback.format_exception(error))


def test_the_token_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hub_module.may_carry_token("https://huggingface.co")
    assert not hub_module.may_carry_token("http://huggingface.co")
    assert not hub_module.may_carry_token("http://127.0.0.1.evil.example")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_file\n")
    assert hub_module.find_token() == "hf_file"
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    assert hub_module.find_token() == "hf_env"
    monkeypatch.setenv("HF_TOKEN", "a\r\nX: y")
    assert hub_module.find_token() is None


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "//", "http://a b/", "data:,x", "", "/loop"]
)
def test_redirects_to_nowhere(hub: LoopbackHub, home: Path, target: str) -> None:
    hub.redirect = target if target != "/loop" else f"/{NAME}/resolve/{COMMIT}/config.json"
    refusal(DownloadError)
    assert len(hub.requests) < 12
    assert nothing_looks_whole(home)


def test_answers_without_an_end(hub: LoopbackHub, home: Path, elsewhere: Any) -> None:
    """A body that goes on, behind a redirect and in it; headers that go on."""
    address, seen, answers = elsewhere

    def forever(handler: BaseHTTPRequestHandler, status: int, piece: bytes, **headers: str) -> None:
        handler.wfile.write(b"HTTP/1.1 %d x\r\n" % status)
        for name, value in headers.items():
            handler.wfile.write(f"{name}: {value}\r\n".encode())
        try:
            while True:
                handler.wfile.write(piece)
        except OSError:
            pass

    hub.redirect = f"{address}/blob"
    for answer in (
        lambda handler: forever(handler, 200, b"\r\n" + b"x" * 10_000),
        lambda handler: forever(handler, 302, b"\r\n" + b"x" * 10_000, Location=f"{address}/blob"),
        lambda handler: forever(handler, 200, b"X-Header: x\r\n"),
        lambda handler: forever(handler, 200, b"x" * 10_000),
    ):
        answers[:] = [answer]
        refusal(DownloadError)
        assert nothing_looks_whole(home)
    assert len(seen) < 30


def test_info_says_whose_word_the_certificate_is(
    hub: LoopbackHub, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_manifest(hub, verified="run")
    assert main(["info", NAME]) == 0
    shown = capsys.readouterr()
    assert "its publisher says: yes" in shown.out
    assert "nobody compared it here" in shown.out
    assert f"commit {COMMIT}" in shown.out
    assert main(["info", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["published"]["commit"] == COMMIT


def test_rm_takes_the_name_and_what_was_left(hub: LoopbackHub, home: Path) -> None:
    find_or_download(NAME)
    assert main(["rm", NAME, "--yes"]) == 0
    assert [*home.iterdir()] == []
    assert main(["rm", NAME, "--yes"]) == 1
    hub.cut[BIG] = [0] * 50
    refusal(DownloadError)
    assert [*home.iterdir()] == [home / f".{COPY}.download"]
    with locked(home / f".{COPY}.lock"):
        assert main(["rm", NAME, "--yes"]) == main(["rm", COPY, "--yes"]) == 2
    assert find_unfinished(home) == {COPY: Unfinished(18, False)}
    assert main(["rm", NAME, "--yes"]) == 0
    assert [*home.iterdir()] == []


def test_eval_remembers_what_it_found(
    hub: LoopbackHub, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a checkpoint; beside another artifact it says nothing of the certificate."""
    opened = Artifact.open(find_or_download(NAME))
    compared = SimpleNamespace(kl_mean=Estimate(0.0448, None, None), top1_agreement=Estimate(0.91, None, None))
    result: Any = SimpleNamespace(quality=SimpleNamespace(comparison=compared, tokens=4096))
    (tmp_path / "work" / "other").mkdir()
    (tmp_path / "work" / "other" / "normistral.json").write_text("{}")
    for reference in (None, "other"):
        remember_repeat(opened, EvalArgs(Path("text"), reference), result)
        assert main(["show", NAME]) == 0
        assert "its publisher says: not recorded" in capsys.readouterr().out
    remember_repeat(opened, EvalArgs(Path("text"), "norallm/normistral-7b-warm"), result)
    assert main(["info", NAME]) == 0
    shown = capsys.readouterr().out
    assert "compared here with norallm/normistral-7b-warm on" in shown
    assert "KL divergence 0.0448 nats, same first choice at 91% of 4,096 tokens" in shown
    assert "nobody compared it here" not in shown


def test_a_copy_under_another_name_is_none(hub: LoopbackHub, home: Path) -> None:
    folder = find_or_download(NAME)
    folder.rename(home / "norallm--other")
    hub.status = (404, "RepoNotFound")
    refusal(ModelNotFoundError, "norallm/other")
    origin = read_origin(home / "norallm--other")
    assert origin is not None
    assert replace(origin, date="") == replace(origin, date="", repeat=None)


@pytest.mark.parametrize(
    "address", ["ftp://x", "x", "http://", "http://user:pw@x", "http://x y", "http://[", "http://x:99999"]
)
def test_no_address_of_a_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "pw" not in refusal(UsageError).message


def test_published_name_is_not_downloaded_again_by_download(hub: LoopbackHub) -> None:
    name = parse_published(NAME)
    assert name is not None
    first = download_published(name, NoProgress())
    hub.requests.clear()
    assert download_published(name, NoProgress()) == first
    assert hub.requests == []
