"""Files of a table: written whole or not at all, and read only where they are plain files.

A folder that comes from elsewhere may hold links, pipes or folders in the place of files; these are never followed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from crp.errors import InputError, InputTypeError
from crp.visualization.table.manifest import TableCorruptError

#: Pieces that are written at once; systems take 1024.
_AT_ONCE = 1024
#: Bytes that are read at once.
_BLOCK = 8 << 20
#: Errors of systems that sync no folders, as network drives, and of folders in which one may write and not look.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
}


def _as_folder(path: object) -> Path:
    """Folder in which a table is asked for; a `TypeError` if it is no path."""
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(f"a table is given as Table.open(folder), or as its folder, such as fv.path; not {path!r}")
    return Path(path)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent, also after a crash: written beside, synced, then renamed.

    Raises
    ------
    OSError
        If it cannot be written; of a full disk, the message says what to do.
    """
    with _hinted(path):
        _write(path, [content], lambda temporary: path)


def write_hashed(folder: Path, content: Iterable[bytes | memoryview], name: Callable[[str], str]) -> tuple[Path, str]:
    """Write a file as `write_atomic` does, of many pieces; its name is that of its sha256, which is given, too."""
    found: list[str] = []

    def named(temporary: Path) -> Path:
        found.append(hash_of(temporary))
        return folder / name(found[0])

    with _hinted(folder):
        return _write(folder / "shard", content, named), found[0]


def hash_of(path: Path) -> str:
    """Sha256 of a file, in steps in which other threads have the interpreter."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there; a full disk is told of as by `write_atomic`."""
    with _hinted(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{path} cannot be a folder, since it is, or is in, a file; give another path") from error


def make_own_folder(path: Path) -> None:
    """Make a folder inside of a table; see `check_folder`."""
    check_folder(path)
    make_folder(path)


def check_folder(path: Path) -> None:
    """Raise a `TableCorruptError` if a link or a file has the place of a table's own folder."""
    _check(path, stat.S_IFDIR)


def check_file(path: Path) -> os.stat_result:
    """Status of a plain file.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    TableCorruptError
        If something else has its place, such as a link, which is not followed.
    """
    found = _check(path, stat.S_IFREG)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return found


def read_file(path: Path) -> bytes:
    """Content of a plain file; raises as `check_file`."""
    check_file(path)
    return path.read_bytes()


def _check(path: Path, kind: int) -> os.stat_result | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if (there := stat.S_IFMT(found.st_mode)) != kind:
        what, wanted = _KINDS.get(there, "something else"), _KINDS[kind].removeprefix("a ")
        raise TableCorruptError(f"{path} is {what}, not the {wanted} of a table, and is left alone; move it away")
    return found


@contextlib.contextmanager
def _hinted(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{reason}: what was written before is kept; make room, then run the same again to go on"
        raise OSError(error.errno, reason, str(path)) from error  # (and not the file beside it)


def _write(path: Path, content: Iterable[bytes | memoryview], named: Callable[[Path], Path]) -> Path:
    """Write beside ``path``, and rename to what is the name of the file that was written."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        path = named(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # the rename is safe once the folder is
        try:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
    return path


def _write_all(handle: int, content: Iterable[bytes | memoryview]) -> None:
    """Write pieces, many of them at once: between two of them, another thread would take the interpreter."""
    pieces = iter(content)
    while several := [memoryview(piece) for piece in islice(pieces, _AT_ONCE)]:
        while several:
            n = os.writev(handle, several) if hasattr(os, "writev") else os.write(handle, several[0])
            while several and n >= len(several[0]):
                n -= len(several.pop(0))
            if n:
                several[0] = several[0][n:]
