"""The manifest: what goes in comes out, and nothing that was tampered with is believed."""

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_artifacts import BIG_FILE, SMALL_FILE, make_manifest, write_artifact

from normistral.artifact.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    ReasoningMarkers,
    check_files,
    find_problems,
    parse_manifest,
    read_manifest,
    serialise_manifest,
)
from normistral.errors import ArtifactError


def seal(document: dict[str, Any]) -> bytes:
    """JSON text with the right checksum, as somebody would forge it."""
    document["checksum"] = "0" * 64
    raw = json.dumps(document, indent=2, ensure_ascii=False).encode()
    return raw.replace(b'"checksum": "' + b"0" * 64, b'"checksum": "' + hashlib.sha256(raw).hexdigest().encode(), 1)


def forge(**changes: Any) -> bytes:
    return seal(json.loads(serialise_manifest(make_manifest())) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"role": "base", "template": None, "bos_token_id": None, "quality": None},
        {"reasoning": ReasoningMarkers("<think>", "</think>", 7, 8)},
        {"reasoning": ReasoningMarkers("<think>", "</think>")},
    ],
)
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    written = write_artifact(tmp_path / "artifact", **changes)
    assert read_manifest(tmp_path / "artifact") == written


def test_text_is_stored_readably() -> None:
    assert "blåbærsyltetøy".encode() in serialise_manifest(make_manifest())


def test_a_forged_checksum_is_accepted_when_nothing_else_is_wrong() -> None:
    """`seal` works, so that the refusals below are not the checksum's doing."""
    assert parse_manifest(forge()) == make_manifest()


def test_every_flipped_bit_is_found() -> None:
    raw = serialise_manifest(make_manifest())
    for position in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            with pytest.raises(ArtifactError):
                parse_manifest(bytes(flipped))


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -2])
def test_a_truncated_manifest_is_refused(keep: int) -> None:
    raw = serialise_manifest(make_manifest()).rstrip()
    with pytest.raises(ArtifactError):
        parse_manifest(raw[:keep])


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    for raw in (forge(schema_version=SCHEMA_VERSION + 1), b'{"schema_version": 9, "new": "layout"}'):
        with pytest.raises(ArtifactError, match=rf"reads up to {SCHEMA_VERSION}") as caught:
            parse_manifest(raw)
        assert "pip install --upgrade" in caught.value.hint


def test_a_manifest_of_schema_1_is_still_read() -> None:
    """As version 0.1 wrote it: without `graph` and `reasoning`."""
    document = json.loads(serialise_manifest(make_manifest(schema_version=1)))
    del document["recipe"]["graph"], document["reasoning"]
    assert parse_manifest(seal(document)) == make_manifest(schema_version=1)


def test_a_manifest_of_schema_2_is_still_read() -> None:
    document = json.loads(serialise_manifest(make_manifest(schema_version=2)))
    del document["reasoning"]
    assert parse_manifest(seal(document)) == make_manifest(schema_version=2, reasoning=None)


@pytest.mark.parametrize(
    ("reasoning", "complaint"),
    [
        ({"open": "<think>", "close": "</think>", "open_id": 5}, "both tags"),
        ({"open": "<think>", "close": "</think>", "open_id": 5, "close_id": 5}, "same tag"),
        ({"open": "<think>", "close": "<think>"}, "same tag"),
        ({"open": "<think>", "close": "</think>", "open_id": 5, "close_id": 320}, "outside the vocabulary"),
        ({"open": "<think>", "close": ""}, "length"),
        ({"open": "<think>"}, "close"),
    ],
)
def test_impossible_reasoning_markers_are_refused(reasoning: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        parse_manifest(forge(reasoning=reasoning))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"model.bin": {"size": 10**400, "sha256": "a" * 64}}},
        {"sampling": {"top_k": 2**70}},
        {"recipe": {"weights": "int4", "group_size": 10**400}},
        {"recipe": {"weights": "int4", "output_layer_bits": -1}},
    ],
)
def test_numbers_that_nothing_could_have_are_refused(changes: dict[str, Any]) -> None:
    """Found by fuzzing: what a float cannot hold ended `info` in a traceback."""
    with pytest.raises(ArtifactError, match="not a valid manifest"):
        parse_manifest(forge(**changes))


