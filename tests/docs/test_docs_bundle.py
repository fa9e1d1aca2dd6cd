"""What docs/bundle.md says to type on the other machine works as it stands; the unit file is one that systemd reads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_cli import HELPERS

from normistral.bundle import install

DOCS = HELPERS.parents[1] / "docs"
TEXT = (DOCS / "bundle.md").read_text(encoding="utf-8")


def test_the_commands_on_the_machine_install(signed_bundle, tmp_path):
    (code,) = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    shutil.copy(signed_bundle, tmp_path / "normistral-int4.tar")
    shutil.copy(f"{signed_bundle}.sig", tmp_path / "normistral-int4.tar.sig")
    public = (signed_bundle.parent / "signers").read_text().partition("ssh-ed25519")[2]
    (shown,) = re.findall(r"^(release@example\.no .*) ssh-ed25519 \S+$", TEXT, re.MULTILINE)
    (tmp_path / "allowed_signers").write_text(f"{shown} ssh-ed25519{public}")
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"  # python3 is the one that runs the tests
    environment = kept | {"HOME": str(tmp_path / "home"), "PATH": path}
    done = subprocess.run(
        ["sh", "-ec", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (printed,) = re.findall(r"```(?:text)?\n(Good .*?)```", TEXT, re.DOTALL)
    for line in printed.splitlines():
        start = re.match(
            r'Good "normistral-bundle" signature|checking|signed by|unpacking|making|trying|installed;', line
        )
        if start:
            assert start[0] in done.stdout + done.stderr
    assert (tmp_path / "home/.local/share/normistral/bin/normistral").is_file()


def test_what_it_says_is_in_a_bundle_is(signed_bundle):
    (listed,) = re.findall(r"\$ tar -tf normistral-int4\.tar\n(.*?)```", TEXT, re.DOTALL)
    names = [line.split()[0].partition("…")[0] for line in listed.splitlines()]
    found = subprocess.run(
        ["tar", "-tf", signed_bundle], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found[:4] == names[:4]
    assert all(name.startswith(tuple(names[4:])) for name in found[4:])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_reads_the_unit(tmp_path):
    unit = (DOCS / "normistral.service").read_text()
    path = tmp_path / "normistral.service"
    path.write_text(unit.replace("/opt/normistral/bin/normistral", shutil.which("true")))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_that_the_recipes_name_exist(signed_bundle, tmp_path):
    subprocess.run(["tar", "-xf", signed_bundle, "install.py"], cwd=tmp_path, check=True)
    shown = subprocess.run(
        [sys.executable, "install.py", "--help"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    container = (DOCS / "Containerfile").read_text()
    installing = re.findall(r"(?<= )--[a-z0-9-]+", container.partition("install.py")[2].partition("\nFROM")[0])
    assert {"--sha256", "--prefix"} <= set(installing)
    assert all(option in shown for option in installing)


def test_every_documented_command_keeps_foreign_modules_out():
    """Without -I Python would import what lies beside install.py."""
    places = [*(path for path in DOCS.glob("*") if path.is_file()), DOCS.parent / "README.md", Path(install.__file__)]
    commands = [line for place in places for line in re.findall(r"python3?\b.*install\.py.*", place.read_text())]
    assert len(commands) >= 4
    assert [line for line in commands if not re.match(r"python3? -I ", line)] == []
