"""Compiled code is loaded from a folder that is this user's alone."""

import os
import tempfile
from pathlib import Path

import emulator
import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"gpubackprop-emulator-{os.getuid()}"


def test_the_folder_is_made_private_and_used_again(place):
    assert emulator.cache_folder() == place == emulator.cache_folder()
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["open to all", "a link", "a file", "another user's"])
def test_a_folder_that_others_can_write_is_not_used(planted, place, tmp_path, monkeypatch):
    if planted == "another user's" and os.getuid():
        pytest.skip("only root gives folders away")
    emulator._own_folder.cache_clear()
    if planted == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    elif planted == "a file":
        place.touch(mode=0o600)
    else:
        place.mkdir(mode=0o700)
        place.chmod(0o777 if planted == "open to all" else 0o700)
        if planted == "another user's":
            os.chown(place, 65534, 65534)
    used = emulator.cache_folder()
    assert used == emulator.cache_folder() != place and used.stat().st_mode & 0o777 == 0o700
    assert Path(os.path.realpath(used)).parent == tmp_path and used.stat().st_uid == os.getuid()
    emulator._own_folder.cache_clear()
