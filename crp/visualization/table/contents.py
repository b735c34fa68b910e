"""What the arrays of a shard must hold: values that mining can have written, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from crp.visualization.table.manifest import KINDS, MODES, Array, ShardRecord

#: Columns with one entry for each sample that has rows, in ascending order of the samples. There is no probability
#: of classes that do not exclude each other.
SAMPLE_COLUMNS = ("prediction", "probability", "content", "stamp")
#: Bytes of a JSON text about the samples, see `crp.visualization.table.columns`.
ABOUT = "about"


def find_problem(file: Any, record: ShardRecord) -> str:
    """What is wrong with the content of an open shard, in words; empty if all is as its record says.

    Checked are the range that the shard itself names, that rows ascend within it, that targets are classes, that
    values are finite, norms not negative, and positions places.
    """
    described = json.loads(file.metadata()["crp"])
    skipped = {str(i): reason for i, reason in record.skipped.items()}
    if (described["start"], described["stop"], described["skipped"]) != (record.start, record.stop, skipped):
        return f"it says of itself to hold {described['start']} to {described['stop']}"
    sample, target = file.get_tensor("sample"), file.get_tensor("target")
    if problem := _rows_problem(sample, target, record):
        return problem
    n_samples = len(np.unique(sample))
    seen = dict.fromkeys(record.concepts, 0)
    for key in file.keys():  # noqa: SIM118
        name, slash, layer = key.partition("/")
        if key in ("sample", "target", ABOUT):
            continue
        array = file.get_tensor(key)
        if not slash:
            if name not in SAMPLE_COLUMNS or array.shape != (n_samples,):
                return f"{key!r} is no column of {n_samples} samples"
            if name == "prediction" and array.min(initial=0) < -1:
                return f"{key!r} has no classes"
            if name == "probability" and not ((array >= 0) & (array <= 1)).all():
                return f"{key!r} has no probabilities"
            continue
        if layer not in seen:
            return f"{key!r} is of no layer of the shard"
        seen[layer] += 1
        if problem := _column_problem(name, array, (record.rows, record.concepts[layer])):
            return f"{key!r} {problem}"
    return f"nothing of layer {min(seen, key=seen.__getitem__)!r}" if 0 in seen.values() else ""


def _rows_problem(sample: Array, target: Array, record: ShardRecord) -> str:
    if not (sample.dtype == target.dtype == np.int64 and sample.shape == target.shape == (record.rows,)):
        return f"it has not {record.rows} rows"
    step, next_target = np.diff(sample), np.diff(target) > 0
    inside = ((sample >= record.start) & (sample < record.stop)).all()
    if not inside or not ((step > 0) | ((step == 0) & next_target)).all():
        return f"its rows do not ascend from {record.start} to {record.stop - 1}"
    if np.isin(sample, list(record.skipped)).any():
        return "it has rows of skipped samples"
    return f"its targets begin at {target.min()}" if len(target) and target.min() < -1 else ""


def _column_problem(name: str, array: Array, shape: tuple[int, int]) -> str:
    mode, _, field = name.partition(".")
    kind, _, of = field.partition("_")
    if mode not in MODES or (kind not in KINDS and field != "position") or of not in ("", "norm", "scale"):
        return "is no column of a table"
    if array.shape != {"norm": shape[:1], "scale": shape[1:]}.get(of, shape):
        return f"has shape {array.shape} in place of {shape}"
    if field == "position":
        return "" if array.dtype.kind in "ui" and array.min(initial=0) >= 0 else "has negative positions"
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        return "has values that are not finite"
    return "has negative values" if of and array.min(initial=0) < 0 else ""
