"""A real browser, and pages in it that are watched: for errors, and for requests to anywhere else."""

import os
import shutil
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESKTOP, PHONE, NARROW = ({"width": w, "height": h} for w, h in ((1280, 800), (390, 844), (360, 640)))


def find_chromium() -> str:
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else NAMES)), None)
    if found is None:
        wanted = named or " or ".join(NAMES)
        pytest.exit(
            f"error: these tests need a Chromium; there is no {wanted}\n"
            "hint: install one (on Debian the package chromium), or name it: CHROMIUM=/path/to/it make test-browser",
            returncode=1,
        )
    return found


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.exit("error: these tests need playwright\nhint: run them with `make test-browser`", returncode=1)
    with sync_playwright() as playwright:  # every start has a user directory of its own
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; at the end there must have been no error, and no request to another host."""
    contexts, foreign, errors = [], [], []

    def open_(url, viewport=DESKTOP, locale="nb-NO", **options):
        context = browser.new_context(viewport=viewport, locale=locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: foreign.append(request.url) if is_foreign(request.url, url) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if is_ours(message) else None)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not foreign
    assert not errors


def is_foreign(requested, url) -> bool:
    """Whether it leaves for another host; the icon is in the page itself."""
    return urlsplit(requested).scheme != "data" and urlsplit(requested).netloc != urlsplit(url).netloc


def is_ours(message) -> bool:
    """Chromium itself reports answers such as 401, and connections that broke, as errors."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")
