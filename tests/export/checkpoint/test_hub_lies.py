"""A hub that lies: nothing outside of the cache is written or deleted, and nothing goes on for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import COMMIT, LoopbackHub, etag_of, serve, use_hub
from planted import look
from tiny_models import make_mistral

from normistral.artifact import hub as hub_module
from normistral.errors import DownloadError, NormistralError
from normistral.export.checkpoint.hub import Snapshot, download
from normistral.progress import NoProgress

SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mistral(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub_module, "_PAUSE_S", 0.01)
    with serve(checkpoint) as running:
        yield running


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What the user has around the cache."""
    (tmp_path / "x").write_text("mine")
    (tmp_path / "home" / "x").parent.mkdir()
    (tmp_path / "home" / "x").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / SHARD).write_text("mine")
    return tmp_path


def storage(tmp_path: Path) -> Path:
    return tmp_path / "home" / "cache" / "models--norallm--tiny"


def fetch(hub: LoopbackHub, tmp_path: Path) -> Snapshot:
    cache = tmp_path / "home" / "cache"
    with pytest.MonkeyPatch.context() as patch:
        use_hub(hub, cache, patch)
        return download(hub.repository, None, before_weights=lambda folder: None, progress=NoProgress())


def beside(tmp_path: Path) -> dict[str, Any]:
    """Everything but what is in the cache."""
    return {name: found for name, found in look(tmp_path).items() if not name.startswith("home/cache")}


@pytest.mark.parametrize("lie", ["../../../../x", "../../../../new", "/tmp/x", "x" * 3000, "0" * 39, "A" * 40, ""])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
def test_headers_name_no_files(hub: LoopbackHub, outside: Path, header: str, lie: str) -> None:
    before = beside(outside)
    hub.headers = {header: lie if header == "X-Repo-Commit" else f'"{lie}"'}
    for _ in range(2):
        snapshot = fetch(hub, outside)
        assert {name: path.read_bytes() for name in hub.files if (path := snapshot.folder / name).exists()} == hub.files
    assert beside(outside) == before
    blobs = {path.name for path in (storage(outside) / "blobs").iterdir()}
    assert blobs == {etag_of(data) for data in hub.files.values()}


@pytest.mark.parametrize("wrong", ["../../../../x", "/tmp/x", "0" * 39, "0" * 41, "A" * 40, "", None, 5, ["x"]])
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_hashes_that_are_none_are_refused_before_anything_is_written(
    hub: LoopbackHub, outside: Path, name: str, wrong: Any
) -> None:
    before = look(outside)
    lfs = {"sha256": wrong, "size": 5, "pointerSize": 134}
    hub.listed = {name: {"lfs": lfs} if name == SHARD else {"blobId": wrong}}
    with pytest.raises(DownloadError) as refused:
        fetch(hub, outside)
    assert refused.value.hint
    assert look(outside) == before


@pytest.mark.parametrize("size", [-1, 2**60, 1.5, "7", None, True])
def test_sizes_that_cannot_be_are_refused(hub: LoopbackHub, outside: Path, size: Any) -> None:
    before = look(outside)
    hub.listed = {"config.json": {"size": size}}
    with pytest.raises(NormistralError):
        fetch(hub, outside)
    assert look(outside) == before


@pytest.mark.parametrize("difference", [-3, 3, 100_000])
def test_a_size_that_lies_is_found(hub: LoopbackHub, outside: Path, difference: int) -> None:
    before = beside(outside)
    hub.listed = {"config.json": {"size": len(hub.files["config.json"]) + difference}}
    with pytest.raises(DownloadError):
        fetch(hub, outside)
    assert beside(outside) == before
    hub.listed = {}
    fetch(hub, outside)


@pytest.mark.parametrize("commit", ["../../../../x", "main", "0" * 39, "0" * 64, "", "Z" * 40])
def test_a_commit_that_is_none_is_refused(hub: LoopbackHub, outside: Path, commit: str) -> None:
    before = look(outside)
    hub.commit = commit
    with pytest.raises(DownloadError):
        fetch(hub, outside)
    assert look(outside) == before


