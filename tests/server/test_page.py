"""The chat page as a file; what it does in a browser is tried by `make test-browser`."""

import base64
import hashlib
import re
import tomllib
from pathlib import Path

import pytest

from normistral.server.public_routes import load_page

PAGE = load_page()
HTML = PAGE.body.decode()


def test_the_page_belongs_to_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "server/page.html" in project["tool"]["setuptools"]["package-data"]["normistral"]


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_names_what_is_in_the_page_by_its_hash(tag):
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = dict(part.split(" ", 1) for part in PAGE.headers["content-security-policy"].split("; "))
    assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_the_page_is_complete_in_itself():
    assert re.findall(r"https?://[^\s'\"]+", HTML) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    linked = re.findall(r"""\s(?:src|href)\s*=\s*["']?([^"'\s>]*)""", HTML)
    assert all(link.startswith(("#", "data:")) for link in linked)


@pytest.mark.parametrize(
    "risky", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "localStorage"]
)
def test_texts_cannot_become_markup_and_nothing_outlives_the_tab(risky):
    assert risky not in HTML


def test_there_are_no_inline_handlers_or_styles_that_the_policy_would_block():
    body = HTML.partition("<body>")[2].partition("<script>")[0]
    assert not re.search(r"\s(on\w+|style)=", body)


def test_the_server_answers_with_the_page_and_its_policy():
    from fastapi.testclient import TestClient

    from normistral.server.app import create_app

    answer = TestClient(create_app([])).get("/")  # no `with`: no worker is started
    assert answer.content == PAGE.body
    assert PAGE.headers.items() <= dict(answer.headers).items()