def test_an_older_schema_is_not_taken_for_this_one() -> None:
    with pytest.raises(ArtifactError):
        parse_manifest(forge(schema_version=0))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def parent_of(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


MAPPINGS = {
    ("files",),
    ("tools",),
    ("quality",),
    ("source", "files"),
    ("template", "other_tokens"),
}  # any key is a field there
WRONG: dict[type, list[Any]] = {
    str: [3, True, ["a"], {"a": "b"}],
    int: ["3", 1.5, [1], {"a": 1}, -1, 2**70],
    float: ["0.3", [], {}],
    bool: ["yes", 1, []],
    list: [{}, "text", 3],
    dict: [[], "text", 3],
    type(None): [{}, [], ["a"]],  # a number may be what is missing
}


def mutate(document: dict[str, Any], rng: random.Random) -> str:
    """Break one thing; returns what was broken."""
    everywhere = list(places(document))
    kind = rng.choice(["wrong type", "unknown field", "missing field", "bad name", "bad value"])
    if kind == "wrong type":
        path = rng.choice(everywhere)
        parent = parent_of(document, path)
        parent[path[-1]] = rng.choice(WRONG[type(parent[path[-1]])])
    elif kind == "unknown field":
        structs = [()] + [p for p in everywhere if p not in MAPPINGS and isinstance(parent_of(document, (*p, 0)), dict)]
        path = rng.choice(structs)
        parent_of(document, (*path, ""))[rng.choice(["auto_map", "trust_remote_code", "extra", ""])] = "x.y"
    elif kind == "missing field":
        path = (rng.choice(["format", "source", "architecture", "stop_token_ids", "files", "recipe", "sampling"]),)
        del document[path[0]]
    elif kind == "bad name":
        bad = ["../x", "/etc/passwd", "a/../../x", "..", "", "C:\\x", "a\\..\\b", "nul\x00", "c:x", "."]
        path = ("files", rng.choice(bad))
        document["files"][path[1]] = {"size": 1, "sha256": "c" * 64}
    else:
        path, value = rng.choice(
            [
                (("stop_token_ids",), []),
                (("stop_token_ids",), [320]),
                (("stop_token_ids",), list(range(100))),
                (("bos_token_id",), 320),
                (("context_length",), 0),
                (("context_length",), 10**15),
                (("architecture", "hidden_size"), 0),
                (("architecture", "vocabulary"), 2**50),
                (("sampling", "top_p"), 1.5),
                (("sampling", "temperature"), -0.5),
                (("files", SMALL_FILE, "sha256"), "Z" * 64),
                (("files", SMALL_FILE, "size"), -1),
                (("format",), "pickle"),
                (("role",), "admin"),
                (("schema_version",), -1),
                (("template", "origin"), "internet"),
            ]
        )
        parent_of(document, path)[path[-1]] = value
    return f"{kind} at {path}"


@pytest.mark.parametrize("seed", range(200))
def test_mutations_with_a_right_checksum_are_refused(seed: int) -> None:
    document = copy.deepcopy(json.loads(serialise_manifest(make_manifest())))
    del document["checksum"]
    print(mutate(document, random.Random(seed)))  # seen when it was accepted
    with pytest.raises(ArtifactError, match=r"^[^\n]+\Z"):
        parse_manifest(seal(document))


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"text"', b"[" * 100_000, b"\xff\xfe", b'{"schema_version": "1"}'])
def test_other_documents_are_refused(raw: bytes) -> None:
    with pytest.raises(ArtifactError):
        parse_manifest(raw)


@pytest.mark.parametrize("wrap", [lambda document: [document], lambda document: {"inner": document}])
def test_a_checksum_in_the_wrong_place_is_refused(wrap: Callable[[Any], Any]) -> None:
    raw = json.dumps(wrap({"checksum": "0" * 64})).encode()
    with pytest.raises(ArtifactError, match="is not a valid manifest"):
        parse_manifest(raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode()))


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a whole artifact") as caught:
        read_manifest(tmp_path)
    assert "normistral export" in caught.value.hint


def test_a_manifest_that_is_a_link_or_a_folder_or_huge_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "real")
    for name in ("link", "folder", "huge"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / MANIFEST_NAME).symlink_to(tmp_path / "real" / MANIFEST_NAME)
    (tmp_path / "folder" / MANIFEST_NAME).mkdir()
    with (tmp_path / "huge" / MANIFEST_NAME).open("wb") as file:
        file.truncate(2**40)
    for name in ("link", "folder", "huge"):
        with pytest.raises(ArtifactError):
            read_manifest(tmp_path / name)


def flip_last_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (SMALL_FILE, Path.unlink, "is missing"),
    (BIG_FILE, Path.unlink, "is missing"),
    ("tokens.txt", lambda path: path.write_text("æ"), "bytes instead of"),
    (BIG_FILE, lambda path: os.truncate(path, 17 * 2**20 - 1), "bytes instead of"),
    (SMALL_FILE, flip_last_bit, "was changed after the export"),
    ("tokens.txt", flip_last_bit, "was changed after the export"),
    (SMALL_FILE, replace_by_link, "is not a regular file"),
    (BIG_FILE, replace_by_link, "is not a regular file"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_found_at_load(tmp_path: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "artifact"
    manifest = write_artifact(folder)
    check_files(folder, manifest, thorough=False)
    damage(folder / name)
    with pytest.raises(ArtifactError, match=message) as caught:
        check_files(folder, manifest, thorough=False)
    assert name in caught.value.message


def test_a_changed_large_file_is_found_by_the_thorough_check(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "artifact")
    check_files(tmp_path / "artifact", manifest, thorough=True)
    flip_last_bit(tmp_path / "artifact" / BIG_FILE)
    check_files(tmp_path / "artifact", manifest, thorough=False)
    with pytest.raises(ArtifactError, match=BIG_FILE):
        check_files(tmp_path / "artifact", manifest, thorough=True)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "artifact")
    (tmp_path / "artifact" / SMALL_FILE).unlink()
    flip_last_bit(tmp_path / "artifact" / BIG_FILE)
    problems = list(find_problems(tmp_path / "artifact", manifest, thorough=True))
    assert len(problems) == 2
