"""The README's code runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(demo_int4, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(demo_int4.parent.parent)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Oslo" in printed
    assert "tokens left" in printed


def test_the_make_targets_are_there():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert {"chat", "test", "check"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("name", ["GenerationConfig", "NormistralError", "load"])
def test_public_names_of_the_readme_exist(name):
    import normistral

    assert f"normistral.{name}" in README
    assert getattr(normistral, name)
