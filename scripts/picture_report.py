"""Take the picture of a benchmark's report for the READMEs: the top of a real one, in a headless Chromium.

python scripts/picture_report.py ARTIFACT docs/images/report.png [speed.html]

Measures ARTIFACT with `normistral bench --quick`, unless a report is given. CHROMIUM names the browser if it is none
of those on PATH. Needs no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH, HEIGHT = 1080, 716
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")


def find_browser() -> str:
    """The path of a Chromium."""
    for name in (os.environ.get("CHROMIUM", ""), *BROWSERS):
        if name and (found := shutil.which(name)):
            return found
    raise SystemExit("error: no Chromium found\nhint: install one (on Debian: apt install chromium) or set CHROMIUM")


def main() -> None:
    """Measure, and draw the page."""
    artifact, output, *given = sys.argv[1:]
    browser = find_browser()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(given[0]).resolve() if given else Path(scratch, "speed.html")
        if not given:
            program = Path(sys.executable).with_name("normistral")
            subprocess.run([program, "bench", artifact, "--quick", "--report", report], check=True, stdout=sys.stderr)
        command = [browser, *SWITCHES, f"--user-data-dir={scratch}/profile", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run(
            [*command, f"--screenshot={Path(output).resolve()}", report.as_uri()],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
        )


if __name__ == "__main__":
    main()
