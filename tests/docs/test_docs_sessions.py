"""The code in docs/sessions.md runs as it stands, on scripted models."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from scripted_cli import HELPERS, make_artifact
from scripted_models import make_base_model, make_model

from normistral.artifact.store import default_output
from normistral.export.recipe import Recipe
from normistral.runtime.sessions import open_session

SESSIONS = (HELPERS.parents[1] / "docs" / "sessions.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", SESSIONS, re.DOTALL)
(SHELL,) = re.findall(r"```sh\n(.*?)```", SESSIONS, re.DOTALL)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example on models that `make` makes; those models, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(code, make):
        models = []

        def load(artifact):
            models.append(make())
            return models[-1]

        monkeypatch.setattr("normistral.load", load)
        exec(compile("import normistral\n" + code, "docs/sessions.md", "exec"), {})
        return models, capsys.readouterr().out

    return run


def test_a_document_is_computed_once_and_not_again_in_the_second_process(run, tmp_path):
    models, printed = run(PYTHON[0], lambda: make_base_model(tmp_path / "m", [" Ny skole.\nMer"], after="Svar:"))
    assert printed == "Hva skal bygges? Ny skole.\nNår er den ferdig? Ny skole.\nNy skole.\n"
    with open_session(tmp_path / "vedtak.session") as session:
        document = session.header.prefix
    first, second = (sum(map(len, model._backend.forwarded)) for model in models)
    assert len(document.encode()) < first < 2 * len(document.encode()) + 100
    assert second < len(document.encode())


def test_forks_answer_by_themselves_and_the_chat_goes_on(run, tmp_path):
    _, printed = run(PYTHON[1], lambda: make_model(tmp_path / "m", ["Ja.", "Ny skole."], context_length=800))
    assert printed == "['Ny skole.', 'Ny skole.'] Ny skole.\n"


def test_the_shell_lines_continue_a_session(tmp_path):
    (name,) = set(re.findall(r"normistral chat (\S+)", SHELL))
    make_artifact(tmp_path / "artifacts" / name)
    settings = json.dumps({"folder": str(tmp_path), "answers": ["En skole.", "I 2029."]})
    normistral = shlex.join([sys.executable, str(HELPERS / "scripted_cli.py"), settings])
    done = subprocess.run(
        ["sh", "-c", f'normistral() {{ {normistral} "$@"; }}\n{SHELL}'],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"NORMISTRAL_HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stdout.decode()) == (0, "En skole.\nI 2029.\n")
    with open_session(tmp_path / "samtale.session") as session:
        assert len(session.header.messages) == 4


def test_its_artifacts_are_those_that_exports_make():
    names = set(re.findall(r'load\("(\S+?)"\)|normistral chat (\S+)', SESSIONS))
    expected = {default_output(preset, Recipe().weights, "openvino").name for preset in ("7b-warm", "7b-warm-instruct")}
    assert {a or b for a, b in names} == expected
