"""Shard files: one stretch of a dataset each, complete or absent, and checked before their content is believed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from crp.visualization.table.contents import find_problem
from crp.visualization.table.files import check_file, write_atomic
from crp.visualization.table.manifest import Array, ShardRecord, TableCorruptError

_REDO = "mine again with the same arguments to redo it"
#: Files that were written here, or found to be what their record says, as (path, size, time of change, sha256).
_verified: set[tuple[str, int, int, str]] = set()
#: What reading a file that is no shard, or a forged one, may raise.
_UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def write_shard(
    folder: Path, identity: str, start: int, stop: int, arrays: Mapping[str, Array], skipped: Mapping[int, str]
) -> ShardRecord:
    """Write a shard; its name follows from its content, so that writing it again changes nothing.

    Parameters
    ----------
    folder : Path
        ``<table>/shards``.
    identity : str
        Which table the shard belongs to.
    start, stop : int
    arrays : dict of str to array
        ``"sample"`` and ``"target"`` of shape (rows,), and for layers ``"<mode>.<field>/<layer>"``.
    skipped : dict of int to str

    Returns
    -------
    ShardRecord
    """
    rows = len(arrays["sample"])
    described = {"table": identity, "start": start, "stop": stop}
    described["skipped"] = {str(i): skipped[i] for i in sorted(skipped)}
    # One entry, as safetensors writes several in arbitrary order.
    content = save(dict(arrays), metadata={"crp": json.dumps(described)})
    sha = hashlib.sha256(content).hexdigest()
    file = f"{start}-{stop}-{sha[:8]}.safetensors"
    write_atomic(folder / file, content)
    _verified.add(_state(folder / file, sha))
    concepts = _concepts({key: array.shape for key, array in arrays.items()})
    return ShardRecord(file, sha, start, stop, rows, concepts, dict(skipped))


def read_record(path: Path, identity: str) -> ShardRecord | None:
    """Record of a shard file that no manifest lists; None if it is damaged or belongs to another table."""
    with contextlib.suppress(OSError, *_UNREADABLE):
        check_file(path)
        sha = _sha256(path)
        with safe_open(path, framework="numpy") as file:
            described = json.loads(file.metadata()["crp"])
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if path.name.endswith(f"-{sha[:8]}.safetensors") and described.pop("table") == identity:
            concepts = _concepts(shapes)
            entry = {"file": path.name, "sha256": sha, "rows": shapes["sample"][0], "concepts": concepts, **described}
            return ShardRecord.from_json(entry, path)
    return None


@contextlib.contextmanager
def open_shard(folder: Path, record: ShardRecord) -> Iterator[Any]:
    """Memory-mapped shard, whose content is what the manifest says.

    Raises
    ------
    TableCorruptError
        If the file is missing, damaged or another one; the message names it and says what to do.
    """
    path = folder / record.file
    try:
        check_shard(folder, record)
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise TableCorruptError(f"{path} is damaged ({error}); {_REDO}") from error


def check_shard(folder: Path, record: ShardRecord, *, again: bool = False) -> None:
    """Raise a `TableCorruptError` unless a shard's file is what its record says, and holds what a shard may hold.

    Parameters
    ----------
    folder : Path
        ``<table>/shards``.
    record : ShardRecord
    again : bool
        Read the file, also where this process has read or written it and its size and time are as they were.
    """
    path = folder / record.file
    try:
        state = _state(path, record.sha256)
        if state in _verified and not again:
            return
        _verified.discard(state)
        sha = _sha256(path)
        if sha != record.sha256:
            raise TableCorruptError(
                f"{path} is damaged: its sha256 is {sha[:16]}…, the manifest says {record.sha256[:16]}…; {_REDO}"
            )
        with safe_open(path, framework="numpy") as file:
            problem = find_problem(file, record)
    except OSError as error:
        raise TableCorruptError(f"{path} cannot be read ({error.strerror}); {_REDO}") from error
    except TableCorruptError:
        raise
    except _UNREADABLE as error:
        raise TableCorruptError(f"{path} is damaged ({error}); {_REDO}") from error
    if problem:
        raise TableCorruptError(f"{path} is not what mining writes: {problem}; {_REDO}")
    _verified.add(state)


def _state(path: Path, sha: str) -> tuple[str, int, int, str]:
    status = check_file(path)
    return str(path.resolve()), status.st_size, status.st_mtime_ns, sha


def _sha256(path: Path) -> str:
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def _concepts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {key.partition("/")[2]: int(shape[1]) for key, shape in sorted(shapes.items()) if len(shape) == 2}
