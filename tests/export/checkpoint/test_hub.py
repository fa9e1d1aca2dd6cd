"""Downloads against a server on the loopback: resumed, truncated, forged, refused, offline."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import COMMIT, LARGE_BYTES, LoopbackHub, etag_of, serve, use_hub
from tiny_models import edit_json, make_mistral

from normistral.artifact import hub as hub_module
from normistral.errors import (
    CheckpointError,
    DownloadError,
    ModelNotFoundError,
    NormistralError,
    ResourceError,
    UnsupportedArchitectureError,
    UsageError,
)
from normistral.export.checkpoint.hub import Snapshot, download
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import hash_sources, open_checkpoint
from normistral.files import sha256_file
from normistral.progress import NoProgress


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_mistral(tmp_path_factory.mktemp("hub") / "tiny", shards=2)
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "consolidated.safetensors").write_bytes(b"twice the same weights")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub_module, "_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(hub_module, "_PAUSE_S", 0.01)
    with serve(checkpoint) as running:
        yield running


class Bytes(NoProgress):
    """Counts what the stages report."""

    def __init__(self) -> None:
        self.done: dict[str, list[int]] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        entry = self.done.setdefault(title, [0, 0])
        entry[1] += total or 0

        class Counter:
            def advance(self, amount: int) -> None:
                assert amount >= 0
                entry[0] += amount

            def set_total(self, total: int | None) -> None:
                entry[1] = total or 0

        yield Counter()

    def note(self, text: str) -> None:
        self.notes.append(text)


def fetch(hub: LoopbackHub, cache: Path, revision: str | None = None, progress: Any = None, **options: Any) -> Snapshot:
    with pytest.MonkeyPatch.context() as patch:
        use_hub(hub, cache, patch)
        return download(
            options.get("repository", hub.repository),
            revision,
            before_weights=options.get("before_weights", lambda folder: None),
            progress=progress or NoProgress(),
        )


def refusal(hub: LoopbackHub, cache: Path, kind: type[NormistralError], **options: Any) -> NormistralError:
    with pytest.raises(kind) as caught:
        fetch(hub, cache, **options)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


SHARD = "model-00001-of-00002.safetensors"


def test_whole_download_pinned_and_hashed(hub: LoopbackHub, checkpoint: Path, tmp_path: Path) -> None:
    progress = Bytes()
    snapshot = fetch(hub, tmp_path / "cache", progress=progress)
    wanted = {path.name for path in checkpoint.iterdir()} - {"evil.py", "consolidated.safetensors", "training_args.bin"}
    assert {path.name for path in snapshot.folder.iterdir()} == wanted
    assert snapshot.revision == COMMIT
    assert snapshot.hashes == {name: sha256_file(checkpoint / name) for name in wanted}
    assert not any("evil" in line or "consolidated" in line for line in hub.requests)
    assert all(COMMIT in line for line in hub.requests if "resolve" in line)
    done, total = progress.done["Downloading weights"]
    assert done == total == sum(len(data) for name, data in hub.files.items() if name.startswith("model-0"))


def test_second_run_downloads_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path / "cache")
    hub.requests.clear()
    assert fetch(hub, tmp_path / "cache") == first
    assert [line.split()[0:2] for line in hub.requests] == [
        ["GET", f"/api/models/{hub.repository}/revision/main?blobs=true"]
    ]


def test_broken_connections_are_resumed_within_a_run(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.cut[SHARD] = [30_000, 20_000]
    fetch(hub, tmp_path / "cache")
    ranges = [line.split(" ")[2] for line in hub.asked_for(SHARD)]
    assert ranges == ["", "bytes=30000-", "bytes=50000-"]


def test_interrupted_download_is_resumed_by_the_next_run(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "cache/models--norallm--tiny/blobs" / f"{etag_of(hub.files[SHARD])}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(hub.files[SHARD][:12_345])
    with monkeypatch.context() as patched:
        patched.setattr(hub_module.FileDownload, "_receive_part", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(hub, tmp_path / "cache")
    assert partial.stat().st_size == 12_345
    snapshot = fetch(hub, tmp_path / "cache")
    assert [line.split(" ")[2] for line in hub.asked_for(SHARD)] == ["bytes=12345-"]
    assert (snapshot.folder / SHARD).read_bytes() == hub.files[SHARD]


def test_connection_that_always_breaks(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.cut[SHARD] = [10_000] + [0] * 50
    error = refusal(hub, tmp_path / "cache", DownloadError)
    assert f"broke off after 10000 of {len(hub.files[SHARD])} bytes" in error.message
    assert "run the same command again" in error.hint
    hub.cut.clear()
    fetch(hub, tmp_path / "cache")
    assert hub.asked_for(SHARD)[-1].endswith("bytes=10000-")


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_right_size_but_wrong_bytes(hub: LoopbackHub, tmp_path: Path, name: str) -> None:
    data = hub.files[name]
    assert (len(data) >= LARGE_BYTES) == (name == SHARD)
    hub.swapped[name] = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    error = refusal(hub, tmp_path / "cache", DownloadError)
    assert f"{name} has the right size but wrong bytes" in error.message
    assert etag_of(data) not in {path.name for path in (tmp_path / "cache").rglob("*")}
    hub.swapped.clear()
    assert (fetch(hub, tmp_path / "cache").folder / name).read_bytes() == data


def test_cached_file_that_was_changed_since(hub: LoopbackHub, tmp_path: Path) -> None:
    blob = (fetch(hub, tmp_path / "cache").folder / SHARD).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    assert (
        f"{SHARD} has {blob.stat().st_size} bytes instead of" in refusal(hub, tmp_path / "cache", DownloadError).message
    )
    fetch(hub, tmp_path / "cache")


@pytest.mark.parametrize(
    ("status", "kind", "text", "hint"),
    [
        ((401, "RepoNotFound"), ModelNotFoundError, "no repository norallm/tiny", "HF_TOKEN"),
        ((404, "RepoNotFound"), ModelNotFoundError, "no repository norallm/tiny", "check the spelling"),
        ((403, "GatedRepo"), DownloadError, "norallm/tiny is gated", "huggingface-cli login"),
        ((403, ""), DownloadError, "refused norallm/tiny (HTTP 403)", "huggingface-cli login"),
        ((503, ""), DownloadError, "answered HTTP 503", "try again later"),
        ((429, ""), DownloadError, "answered HTTP 429", "try again later"),
    ],
)
def test_refusals(
    hub: LoopbackHub, tmp_path: Path, status: tuple[int, str], kind: type[NormistralError], text: str, hint: str
) -> None:
    hub.status = status
    error = refusal(hub, tmp_path / "cache", kind)
    assert text in error.message
    assert hint in error.hint


def test_no_such_revision_or_id(hub: LoopbackHub, tmp_path: Path) -> None:
    assert "has no revision v9" in refusal(hub, tmp_path, ModelNotFoundError, revision="v9").message
    assert "is no revision" in refusal(hub, tmp_path, UsageError, revision="../../x").message
    assert "no repository norallm/no" in refusal(hub, tmp_path, ModelNotFoundError, repository="norallm/no").message
    assert "is no hub id" in refusal(hub, tmp_path, UsageError, repository="a..b/c").message


def test_revision_by_name(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.revisions = ("v1", COMMIT)
    assert fetch(hub, tmp_path / "cache", "v1").revision == COMMIT
    assert (tmp_path / "cache/models--norallm--tiny/refs/v1").read_text() == COMMIT


def test_offline_with_and_without_a_whole_cache(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    online = fetch(hub, cache)
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    progress = Bytes()
    assert fetch(hub, cache, progress=progress) == online
    assert "HF_HUB_OFFLINE is set: using the cached copy" in progress.notes[0]
    (online.folder / SHARD).unlink()
    assert f"lacks {SHARD}, and HF_HUB_OFFLINE is set" in refusal(hub, cache, DownloadError).message
    assert "is not in the cache" in refusal(hub, tmp_path / "empty", DownloadError).message
    assert len(hub.requests) == asked


def test_connection_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    online = fetch(hub, tmp_path / "cache")
    hub.endpoint = "http://127.0.0.1:9"  # the discard port: nothing listens
    assert fetch(hub, tmp_path / "cache") == online
    error = refusal(hub, tmp_path / "empty", DownloadError)
    assert "no connection to http://127.0.0.1:9" in error.message


def test_offline_cache_with_wrong_bytes(hub: LoopbackHub, tmp_path: Path) -> None:
    blob = (fetch(hub, tmp_path / "cache").folder / SHARD).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    hub.endpoint = "http://127.0.0.1:9"
    assert "wrong bytes" in refusal(hub, tmp_path / "cache", DownloadError).message


def test_disk_that_is_too_small_is_said_before(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    error = refusal(hub, tmp_path / "cache", ResourceError)
    assert "GB free" in error.message
    assert hub.asked_for(SHARD) == []


def test_disk_that_fills_up(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_module.FileDownload, "_receive_part", full)
    assert "the disk filled up" in refusal(hub, tmp_path / "cache", ResourceError).message


def test_unsupported_model_is_refused_before_its_weights(
    hub: LoopbackHub, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed.json"
    shutil.copy(checkpoint / "config.json", changed)
    edit_json(changed, architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
    hub.files["config.json"] = changed.read_bytes()
    use_hub(hub, tmp_path / "cache", monkeypatch)
    with pytest.raises(UnsupportedArchitectureError, match="GPTNeoXForCausalLM"):
        locate(hub.repository, progress=NoProgress())
    assert hub.asked_for(SHARD) == []


def test_an_adapter_beside_the_weights(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged model may keep its adapter's settings; with the adapter itself nobody knows whether it is merged."""
    use_hub(hub, tmp_path / "cache", monkeypatch)
    for name in [name for name in hub.files if name.startswith("model")]:
        del hub.files[name]
    hub.files |= {"adapter_config.json": b'{"peft_type": "LORA"}'}
    with pytest.raises(CheckpointError, match="norallm/tiny is a LoRA adapter, not a whole model"):
        locate(hub.repository, progress=NoProgress())
    hub.files |= {"model.safetensors": b"weights in one file"}
    assert (locate(hub.repository, progress=NoProgress()).path / "model.safetensors").exists()
    hub.files |= {"adapter_model.safetensors": b"an adapter"}
    with pytest.raises(CheckpointError, match="norallm/tiny is a whole model with a LoRA adapter beside it"):
        locate(hub.repository, progress=NoProgress())


