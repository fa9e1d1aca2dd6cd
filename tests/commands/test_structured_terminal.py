"""Structured answers at the command line."""

import json

import jsonschema
import pytest
from scripted_cli import make_artifact
from test_cli import require_two_lines, run

from normistral.cli import main
from normistral.commands.answer import read_structure
from normistral.commands.options import StructureArgs

SCHEMA = {
    "type": "object",
    "properties": {"by": {"enum": ["Tromsø", "Ålesund"]}, "antall": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["by", "antall"],
    "additionalProperties": False,
}


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "scripted")


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "skjema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    return path


def test_the_structured_answer_alone_is_on_stdout(tmp_path, artifact, schema):
    done = run(tmp_path, "chat", artifact, "--prompt", "Hvor mange?", "--json-schema", schema)
    assert (done.returncode, done.stderr) == (0, b"")
    jsonschema.validate(json.loads(done.stdout), SCHEMA)
    done = run(tmp_path, "generate", artifact, "--prompt", "Ja?", "--choice", "blåbær", "--choice", "tyttebær")
    assert done.stdout.decode() in ("blåbær\n", "tyttebær\n")


def test_an_answer_that_is_not_whole_ends_with_1(tmp_path, artifact, schema):
    for command in ("chat", "generate"):
        done = run(tmp_path, command, artifact, "--prompt", "x", "--json-schema", schema, "--max-new-tokens", "4")
        message, hint = require_two_lines(done.stderr.decode())
        assert (done.returncode, done.stdout) == (1, b'{"by\n')
        assert message == "the answer is cut off before it was whole: --max-new-tokens was reached"
        assert "--max-new-tokens" in hint
    as_json = run(tmp_path, "chat", artifact, "--prompt", "x", "--regex", "å{9}", "--max-new-tokens", "4", "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--choice", "ja", "--regex", "a"], "--regex and --choice cannot be given together"),
        (["--regex", "(a"], "the regex cannot be used: unclosed group"),
        (["--regex", ""], "the regex is empty"),
        (["--choice", ""], "a choice needs texts that are not empty"),
        (["--json-schema", "nei.json"], "cannot read --json-schema nei.json: No such file or directory"),
        (["--grammar", "."], "cannot read --grammar .: it is a folder, not a file"),
    ],
)
def test_wrong_structures_are_refused_before_a_model_is_looked_for(monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "no such model", "--prompt", "x", *options]) == 2
    assert require_two_lines(capsys.readouterr().err)[0] == message


def test_files_are_utf8_and_of_a_size(tmp_path):
    path = tmp_path / "grammatikk.lark"
    path.write_text('start: "blåbær"', encoding="utf-8-sig")
    assert read_structure(StructureArgs(grammar=path)).text == 'start: "blåbær"'
    path.write_bytes('start: "blåbær"'.encode("latin-1"))
    with pytest.raises(Exception, match="is not UTF-8: byte 0xe5 at position 10"):
        read_structure(StructureArgs(grammar=path))
    path.write_text("#" * 100_000)
    with pytest.raises(Exception, match="larger than 65,536 bytes"):
        read_structure(StructureArgs(grammar=path))
    assert read_structure(StructureArgs()) is None
