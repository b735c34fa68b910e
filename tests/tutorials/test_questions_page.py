"""The page on messages: each is raised by the code above it, and all other code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "tutorials" / "questions.md"
#: Code, and the message below it, if there is one.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n> ([^\n]*)\n)?", PAGE.read_text(encoding="utf-8"), re.S)


def message_of(code: str, names: dict[str, Any]) -> str:
    """Message of the error that some code ends in; an empty one where it runs."""
    try:
        exec(compile(code, str(PAGE), "exec"), names)
    except Exception as error:
        return str(error)
    return ""


def test_messages_are_raised_and_remedies_run() -> None:
    names: dict[str, Any] = {}
    found = []
    for code, expected in BLOCKS:
        message = message_of(code, names)
        assert (expected in message) if expected else not message, (code, expected, message)
        found.append(bool(expected))
    assert found.count(True) >= 12 and found.count(False) >= 10
