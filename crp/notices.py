"""Warnings that point at the line of the user, however deep they come from."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing at whoever called into this package (or into torch, which called a hook of it)."""
    level, found = 2, 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("crp", "torch", "contextlib", "zennit"):
            found = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=found)
