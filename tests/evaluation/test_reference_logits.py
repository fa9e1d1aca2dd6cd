"""Predictions on disk: what they lose, and that a file is either right, unfinished, or refused."""

import dataclasses
import json

import numpy as np
import pytest

from normistral.errors import ArtifactError, ResourceError
from normistral.evaluation import reference_logits
from normistral.evaluation.metrics import kl_divergences
from normistral.evaluation.reference_logits import ReferenceFile, ReferenceKey
from normistral.evaluation.windows import choose_windows, cut
from normistral.runtime.sampling import log_softmax

VOCABULARY = 50
SETTINGS = choose_windows("sliding", 8, None, context_length=64, bos_id=None)
WINDOWS = cut(np.random.default_rng(0).integers(0, VOCABULARY, 40).tolist(), SETTINGS)
KEY = ReferenceKey("a" * 64, "b" * 64, "checkpoint " + "c" * 64, SETTINGS, VOCABULARY)
ROW_BYTES = 2 * VOCABULARY + 16


def logits_of(window):
    noise = np.random.default_rng([*window.token_ids])
    return noise.normal(0, 3, (window.scored, VOCABULARY)).astype(np.float32)


def write(path, windows=WINDOWS, key=KEY, stop_after=None):
    with ReferenceFile(path, key, windows) as file:
        for window in list(file.missing)[:stop_after]:
            file.append(logits_of(window))
        return file.finished


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "one.reference"


def test_what_is_read_is_what_was_written(path):
    write(path)
    with ReferenceFile(path, KEY, WINDOWS) as file:
        assert not file.missing
        for index, window in enumerate(WINDOWS):
            rows, logits = file.read(index), logits_of(window)
            exact = log_softmax(logits)
            assert np.abs(rows.log_probabilities - exact).max() < 32 / 2**16
            np.testing.assert_allclose(np.exp(rows.log_probabilities).sum(axis=1), 1.0, rtol=1e-12)
            np.testing.assert_allclose(rows.nll, -exact[range(window.scored), window.targets], rtol=1e-7)
            assert rows.likeliest.tolist() == logits.argmax(axis=1).tolist()
            assert kl_divergences(rows.log_probabilities, logits).max() < 1e-7


def test_a_token_takes_two_bytes_for_each_of_the_vocabulary_and_sixteen(path):
    write(path)
    scored = sum(window.scored for window in WINDOWS)
    assert path.stat().st_size == len(KEY.header()) + scored * ROW_BYTES + 32 * len(WINDOWS)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 200.0])
def test_flat_and_steep_predictions_survive(path, spread):
    """All tokens alike; nearly so; and logits far below the 32 nats that are kept."""
    window = WINDOWS[0]
    logits = np.tile(np.linspace(0, -spread, VOCABULARY, dtype=np.float32), (window.scored, 1))
    with ReferenceFile(path, KEY, [window]) as file:
        file.append(logits)
        rows = file.read(0)
    assert kl_divergences(rows.log_probabilities, logits).max() < 1e-7
    expected = np.maximum(log_softmax(logits), log_softmax(logits).max() - 32)
    np.testing.assert_allclose(rows.log_probabilities, expected, atol=32 / 2**16)


