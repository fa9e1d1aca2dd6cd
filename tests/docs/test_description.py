"""The package's description on PyPI: README.md without a link that leads nowhere."""

import email
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def describe():
    spec = importlib.util.spec_from_file_location("description_backend", ROOT / "scripts/build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.describe


def test_links_and_pictures_lead_to_the_tag_of_the_version(describe):
    base = "https://forge.example/owner/normistral"
    text = describe(README, "0.1.0", f"{base}/")
    ours = [link for link in LINK.findall(text) if link.startswith(base)]
    assert {link for link in ours if "/raw/" in link} == {
        f"{base}/raw/v0.1.0/docs/images/{name}" for name in ("chat.svg", "report.png")
    }
    for link in ours:
        assert (ROOT / re.sub(rf"{base}/(raw|blob)/v0.1.0/|#.*", "", link)).exists(), link
    assert len(ours) > 10
    assert all(link.startswith("https://") for link in LINK.findall(text))


def test_without_an_address_no_link_is_left_and_a_line_says_where_the_files_are(describe):
    text = describe(README, "0.1.0", None)
    assert all(link.startswith("https://") for link in LINK.findall(text))
    assert "![" not in text
    assert "[commands]" not in text
    assert " commands " in text
    assert "source distribution" in text


def test_addresses_and_anchors_stay(describe):
    text = "[a](https://a.example/b) [b](#c) [d](mailto:e@f.example)\n"
    assert describe(text, "1", "https://g.example") == text


def test_it_is_in_the_metadata_that_is_built(tmp_path):
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "scripts", source / "scripts")
    (source / "normistral").mkdir()
    shutil.copy(ROOT / "normistral/__init__.py", source / "normistral")
    script = (
        "import sys; sys.path.insert(0, 'scripts'); import build_backend; "
        "print(build_backend.prepare_metadata_for_build_wheel('.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=True, timeout=120
    )
    folder = done.stdout.splitlines()[-1]
    message = email.message_from_bytes((source / folder / "METADATA").read_bytes())
    text = message.get_payload(decode=True).decode()
    assert message["Description-Content-Type"] == "text/markdown"
    assert "source distribution, because\nthe project has no public address yet." in text
    assert "<!--" not in text
