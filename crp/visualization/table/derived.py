"""Results that were made from a table and are kept beside it: prototypes, audits, clusters and the like.

Each is a file in the table's folder ``derived`` that says what it is, of which layer and of which state of the table,
and holds a checksum of all of it. One of an earlier state of the table is refused when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from crp.errors import InputError
from crp.kinds import check_kind
from crp.visualization.table.columns import _class_number
from crp.visualization.table.files import check_file, check_folder, make_own_folder, write_atomic
from crp.visualization.table.manifest import KEPT, Array, TableCorruptError, TableMismatchError, TableNotFoundError
from crp.visualization.table.store import Table

#: Kinds of results, and the command that makes each.
KEPT_KINDS = {
    "prototypes": "crp prototypes",
    "audit": "crp audit",
    "clusters": "crp clusters",
    "heatmaps": "crp.audit.keep_heatmaps(fv, composite, of_class)",
    "meanings": "crp.audit.meanings(...).save(table)",
    "interventions": "crp.audit.interventions(...).save(table)",
    "context": "crp.audit.contexts(...).save(table)",
    "pictures": "crp report --maximize N",
}
#: Last part of the names of arrays that hold numbers of samples, or of concepts; -1 stands for none.
_OF_SAMPLES = ("sample", "members", "nearest")
_OF_CONCEPTS = ("concept", "over", "under", "strongest")


class KeptResult(NamedTuple):
    """A result that is kept beside a table.

    Attributes
    ----------
    kind : str
        One of `KEPT_KINDS`.
    layer : str
    of_class : int or None
        None for a result of all classes.
    digest : str
        Of the table that it was made from.
    settings : dict of str to object
        How it was made; plain JSON.
    arrays : dict of str to array
    """

    kind: str
    layer: str
    of_class: int | None
    digest: str
    settings: dict[str, Any]
    arrays: dict[str, Array]

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.kind} of {_place(self.kind, self.layer, self.of_class)}"


def keep_result(
    table: Table | str | Path,
    kind: str,
    layer: str,
    arrays: Mapping[str, Array],
    settings: Mapping[str, Any],
    of_class: int | None = None,
) -> Path:
    """Keep a result beside a table, in place of an earlier one of the same kind, layer and class.

    Parameters
    ----------
    table : Table, or its folder
    kind : str
        One of `KEPT_KINDS`.
    layer : str
        Of the table.
    arrays : mapping of str to array
    settings : mapping of str to object
        Plain JSON.
    of_class : int, optional

    Returns
    -------
    Path
        The file.
    """
    table, of_class = Table.open(table), _class_number(of_class)
    path = _path(table, kind, layer, of_class)
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if problem := _problem(table, layer, held):
        raise InputError(f"{kind} of {_place(kind, layer, of_class)} are not of {table!r}: {problem}")
    record = {"kind": kind, "layer": layer, "of_class": of_class, "digest": table.digest, "settings": dict(settings)}
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    make_own_folder(path.parent)
    write_atomic(path, save(held, metadata={"about": text, "sha256": _checksum(text, held)}))
    return path


def read_kept(table: Table | str | Path, kind: str, layer: str, of_class: int | None = None) -> KeptResult:
    """A result that is kept beside a table.

    Raises
    ------
    KeyError
        If the layer was not mined.
    TableNotFoundError
        If there is none; the message says what makes it.
    TableMismatchError
        If it was made before the table changed.
    TableCorruptError
        If the file is damaged, or not of this table.
    """
    table, of_class = Table.open(table), _class_number(of_class)
    table.n_concepts(layer)
    path = _path(table, kind, layer, of_class)
    place = _place(kind, layer, of_class)
    try:
        found = _read(path)
    except FileNotFoundError:
        raise TableNotFoundError(f"no {kind} of {place} in {table.path}; {KEPT_KINDS[kind]} makes them") from None
    if (found.kind, found.layer, found.of_class) != (kind, layer, of_class):
        raise TableCorruptError(f"{path} has {found.name}, not {kind} of {place}")
    if found.digest != table.digest:
        raise TableMismatchError(
            f"the table in {table.path} has changed since {found.name} were made; {KEPT_KINDS[kind]} makes them again"
        )
    if problem := _problem(table, layer, found.arrays):
        raise TableCorruptError(f"{path} is not of this table: {problem}")
    return found


def list_kept(table: Table | str | Path) -> list[KeptResult]:
    """All results that are kept beside a table, also those of an earlier state, by kind, layer and class.

    Raises
    ------
    TableCorruptError
        If a file is damaged.
    """
    folder = Table.open(table).path / "derived"
    check_folder(folder)
    found = [_read(path) for path in folder.glob("*.safetensors") if KEPT.fullmatch(path.name)]
    order = list(KEPT_KINDS)
    return sorted(
        found, key=lambda one: (order.index(one.kind), one.layer, -1 if one.of_class is None else one.of_class)
    )


def _path(table: Table, kind: str, layer: str, of_class: int | None) -> Path:
    if kind not in KEPT_KINDS:
        raise InputError(f"kind must be one of {', '.join(KEPT_KINDS)}; not {kind!r}")
    check_kind("layer", layer, str, "the name of a layer")
    key = hashlib.sha256(json.dumps([layer, of_class]).encode()).hexdigest()[:16]
    return table.path / "derived" / f"{kind}-{key}.safetensors"


def _place(kind: str, layer: str, of_class: int | None) -> str:
    """What a result is of, in words; heatmaps are of no layer, and kept under the table's first."""
    words = [] if kind == "heatmaps" else [f"layer {layer!r}"]
    return ", ".join(words if of_class is None else [*words, f"class {of_class}"])


def _read(path: Path) -> KeptResult:
    check_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
        text = about["about"]
        if about["sha256"] != _checksum(text, arrays):
            raise InputError("its checksum is not that of its content")
        record = KeptResult(**json.loads(text), arrays=arrays)
        numbered = record.of_class is None or type(record.of_class) is int
        if record.kind not in KEPT_KINDS or not numbered or type(record.layer) is not str:
            raise InputError(f"it is of {record.kind!r}, {record.layer!r}, {record.of_class!r}")
        if not path.name.startswith(f"{record.kind}-") or not isinstance(record.settings, dict):
            raise InputError(f"it says of itself to be {record.kind!r}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise TableCorruptError(f"{path} is damaged, or no result of a table: {error}; delete it") from error
    return record


def _problem(table: Table, layer: str, arrays: Mapping[str, Array]) -> str:
    """What in arrays cannot be of a table; empty if all can."""
    n_concepts = table.n_concepts(layer)
    known = np.append(np.unique(table.rows().sample), -1)
    for name, array in arrays.items():
        last = name.rpartition("/")[2]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{name!r} has values that are not finite"
        if last in (*_OF_SAMPLES, *_OF_CONCEPTS) and array.dtype != np.int64:
            return f"{name!r} has no numbers"
        if last in _OF_SAMPLES and not np.isin(array, known).all():
            return f"{name!r} has samples without rows"
        if last in _OF_CONCEPTS and not ((array >= -1) & (array < n_concepts)).all():
            return f"{name!r} has concepts beyond 0 to {n_concepts - 1}"
    return ""


def _checksum(text: str, arrays: Mapping[str, Array]) -> str:
    result = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        result.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        result.update(np.ascontiguousarray(arrays[name]).data)
    return result.hexdigest()