@pytest.mark.parametrize("finished", [0, 1, 4])
def test_a_run_that_stopped_between_windows_goes_on_to_the_same_bytes(path, tmp_path, finished):
    write(tmp_path / "whole")
    assert write(path, stop_after=finished) == finished
    assert write(path) == len(WINDOWS)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_run_that_was_cut_off_anywhere_goes_on_to_the_same_bytes(path):
    write(path)
    whole = path.read_bytes()
    header = len(KEY.header())
    for size in (0, 1, header - 1, header, header + 1, header + 300, len(whole) // 2, len(whole) - 33, len(whole) - 1):
        path.write_bytes(whole[:size])
        with ReferenceFile(path, KEY, WINDOWS) as file:
            assert file.finished < len(WINDOWS)
            assert path.stat().st_size <= max(size, header)
        write(path)
        assert path.read_bytes() == whole


def test_a_shorter_run_leaves_the_rest_of_the_file_alone(path):
    write(path)
    whole = path.read_bytes()
    with ReferenceFile(path, KEY, WINDOWS[:2]) as file:
        assert (file.finished, list(file.missing)) == (2, [])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("place", ["header", "rows", "digest", "last"])
def test_a_changed_bit_is_found_and_nothing_is_overwritten(path, place):
    write(path)
    damaged = bytearray(path.read_bytes())
    header, first = len(KEY.header()), WINDOWS[0].scored * ROW_BYTES
    at = {"header": 40, "rows": header + 100, "digest": header + first + 5, "last": len(damaged) - 40}[place]
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"one\.reference was changed: ") as caught:
        ReferenceFile(path, KEY, WINDOWS)
    assert "delete it to have it computed again" in caught.value.hint
    assert path.read_bytes() == damaged


def test_windows_that_changed_places_are_found(path):
    write(path)
    whole, header = path.read_bytes(), len(KEY.header())
    size = WINDOWS[1].scored * ROW_BYTES + 32
    assert WINDOWS[1].scored == WINDOWS[2].scored
    start = header + WINDOWS[0].scored * ROW_BYTES + 32
    first, second = whole[start : start + size], whole[start + size : start + 2 * size]
    path.write_bytes(whole[:start] + second + first + whole[start + 2 * size :])
    with pytest.raises(ArtifactError, match="the rows of window 1 do not fit their hash"):
        ReferenceFile(path, KEY, WINDOWS)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"text_sha256": "d" * 64}, "belongs to another text"),
        ({"tokenizer_sha256": "d" * 64}, "belongs to another tokenizer"),
        ({"source": "artifact"}, "belongs to another reference model"),
        ({"windows": dataclasses.replace(SETTINGS, stride=2)}, "belongs to other windows"),
        ({"vocabulary": 51}, "belongs to another vocabulary"),
        ({"text_sha256": "d" * 64, "source": "artifact"}, "belongs to another text, another reference model"),
    ],
)
def test_the_file_of_something_else_is_refused_by_name(path, changes, what):
    other = dataclasses.replace(KEY, **changes)
    assert other.file_name() != KEY.file_name()
    write(path)
    whole = path.read_bytes()
    with pytest.raises(ArtifactError, match=what):
        ReferenceFile(path, other, WINDOWS)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"my diary\n", b"{}\n", b"[1, 2]\n" * 200, bytes(2000), b"\xff" * 2000])
def test_a_file_of_another_kind_is_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is no file of reference predictions"):
        ReferenceFile(path, KEY, WINDOWS)
    assert path.read_bytes() == content


def test_the_header_says_what_the_file_belongs_to(path):
    write(path, stop_after=0)
    header = json.loads(path.read_bytes())
    assert header["text_sha256"] == KEY.text_sha256
    assert header["windows"] == {"convention": "sliding", "length": 8, "stride": 4, "bos_id": None}


def test_two_writers_are_noticed(path):
    with ReferenceFile(path, KEY, WINDOWS) as first, ReferenceFile(path, KEY, WINDOWS) as second:
        first.append(logits_of(WINDOWS[0]))
        with pytest.raises(ArtifactError, match="is being written by another process"):
            second.append(logits_of(WINDOWS[0]))


def test_a_disk_without_room_is_an_error_before_the_work(path, monkeypatch):
    needed = sum(window.scored for window in WINDOWS) * ROW_BYTES + 32 * len(WINDOWS)
    monkeypatch.setattr(reference_logits, "free_disk_bytes", lambda path: needed - 1)
    with pytest.raises(ResourceError, match="the reference's predictions need"):
        ReferenceFile(path, KEY, WINDOWS)
    monkeypatch.setattr(reference_logits, "free_disk_bytes", lambda path: needed)
    assert write(path) == len(WINDOWS)
