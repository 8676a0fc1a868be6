"""Files: written in one step or not at all, with the permissions of what they replace; safetensors read, not mapped."""

import errno
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpubackprop.formulas import cut

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["KINDS", "Damaged", "Safetensors", "Stored", "check_writable", "write_file"]

PathLike = str | os.PathLike[str]

HEADER = 100_000_000  # bytes of a safetensors header, at most, as in the format's own library
ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
            "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}  # fmt: skip
KINDS = {"float32": "F32", "float64": "F64"}
ABANDONED = 24 * 3600  # seconds after which a temporary file is no one's, where files cannot be locked
REMEDIES = {
    errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota", errno.EIO: "look after the disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)", errno.EROFS: "mount it for writing",
}  # fmt: skip


# ---- writing -------------------------------------------------------------------------------------------------------


def check_writable(path: PathLike) -> Path:
    """The real path of a file that `write_file` can make or replace; an OSError that says what is in the way if not."""
    real = Path(os.path.realpath(path))
    if os.path.islink(path) and f"{os.path.realpath(os.path.dirname(path))}/".startswith(("/dev/", "/proc/")):
        remedy = "renaming a new file over it would lose what else goes there; name a file of its own"
        raise FileExistsError(f"{path}: stands for the open file {real}; {remedy}")
    if real.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected the name of a file; add one")
    if real.exists() and not real.is_file():
        raise FileExistsError(f"{path}: is not a regular file; choose another name")
    if not real.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {real.parent}; make it first")
    if real.exists() and (not real.stat().st_mode & 0o222 or not os.access(real, os.W_OK)):  # root may write any
        raise PermissionError(f"{path}: is read-only; make it writable (chmod u+w), or choose another name")
    trial = _temporary(real)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise type(error)(f"{path}: cannot write in the folder {real.parent} ({error.strerror})") from None
    return real


def write_file(path: PathLike, data: bytes, *, replace: bool = True) -> None:
    """Write the file in one step: a temporary one beside it, flushed to disk, then renamed; errors leave nothing.

    The file has the mode, and as far as the system lets it the owner and group, of the one that it replaces. With
    replace=False a file that is there is a FileExistsError, also if it appears meanwhile.
    """
    real = check_writable(path)
    before = real.stat() if real.exists() else None
    try:
        _clear(real)
        with _begun(real, secret=before is not None) as file:
            file.write(data)
            file.flush()
            if before is not None:
                _inherit(file.fileno(), before)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # what is open cannot be renamed there
            _rename(Path(file.name), real, replace)
    except FileExistsError:
        raise FileExistsError(f"{path}: exists, and was not replaced; choose another name") from None
    except OSError as error:
        remedy = f"{REMEDIES[error.errno]}, or name" if error.errno in REMEDIES else "name"
        kept = "" if before is None else "; the file that was there is unchanged"
        failed = type(error)(f"{path}: cannot be written ({error.strerror or error}){kept}; {remedy} another place")
        failed.errno = error.errno
        raise failed from None


