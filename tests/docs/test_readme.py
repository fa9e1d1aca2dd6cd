"""The code of both READMEs and of docs/library.md runs as it stands."""

import re
from pathlib import Path

import pytest

from normistral.artifact.manifest import read_manifest

ROOT = Path(__file__).parents[2]


def python_block(name: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    return code


@pytest.mark.parametrize("name", ["README.md", "docs/library.md"])
def test_the_python_example_runs(name, demo_int4, monkeypatch, capsys):
    monkeypatch.chdir(demo_int4.parent.parent)
    exec(compile(python_block(name), name, "exec"), {})
    printed = capsys.readouterr().out
    assert "Oslo" in printed
    assert ("tokens left" in printed) == (name == "docs/library.md")


def test_the_demos_answers_end_by_themselves(demo_int4):
    assert read_manifest(demo_int4).sampling.max_new_tokens == 256


def test_both_readmes_show_the_same_code():
    assert python_block("README.nb.md") == python_block("README.md")


@pytest.mark.parametrize("name", ["GenerationConfig", "NormistralError", "load"])
def test_public_names_of_the_documents_exist(name):
    import normistral

    assert f"normistral.{name}" in (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert getattr(normistral, name)
