"""Comparison of named arrays: floats by their error relative to the largest value, everything else exactly."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
import pytest

#: Relative to the largest value of an array; figures that the peer rounds to float32 cannot agree better than that.
TOLERANCE = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 1e-6}


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    scale = float(np.abs(theirs).max(initial=0.0))
    error = float(np.abs(ours - theirs).max(initial=0.0))
    return error if scale == 0 else error / scale


def difference(ours: np.ndarray, theirs: np.ndarray) -> str | None:
    """What differs, or None."""
    if ours.shape != theirs.shape:
        return f"shape {ours.shape} instead of {theirs.shape}"
    if theirs.dtype.kind == "f":
        error = relative_error(ours, theirs)
        return None if error <= TOLERANCE[theirs.dtype] else f"relative error {error:.2g}"
    if np.array_equal(ours, theirs):
        return None
    return f"{int(np.sum(ours != theirs))} of {theirs.size} entries differ"


def problems(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], wrong: Mapping[str, str] | None = None
) -> list[str]:
    """All that breaks parity, where values of the peer that are listed as ``wrong`` must really differ."""
    if "error" in theirs:
        return [f"the peer raised:\n{theirs['error']}"]
    wrong = wrong or {}
    found, refuted = [], set()
    for name in sorted(ours.keys() | theirs.keys()):
        missing = [side for side, values in {"ours": ours, "the peer": theirs}.items() if name not in values]
        what = f"not in {missing[0]}" if missing else difference(ours[name], theirs[name])
        numbers = [pattern for pattern in wrong if fnmatchcase(name, pattern)]
        if what and numbers:
            refuted.update(numbers)
        elif what:
            found.append(f"{name}: {what}")
    listed = [
        f"{pattern}: listed as wrong in the peer ({wrong[pattern]}), but agrees" for pattern in wrong.keys() - refuted
    ]
    return found + listed


def assert_parity(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], wrong: Mapping[str, str] | None = None
) -> None:
    """Equal names and values, except where the peer is listed as ``wrong``; floats within `TOLERANCE`."""
    __tracebackhide__ = True
    if found := problems(ours, theirs, wrong):
        pytest.fail("\n".join([f"{len(found)} differences from the peer:", *found[:20]]), pytrace=False)
