"""What users are told: warnings that point at their line, however deep they come from, and what a value is."""

import sys
import warnings
from traceback import walk_stack


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing at whoever called into this package (or into torch, which called a hook of it)."""
    callers = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_stack(sys._getframe(1))]
    # From the outermost frame of this package on outward: a user may be called by torch, and call us in turn.
    level = len(callers) - callers[::-1].index("crp") if "crp" in callers else 0
    while level < len(callers) and callers[level] in ("torch", "contextlib", "zennit"):
        level += 1
    warnings.warn(message, category, stacklevel=level + 2)


def kind_of(value: object) -> str:
    """Kind of a value: ``"a dict"``, ``"an Image"``, ``"a Tensor of shape (2, 3)"``; None is ``"None"``."""
    if value is None:
        return "None"
    name, shape = type(value).__name__, getattr(value, "shape", None)
    article = "an" if name[0] in "AEIOaeio" or name == "ndarray" else "a"
    return f"{article} {name}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")
