"""Every block of code in the documents runs, in the order in which it stands, on a tiny model under the names shown.

A block's language says what it is: `sh` (a script), `console` (commands behind `$ `, and what they print), `python`
(the blocks of a document share their names); `text`, `json`, `yaml` and `mermaid` are not run. A comment on the line
before a block says what is different about it:

    <!-- not run: REASON -->                needs a network, root, hours, ...
    <!-- run by test_NAME.py: REASON -->    or `make TARGET`
    <!-- server -->                         started, asked, and ended by SIGTERM
    <!-- exit code 1 -->
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_models import make_llama, write_json

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples/README.md", ROOT / "benchmarks/README.md"]
)
BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>.*?) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.M | re.S
)
RUN = ("sh", "console", "python")
NOT_CODE = ("text", "json", "yaml", "mermaid")
# The names of artifacts in the documents. Those of the demo model are in ./artifacts, too.
NAMES = ("ARTIFACT", "demo-openvino-int4", "7b-warm-openvino-int4", "7b-warm-instruct-openvino-int4")


class Block(NamedTuple):
    place: str
    language: str
    code: str
    marker: str

    @property
    def elsewhere(self):
        return re.match(r"not run: |run by ", self.marker)


def blocks_of(path):
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.M)
        yield Block(f"{path.relative_to(ROOT)}:{line}", found["language"], code, found["marker"] or "")


BLOCKS = {str(path.relative_to(ROOT)): list(blocks_of(path)) for path in DOCUMENTS}
RUN_HERE = [name for name, blocks in BLOCKS.items() if any(one.language in RUN and not one.elsewhere for one in blocks)]


def test_every_block_is_found_and_its_language_is_known():
    for path in DOCUMENTS:
        blocks = BLOCKS[str(path.relative_to(ROOT))]
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks), path
        assert [one.place for one in blocks if one.language not in (*RUN, *NOT_CODE)] == []
        assert re.findall(r"^ {4,}(?:\$ )?normistral \w+ .*", re.sub(BLOCK, "", text), re.M) == [], "not in a block"


@pytest.mark.parametrize(
    "block", [one for found in BLOCKS.values() for one in found if one.marker], ids=lambda b: b.place
)
def test_a_marker_says_why_a_block_is_not_run_here_and_who_runs_it(block):
    assert block.language in RUN
    if block.elsewhere:
        (who,) = re.fullmatch(r"(?:not run|run by (.*?)): .{8,}", block.marker).groups()
        if who and who.startswith("make "):
            assert re.search(rf"^{who.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.M), who
        elif who:
            (found,) = (ROOT / "tests").rglob(who)
            document = Path(block.place.partition(":")[0])
            named = document.name if document.parent.name == "docs" else document.parent.name
            assert named in found.read_text(encoding="utf-8"), f"{who} does not read {document}"
    else:
        assert re.fullmatch(r"server|exit code \d", block.marker), block.marker


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny chat model with room for the documents' prompts, whose answers end after 300 tokens."""
    from normistral import export_model

    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = make_llama(folder / "checkpoint", positions=4096)
    stated = json.loads((checkpoint / "generation_config.json").read_text())
    write_json(checkpoint / "generation_config.json", stated | {"max_new_tokens": 300})
    export_model(str(checkpoint), folder / "artifact", weights="int8", verify=False)
    return folder / "artifact"


@pytest.fixture
def workspace(tiny, tmp_path, monkeypatch):
    """The current folder of a reader who has done what the documents presuppose."""
    for name in NAMES:
        shutil.copytree(tiny, tmp_path / "home/artifacts" / name, copy_function=os.link)
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(tiny, tmp_path / "artifacts/demo-openvino-int4", copy_function=os.link)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/one.txt").write_text("God morgen.")
    (tmp_path / "letters.jsonl").write_text('{"id": "a", "text": "Good morning."}\n')
    for name in ("letters.txt", "reports.txt"):
        (tmp_path / name).write_text("January, February, March, April, May. " * 20)
    (schema,) = (one.code for one in BLOCKS["docs/structured.md"] if one.language == "json")
    (tmp_path / "person.json").write_text(schema)
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script_of(block):
    if block.language == "sh":
        return block.code
    return "\n".join(re.findall(r"^\$ ((?:.*\\\n)*.*)$", block.code, re.M))


def run_script(block):
    code = int(block.marker.removeprefix("exit code ") or 0)
    done = subprocess.run(
        ["sh", "-ec", script_of(block)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, f"{block.place}: {done.stdout}{done.stderr}"


def run_server(block):
    """On a free port, so that several can run at once."""
    script = re.sub(r"\bnormistral serve", "exec normistral serve --port 0 --json", script_of(block))
    with subprocess.Popen(["sh", "-ec", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
                assert answer.status == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, block.place


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_blocks_run(name, workspace):
    names = {}
    for block in BLOCKS[name]:
        if block.language not in RUN or block.elsewhere:
            continue
        if block.language == "python":
            exec(compile(block.code, block.place, "exec"), names)
        elif block.marker == "server":
            run_server(block)
        else:
            run_script(block)