@contextmanager
def _begun(real: Path, secret: bool) -> Iterator[BinaryIO]:
    """A new temporary file, locked while its writer lives; after an error it is gone."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600 if secret else 0o666)

    while True:
        temporary = _temporary(real)
        with open(temporary, "xb", opener=opener) as file:
            try:
                if _lock(file.fileno()) is False or not os.fstat(file.fileno()).st_nlink:
                    continue  # another process took it for abandoned before it was locked
                yield file
                return
            except BaseException:
                with suppress(FileNotFoundError):
                    temporary.unlink()
                raise


def _inherit(number: int, before: os.stat_result) -> None:
    """Give the open file owner, group and mode of another; without its group, nothing to a group."""
    if not hasattr(os, "fchown"):  # Windows
        return
    made, mode = os.fstat(number), stat.S_IMODE(before.st_mode)
    for owner, group in ((before.st_uid, -1), (-1, before.st_gid)):
        if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
            with suppress(PermissionError):
                os.fchown(number, owner, group)
    if os.fstat(number).st_gid != before.st_gid:
        mode &= ~0o070
    os.fchmod(number, mode)


def _rename(temporary: Path, real: Path, replace: bool) -> None:
    """Give the temporary file its name; without `replace`, FileExistsError if that is taken."""
    if replace:
        os.replace(temporary, real)
        return
    try:
        os.link(temporary, real)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if real.exists():
            raise FileExistsError from None
        os.replace(temporary, real)
    else:
        temporary.unlink()


def _temporary(real: Path) -> Path:
    return real.with_name(f".{real.name[:100]}.{os.urandom(4).hex()}.tmp")


def _clear(real: Path) -> None:
    """Remove temporary files of this file whose writers were killed: no one has them locked."""
    own = re.compile(re.escape(f".{real.name[:100]}.") + r"[0-9a-f]{8}\.tmp")
    with suppress(OSError), os.scandir(real.parent) as places:
        for place in [p for p in places if own.fullmatch(p.name) and p.is_file(follow_symlinks=False)]:
            with suppress(OSError), open(place.path, "r+b", opener=_without_links) as file:
                locked = _lock(file.fileno())
                if locked or (locked is None and time.time() - place.stat().st_mtime > ABANDONED):
                    os.unlink(place.path)


def _without_links(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0))


def _lock(number: int) -> bool | None:
    """Lock the open file until it is closed: False if another has it locked, None if files cannot be locked here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


# ---- reading -------------------------------------------------------------------------------------------------------


class Damaged(ValueError):
    """The file is not a whole one of its kind."""


@dataclass(frozen=True)
class Stored:
    """An array of a safetensors file: its type as the format names it, its shape, and where its bytes are."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class Safetensors:
    """An open safetensors file: its metadata and what it says of its arrays; Damaged if it is not a whole one.

    Nothing is mapped: a process that writes over the file while it is read makes it a damaged one, and no bus error.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import json

        self._file = file
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > HEADER or len(text := file.read(length)) < length:
            raise Damaged("it has no whole header")
        try:
            header = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise Damaged(f"its header is no JSON: {error}") from None
        if not isinstance(header, dict):
            raise Damaged("its header is no object")
        self.metadata: Any = header.pop("__metadata__", {})
        self.arrays = {str(name): _stored(name, entry) for name, entry in header.items()}
        self._begin, end = 8 + length, 0
        for one in sorted(self.arrays.values(), key=lambda one: (one.start, one.end)):
            if one.start != end:
                raise Damaged("its arrays overlap, or leave room between them")
            end = one.end
        if os.fstat(file.fileno()).st_size != self._begin + end:
            raise Damaged(f"it is not {self._begin + end:,} bytes long, as its header says")

    def read(self, dtype: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays, which must be of that type, read-only."""
        self._file.seek(self._begin)
        data, kind = self._file.read(), np.dtype(dtype).newbyteorder("<")
        if len(data) != max((one.end for one in self.arrays.values()), default=0):
            raise Damaged("it changed while it was read")
        found = {}
        for name, one in self.arrays.items():
            if one.kind != KINDS[dtype]:
                raise Damaged(f"its array {cut(repr(name))} is of type {one.kind}, expected {KINDS[dtype]}")
            found[name] = np.frombuffer(data, kind, math.prod(one.shape), one.start).reshape(one.shape)
        return found


def _stored(name: str, entry: Any) -> Stored:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [start, end]}:
            numbers = [*shape, start, end]
            known = kind in ITEMSIZE and all(type(n) is int and n >= 0 for n in numbers)
            if known and end - start == math.prod(shape) * ITEMSIZE[kind]:
                return Stored(kind, tuple(shape), start, end)
    raise Damaged(f"what it says of {cut(repr(name))} is not of an array")
