"""Which names are meant, for messages about one that is not there."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """Nearest of known names as the end of a message: ``"; nearest: 'a', 'b'"``, or nothing."""
    in_lower_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(str(name).lower(), in_lower_case)
    return f"; nearest: {', '.join(repr(in_lower_case[one]) for one in near)}" if near else ""
