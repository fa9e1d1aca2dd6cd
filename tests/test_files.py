"""Files that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from normistral.terminal.files import write_whole


def test_a_file_is_replaced_whole_and_others_may_read_it(tmp_path):
    path = tmp_path / "fart.md"
    path.write_text("gammel")
    write_whole(path, "blåbær\n")
    assert path.read_bytes() == "blåbær\n".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "fart.md"
    path.write_text("gammel")

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "ny")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("fart.md", "gammel")]
