"""normistral.json as an attacker would write it: what is wrong is an ArtifactError, what is right can be used."""

import copy
import hashlib
import json
import re
import tempfile
from pathlib import Path

import pytest
from fuzzing import examples, hostile_texts, require_readable
from hypothesis import given
from hypothesis import strategies as st
from sample_artifacts import make_manifest
from test_manifest import places, seal

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import (
    MANIFEST_NAME,
    ReasoningMarkers,
    check_files,
    find_problems,
    parse_manifest,
    read_manifest,
    serialise_manifest,
)
from normistral.commands.info import info_document, info_lines
from normistral.errors import ArtifactError, NormistralError
from normistral.runtime.options import resolve_options

FULL = make_manifest(reasoning=ReasoningMarkers("<think>", "</think>", 7, 8), verified="run")
DOCUMENT = json.loads(serialise_manifest(FULL))
PLACES = list(places(DOCUMENT))

numbers = (
    st.integers(-3, 3)
    | st.sampled_from(
        [2**31, 2**40, 2**40 + 1, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, -0.0, float("inf"), float("nan")]
    )
    | st.floats()
)
names = st.sampled_from(
    ["..", ".", "", "a/b", "C:", "a\\b", "x" * 300, "a\nb", "\x1b[2J", "normistral.json", "æøå", "\ud800"]
)
texts = hostile_texts(3) | names | st.sampled_from(["a" * 64, "openvino", "chat", "run", "0-3,7"])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
mutations = st.tuples(st.sampled_from(PLACES), st.sampled_from(["replace", "delete", "add", "rename"]), texts, values)


def mutate(document, place, kind, key, value):
    """One change; a place that an earlier one removed stays as it is."""
    *path, last = place
    try:
        for step in path:
            document = document[step]
        if kind == "replace":
            document[last] = value
        elif kind == "delete":
            del document[last]
        elif kind == "rename":
            document[key] = document.pop(last)
        elif isinstance(document[last], dict):
            document[last][key] = value
        else:
            document[last].append(value)
    except (KeyError, IndexError, TypeError, AttributeError):
        pass


def use(raw):
    """Everything that is done with a manifest before a model is loaded; returns it if it is one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "artifact"
        folder.mkdir()
        (folder / MANIFEST_NAME).write_bytes(raw)
        try:
            manifest = read_manifest(folder)
        except ArtifactError as error:
            require_readable(error)
            return None
        assert parse_manifest(serialise_manifest(manifest)) == manifest
        for thorough in (False, True):
            problems = list(find_problems(folder, manifest, thorough=thorough))
            assert bool(problems) == bool(manifest.files)  # there are no files
            if problems:
                with pytest.raises(ArtifactError):
                    check_files(folder, manifest, thorough=thorough)
        "\n".join(info_lines(folder, manifest))
        json.dumps(info_document(folder, manifest, []))
        try:
            resolve_options(manifest.sampling, {})
            if manifest.template is not None:
                ChatTemplate(manifest.template, TOKENIZER, manifest.reasoning)
        except NormistralError:
            pass
        return manifest


class _NoTokens:
    added_tokens = ()


TOKENIZER = _NoTokens()


@examples(60)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_that_are_no_manifest_are_refused(raw):
    assert use(raw) is None


@examples(150)
@given(st.lists(mutations, min_size=1, max_size=4))
def test_a_forged_manifest_is_refused_or_can_be_used(changes):
    document = copy.deepcopy(DOCUMENT)
    for change in changes:
        mutate(document, *change)
    use(forge(document))


def forge(document):
    """As `seal`, for what JSON can say and UTF-8 cannot: half characters are escaped."""
    try:
        return seal(document)
    except UnicodeEncodeError:
        document["checksum"] = "0" * 64
        raw = json.dumps(document, indent=2).encode()
        return reseal(raw)


def reseal(raw):
    """The right checksum in whatever is there."""
    pattern = re.compile(rb'("checksum": ")([0-9a-f]{64})(")')
    zeros = pattern.sub(rb"\g<1>" + b"0" * 64 + rb"\g<3>", raw, count=1)
    return pattern.sub(rb"\g<1>" + hashlib.sha256(zeros).hexdigest().encode() + rb"\g<3>", raw, count=1)


edits = st.tuples(
    st.integers(0, 2**16),
    st.integers(0, 12),
    st.binary(max_size=12)
    | st.sampled_from(
        [
            b"[" * 5000,
            b'{"a":' * 5000,
            b"1" * 5000,
            b"\\ud800",
            b"\\u0000",
            b"1e999",
            b"-0",
            b"NaN",
            b"\xff",
            b"null",
            b"\xef\xbb\xbf",
        ]
    ),
)


@examples(100)
@given(st.lists(edits, min_size=1, max_size=4))
def test_an_edited_manifest_is_refused_or_can_be_used(changes):
    raw = serialise_manifest(FULL)
    for position, length, insert in changes:
        position %= len(raw) + 1
        raw = raw[:position] + insert + raw[position + length :]
    use(reseal(raw))
