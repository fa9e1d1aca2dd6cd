"""Sampling settings as people write them into generation_config.json: what they mean, or a note that names them."""

import json

import pytest

from normistral.artifact.manifest import SamplingDefaults
from normistral.export.checkpoint.generation_config import read_sampling_defaults
from normistral.runtime.options import resolve_options

OURS = SamplingDefaults(temperature=1.0, top_k=50)


def read(text):
    """The settings of a file that samples, and the notes on them."""
    notes = []
    return read_sampling_defaults(json.loads('{"do_sample": true, ' + text + "}"), notes.append), notes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"top_k": -1', SamplingDefaults(temperature=1.0, top_k=0)),
        ('"top_k": 0', SamplingDefaults(temperature=1.0, top_k=0)),
        ('"top_k": 40.0', SamplingDefaults(temperature=1.0, top_k=40)),
        ('"top_p": 0.0', SamplingDefaults(temperature=1.0, top_k=1)),
        ('"top_p": 0, "top_k": 64', SamplingDefaults(temperature=1.0, top_k=1)),
        ('"top_p": 1.0000001', OURS),
        ('"top_p": 1', SamplingDefaults(temperature=1.0, top_k=50, top_p=1.0)),
        ('"temperature": 0', SamplingDefaults(temperature=0.0, top_k=50)),
        ('"temperature": null, "min_p": null, "top_k": null, "top_p": null, "repetition_penalty": null', OURS),
        *((f'"{name}": {value}', OURS) for name, value in [
            ("top_k", -2), ("top_k", '"40"'), ("top_k", "true"), ("top_k", 2.5), ("top_k", "1e999"), ("top_k", 10**400),
            ("top_p", -0.1), ("top_p", '"0.9"'), ("top_p", "NaN"), ("temperature", -1), ("temperature", "1e999"),
            ("temperature", 10**400), ("min_p", -0.1), ("min_p", 1.5), ("min_p", "[]"), ("repetition_penalty", 0),
            ("repetition_penalty", -1), ("max_new_tokens", -1), ("max_new_tokens", 0), ("max_new_tokens", '"many"'),
        ]),
    ],
)  # fmt: skip
def test_odd_values_stop_no_export(text, expected):
    found, notes = read(text)
    assert found == expected
    resolve_options(found, {})  # what an artifact gets can be used
    name = json.loads("{" + text + "}").popitem()[0]
    for note in notes:
        assert name in note
        assert len(note) < 200


def test_what_is_translated_or_left_out_is_named_with_its_value():
    assert read('"top_k": -1')[1] == ["generation_config.json: top_k is -1, which means all tokens, as in vLLM"]
    (note,) = read('"max_new_tokens": -1')[1]
    assert note == "generation_config.json: max_new_tokens is -1, not a whole number of at least 1: it is left out"
    assert read('"top_k": 64, "top_p": 0.9, "temperature": 0.3, "min_p": 0.1')[1] == []


def test_filters_of_a_greedy_file_are_not_looked_at():
    notes = []
    written = {"do_sample": False, "top_k": -7, "top_p": "x", "temperature": -1, "max_new_tokens": 9}
    assert read_sampling_defaults(written, notes.append) == SamplingDefaults(max_new_tokens=9)
    assert notes == []


def test_an_export_keeps_the_note(tmp_path):
    from test_checkpoint import edit_json, open_folder
    from tiny_models import make_mistral

    folder = make_mistral(tmp_path / "checkpoint")
    edit_json(folder / "generation_config.json", do_sample=True, top_k=-1, top_p=0.0)
    checkpoint = open_folder(folder, tmp_path / "workspace")
    assert checkpoint.sampling.top_k == 1
    written = json.loads((checkpoint.folder / "generation_config.json").read_text())
    assert (written["top_k"], written.get("top_p")) == (1, None)
    assert any("top_p is 0.0" in note for note in checkpoint.notes)
