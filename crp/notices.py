"""Warnings that point at the line of the user, however deep they come from."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing at whoever called into this package (or into torch, which called a hook of it)."""
    callers = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        callers.append(frame.f_globals.get("__name__", "").partition(".")[0])
        frame = frame.f_back
    # From the outermost frame of this package on outward: a user may be called by torch, and call us in turn.
    level = len(callers) - callers[::-1].index("crp") if "crp" in callers else 0
    while level < len(callers) and callers[level] in ("torch", "contextlib", "zennit"):
        level += 1
    warnings.warn(message, category, stacklevel=level + 2)