def test_index_that_names_a_file_the_repository_lacks(hub: LoopbackHub, tmp_path: Path) -> None:
    del hub.files[SHARD]
    assert f"lacks {SHARD}" in refusal(hub, tmp_path / "cache", CheckpointError).message


def test_downloaded_model_opens_without_hashing_again(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(hub, tmp_path / "cache", monkeypatch)
    located = locate(hub.repository, revision=COMMIT, progress=NoProgress())
    (tmp_path / "workspace").mkdir()
    opened = open_checkpoint(located, tmp_path / "workspace", progress=NoProgress())
    assert opened.unhashed == ()
    source = hash_sources(opened)
    assert (source.kind, source.id, source.revision) == ("hub", hub.repository, COMMIT)
    assert source.files == located.hashes


def test_templates_in_a_folder_of_their_own_are_fetched(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "additional_chat_templates/tool_use.jinja"
    hub.files[name] = b"{{ messages }}"
    hub.files["additional_chat_templates/../../escaped.jinja"] = hub.files["other/folder.jinja"] = b"no"
    fetched = fetch(hub, tmp_path / "cache")
    assert (fetched.folder / name).read_bytes() == b"{{ messages }}"
    assert name in fetched.hashes
    assert sorted(path.name for path in tmp_path.rglob("*.jinja")) == ["tool_use.jinja"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(hub, tmp_path / "cache") == fetched
    (fetched.folder / name).unlink()
    (fetched.folder / name).parent.rmdir()
    (tmp_path / "elsewhere").mkdir()
    (fetched.folder / name).parent.symlink_to(tmp_path / "elsewhere")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "leads out of the cache" in refusal(hub, tmp_path / "cache", DownloadError).message
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_environment_variables_are_honoured(hub: LoopbackHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, in a process of its own, since huggingface_hub reads them at import."""
    code = (
        "from normistral.export.checkpoint.locate import locate; from normistral.progress import NoProgress\n"
        f"print(locate({hub.repository!r}, progress=NoProgress()).path)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "home/hub/models--norallm--tiny/snapshots" / COMMIT)
    assert result.stderr == ""  # no progress bars but ours
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"hub"}  # no id, no log, no second cache
