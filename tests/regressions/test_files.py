"""Files that are written keep what they replace, in permissions too, or are refused by name; none is lost or mapped."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import files
from gpubackprop.checkpoint import check_writable, load_model, save_model, write_file


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield lambda mask: os.umask(mask)
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


# ---- permissions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o660, 0o666, 0o755])
def test_what_is_replaced_keeps_its_mode(mode, tmp_path, umask):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    path.chmod(mode)
    save_model(gb.mlp([2, 2]), path)
    assert mode_of(path) == mode and path.read_bytes() != b"old"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_follows_the_umask(mask, mode, tmp_path, umask):
    umask(mask)
    write_file(tmp_path / "new", b"x")
    assert mode_of(tmp_path / "new") == mode


def test_what_is_replaced_is_never_open_to_others_meanwhile(tmp_path, umask, monkeypatch):
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o600)
    seen, replace = [], os.replace
    monkeypatch.setattr(files, "_inherit", lambda number, before: seen.append(stat.S_IMODE(os.fstat(number).st_mode)))
    monkeypatch.setattr(os, "replace", lambda *a: replace(*a))
    write_file(path, b"new")
    assert seen == [0o600]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_what_is_replaced_keeps_its_owner_and_group(tmp_path):
    path = tmp_path / "theirs"
    path.write_bytes(b"old")
    os.chown(path, 1234, 4321)
    path.chmod(0o660)
    write_file(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid, mode_of(path)) == (1234, 4321, 0o660)


def test_a_group_that_cannot_be_kept_gets_no_rights(tmp_path, monkeypatch):
    path = tmp_path / "theirs"
    path.write_bytes(b"old")
    path.chmod(0o664)
    before, found = path.stat(), os.stat_result

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    other = found((*before[:5], before.st_gid + 1, *before[6:]))
    with open(path, "r+b") as file:
        files._inherit(file.fileno(), other)
    assert mode_of(path) == 0o604


def test_a_read_only_file_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    path.chmod(0o444)
    for write in (lambda: save_model(gb.mlp([2, 2]), path), lambda: write_file(path, b"new"),
                  lambda: check_writable(path)):  # fmt: skip
        with pytest.raises(PermissionError, match=r"m\.safetensors: is read-only; make it writable \(chmod u\+w\)"):
            write()
    assert path.read_bytes() == b"old" and mode_of(path) == 0o444 and leftovers(tmp_path) == []


def test_a_link_stays_and_what_it_names_keeps_its_mode(tmp_path, umask):
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_file(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and mode_of(target) == 0o640


# ---- what appears meanwhile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_without_replace_a_file_that_appears_is_left(links, tmp_path, monkeypatch):
    path, fsync = tmp_path / "m", os.fsync

    def appear(number):
        path.write_bytes(b"theirs")
        fsync(number)

    def none(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", appear)
    if not links:
        monkeypatch.setattr(os, "link", none)
    with pytest.raises(FileExistsError, match=r"m: exists, and was not replaced; choose another name"):
        write_file(path, b"mine", replace=False)
    assert path.read_bytes() == b"theirs" and leftovers(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_without_replace_a_new_file_is_written(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    write_file(tmp_path / "m", b"mine", replace=False)
    assert [(p.name, p.read_bytes(), p.stat().st_nlink) for p in tmp_path.iterdir()] == [("m", b"mine", 1)]


# ---- full disks ----------------------------------------------------------------------------------------------------

FULL = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota", errno.EIO: "look after the disk",
        errno.EFBIG: r"raise the limit on the size of files \(ulimit -f\)"}  # fmt: skip


@pytest.mark.parametrize("number", FULL)
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_is_said_with_the_name_and_a_remedy(number, old, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    if old:
        path.write_bytes(b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    kept = "; the file that was there is unchanged" if old else ""
    message = rf"^.*m\.safetensors: cannot be written \({os.strerror(number)}\){kept}; {FULL[number]}, or name another"
    with pytest.raises(OSError, match=message) as caught:
        save_model(gb.mlp([2, 2]), path)
    assert caught.value.errno == number
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.safetensors", b"old")] * old


LIMITED = """
import resource, sys
import gpubackprop as gb
from gpubackprop.checkpoint import write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_file(sys.argv[1], b"x" * 5000)
except OSError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files_is_said(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    assert f"{path}: cannot be written (File too large); the file that was there is unchanged" in done.stdout
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m", b"old")]


# ---- temporary files -----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from gpubackprop import files
os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
files.write_file(sys.argv[1], b"x" * 5000)
"""


def test_what_a_killed_writer_leaves_is_cleared_by_the_next(tmp_path):
    path = tmp_path / "m.safetensors"
    done = subprocess.run([sys.executable, "-c", KILLED, path])
    assert done.returncode == -signal.SIGKILL and len(leftovers(tmp_path)) == 1
    write_file(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_nothing_else_is_cleared(tmp_path):
    """Not the file of a writer at work, not what only looks alike, not what a link points to."""
    path = tmp_path / "m"
    kept = [".m.0123456789.tmp", ".n.01234567.tmp", "m.01234567.tmp", ".m.0123456x.tmp", ".m.01234567.tmp2"]
    for key in kept:
        (tmp_path / key).touch()
    (tmp_path / ".m.aaaaaaaa.tmp").symlink_to(tmp_path / kept[0])
    (tmp_path / ".m.bbbbbbbb.tmp").mkdir()
    os.mkfifo(tmp_path / ".m.cccccccc.tmp")
    with open(tmp_path / ".m.dddddddd.tmp", "wb") as at_work:
        fcntl.flock(at_work, fcntl.LOCK_EX)
        (tmp_path / ".m.eeeeeeee.tmp").touch()
        write_file(path, b"new")
    special = [".m.aaaaaaaa.tmp", ".m.bbbbbbbb.tmp", ".m.cccccccc.tmp", ".m.dddddddd.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["m", *kept, *special])


def test_without_locks_only_old_ones_are_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    old, new = tmp_path / ".m.01234567.tmp", tmp_path / ".m.89abcdef.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 3 * 24 * 3600,) * 2)
    write_file(tmp_path / "m", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.89abcdef.tmp", "m"]


def test_a_writer_whose_file_was_taken_for_abandoned_begins_another(tmp_path, monkeypatch):
    lock, taken = files._lock, []

    def late(number):
        if not taken:
            taken.append(next(p for p in tmp_path.iterdir()))
            taken[0].unlink()
        return lock(number)

    monkeypatch.setattr(files, "_lock", late)
    write_file(tmp_path / "m", b"mine")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m", b"mine")] and taken


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_while_it_is_read_is_a_damaged_one(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(gb.mlp([100, 200]), path)
    read = files.Safetensors.read

    def shrunk(self, dtype):
        os.truncate(path, 200)
        return read(self, dtype)

    monkeypatch.setattr(files.Safetensors, "read", shrunk)
    with pytest.raises(ValueError, match=r"^load_model: .*m\.safetensors: is cut short, damaged .*it changed while it"):
        load_model(path)


def test_a_loaded_model_does_not_lean_on_its_file(tmp_path):
    path = tmp_path / "m.safetensors"
    model = gb.Sequential(gb.Scaler(3), gb.Dense(3, 4, mask=np.eye(3, 4))).initialize(0)
    save_model(model, path)
    loaded = load_model(path)
    path.write_bytes(b"")
    for key, a in loaded.state_dict().items():
        np.testing.assert_array_equal(a, model.state_dict()[key])
    held = [p.init for p in loaded.named_parameters().values() if isinstance(p.init, np.ndarray)]
    assert len(held) == 3 and all(a.base is None or a.base.nbytes == a.nbytes for a in held)


@pytest.mark.parametrize("header", [
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
    {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}},
    {k: {"dtype": "F32", "shape": [1], "data_offsets": [2 * i, 2 * i + 4]} for i, k in enumerate("ab")},
    {"a": 3}, [], 3, None,
])  # fmt: skip
def test_places_of_arrays_that_are_none_are_refused(header, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"^load_model: .*m\.safetensors: is cut short, damaged or not safetensors"):
        load_model(path)
