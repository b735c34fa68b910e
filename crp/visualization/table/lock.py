"""One writer per folder: a lock that names its owner, and that is ignored once the owner's process has ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crp.visualization.table.files import check_file, write_atomic
from crp.visualization.table.manifest import TableCorruptError, TableError

_PATTERN = "lock-*.json"
#: How often a lock is written whose temporary file another run takes for one that was left behind.
_ATTEMPTS = 20
#: Bytes of a lock, at most.
_SIZE = 1 << 16
#: Roles, and the roles that may not hold the folder at the same time: a whole run, a part of a run, a merge of parts.
_CONFLICTS = {"run": {"run", "part", "merge"}, "part": {"run"}, "merge": {"run", "merge"}}


class TableLockedError(TableError, RuntimeError):
    """Another run writes into the folder.

    Attributes
    ----------
    role : str
        What it does: ``"run"``, ``"part"`` or ``"merge"``.
    """

    role = "run"


@contextlib.contextmanager
def locked(folder: Path, role: str = "run") -> Iterator[None]:
    """Hold the folder for writing.

    A run holds it alone; parts of a run share it with each other and with one merge.

    Every run that wants the folder leaves a file of its own first and then looks for others, so that of two runs at
    most one goes on. A file whose process is gone is removed. A process on another machine cannot be asked, and counts
    as alive.

    Raises
    ------
    TableLockedError
        At once, if another run that may be alive holds the folder; the message names it.
    """
    own = folder / f"lock-{uuid.uuid4().hex}.json"
    content = json.dumps(_owner() | {"role": role}).encode()
    try:
        for attempt in range(_ATTEMPTS):
            try:
                write_atomic(own, content)
                break
            except FileNotFoundError:  # a run that holds the folder has cleaned it meanwhile
                if attempt == _ATTEMPTS - 1 or not folder.is_dir():
                    raise
        for other in sorted(folder.glob(_PATTERN)):
            if other == own:
                continue
            owner = _read(other)
            if owner is None:
                continue
            if not _is_alive(owner):
                other.unlink(missing_ok=True)
            elif (their := str(owner.get("role", "run"))) not in _CONFLICTS or their in _CONFLICTS[role]:
                error = TableLockedError(
                    f"{folder} is being written by process {owner.get('pid')} on {owner.get('host')}; wait for it, or "
                    f"mine into another folder. If that process is gone, delete {other}"
                )
                error.role = their
                raise error
        yield
    finally:
        own.unlink(missing_ok=True)


def get_owners(folder: Path) -> list[dict[str, Any]]:
    """Who may be writing into the folder: ``pid``, ``host`` and ``role`` of each."""
    owners = (_read(other) for other in sorted(folder.glob(_PATTERN)))
    return [owner for owner in owners if owner is not None and _is_alive(owner)]


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname(), **_machine()}


def _machine() -> dict[str, str]:
    """Identifiers of this boot of the machine and of its process namespace; empty where they are unknown."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": str(Path("/proc/self/ns/pid").readlink())}
    return {"boot": "", "namespace": ""}


def _read(path: Path) -> dict[str, Any] | None:
    owner = None
    try:
        # (a folder, a link or a pipe in the place of a lock is not read, and counts as a lock)
        with contextlib.suppress(ValueError, RecursionError, TableCorruptError):
            if check_file(path).st_size <= _SIZE:
                owner = json.loads(path.read_text())
    except FileNotFoundError:  # released in the meantime
        return None
    return owner if isinstance(owner, dict) else {"pid": "unknown", "host": "unknown"}


def _is_alive(owner: dict[str, Any]) -> bool:
    here = _owner()
    if owner.get("host") != here["host"]:
        return True
    if owner.get("boot") != here["boot"]:
        return False
    if owner.get("namespace") != here["namespace"] or not isinstance(owner.get("pid"), int):
        return True
    started = _started(owner["pid"])
    return started is not None and started in ("", owner.get("started"))


def _started(pid: int) -> str | None:
    """When a process started, in the system's own unit; "" where the system does not tell, None if it is dead."""
    with contextlib.suppress(OSError):  # (systems may lack the file, or hide that of another user)
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    if os.name != "nt":  # there, signal 0 ends the process
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
    return ""
