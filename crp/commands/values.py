"""Values of options in the form ``KEY=VALUE``."""

from __future__ import annotations

import json
from typing import Any


def read_value(word: str) -> Any:
    """What is typed for a value: JSON (``0.1``, ``[1, 2]``, ``true``), True, False, None, or else the word itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(word, word))
    except json.JSONDecodeError:
        return word