def test_files_with_other_names_are_not_fetched(hub: LoopbackHub, outside: Path) -> None:
    before = beside(outside)
    entry = {"size": 5, "blobId": "0" * 40}
    names = [
        "../../../x.json",
        "/tmp/x.json",
        "a\0.json",
        "a\nb.json",
        "..json",
        ".json",
        "x" * 3000 + ".json",
        "a:b.json",
    ]
    hub.listed = dict.fromkeys(names, entry)
    snapshot = fetch(hub, outside)
    assert {path.name for path in snapshot.folder.iterdir()} == set(hub.files)
    assert beside(outside) == before


def test_names_that_differ_only_in_case_are_refused(hub: LoopbackHub, outside: Path) -> None:
    hub.listed = {"Config.json": {"size": 5, "blobId": "0" * 40}}
    with pytest.raises(DownloadError, match="twice"):
        fetch(hub, outside)


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "gopher://x/", "http://[", "http://127.0.0.1:9/", "//", "ftp://x"]
)
def test_redirects_lead_to_no_files(hub: LoopbackHub, outside: Path, place: str) -> None:
    before = beside(outside)
    hub.redirect = place
    with pytest.raises(DownloadError) as refused:
        fetch(hub, outside)
    assert refused.value.hint
    assert beside(outside) == before
    assert not any(path.stat().st_size for path in (storage(outside) / "blobs").iterdir())


def test_a_body_without_an_end_is_left_soon(hub: LoopbackHub, outside: Path) -> None:
    sent = 0

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal sent
            self.send_response(200)
            self.end_headers()
            try:
                while sent < 2**30:
                    sent += self.wfile.write(bytes(2**16))
            except OSError:
                pass

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        hub.redirect = f"http://127.0.0.1:{server.server_port}/"
        with pytest.raises(DownloadError, match="more bytes"):
            fetch(hub, outside)
    finally:
        server.shutdown()
        server.server_close()
    assert sent < 2**27
    most = max(map(len, hub.files.values()))
    assert all(path.stat().st_size <= most for path in (storage(outside) / "blobs").iterdir())


# Links in the cache


@pytest.mark.parametrize("name", ["blobs", "refs", "snapshots", f"snapshots/{COMMIT}"])
def test_folders_of_the_cache_that_lead_elsewhere_are_refused(hub: LoopbackHub, outside: Path, name: str) -> None:
    place = storage(outside) / name
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "thesis")
    before = beside(outside)
    with pytest.raises(DownloadError, match="leads out of the cache"):
        fetch(hub, outside)
    assert {name: found for name, found in beside(outside).items() if name in before} == before


@pytest.mark.parametrize("online", [True, False])
def test_a_file_that_is_a_link_elsewhere_is_neither_believed_nor_deleted(
    hub: LoopbackHub, outside: Path, online: bool
) -> None:
    place = fetch(hub, outside).folder / SHARD
    for target in (outside / "thesis" / SHARD, outside / ("0" * 64)):
        target.write_bytes(b"mine")
        before = beside(outside)
        place.unlink()
        place.symlink_to(target)
        if not online:
            hub.endpoint = "http://127.0.0.1:9"
        with pytest.raises(DownloadError):
            fetch(hub, outside)
        assert beside(outside) == before
        place.unlink(missing_ok=True)
        place.touch()


def test_a_partial_file_that_is_a_link_is_not_written_through(hub: LoopbackHub, outside: Path) -> None:
    blobs = storage(outside) / "blobs"
    blobs.mkdir(parents=True)
    for data in hub.files.values():
        (blobs / f"{etag_of(data)}.incomplete").symlink_to(outside / "x")
    with pytest.raises(DownloadError):
        fetch(hub, outside)
    assert (outside / "x").read_text() == "mine"
