"""Texts on the command line: concepts of layers that hold tokens, and ``crp attribute --text``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crp.commands.errors import CommandError

if TYPE_CHECKING:
    from torch import nn

    from crp.concepts import Concept


def concepts_of_texts(model: nn.Module, wanted: Sequence[str]) -> dict[str, Concept]:
    """Concepts of layers of shape (samples, tokens, features), by the words of ``--layers``.

    ``"h.*.mlp.act"`` has a concept for each feature, ``"h.*.attn.c_proj.input:heads=12"`` one for each of 12 equal
    groups of features.
    """
    from crp.concepts import AxisConcept
    from crp.visualization.mining.selection import select_layers

    found: dict[str, Concept] = {}
    for word in wanted:
        pattern, colon, number = word.partition(":heads=")
        if colon and not re.fullmatch(r"[1-9]\d{0,5}", number):
            raise CommandError(f"--layers {word} must end in :heads=N, such as :heads=12")
        if pattern == "auto":
            raise CommandError("--layers auto is for pictures; crp layers MODEL lists what a model has")
        is_input = pattern.endswith(".input")
        for name in select_layers(model, [pattern.removesuffix(".input")]):
            found[f"{name}.input" if is_input else name] = AxisConcept(-1, int(number) if colon else None)
    return found
