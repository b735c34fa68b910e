"""What is measured: a module for each section, with a ``TITLE`` and ``cases()``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from benchmarks.harness import Case
from benchmarks.sections import (
    attribution,
    captum,
    compiled,
    concepts,
    counts,
    deeplift,
    gpu,
    loading,
    memory,
    methods,
    mining,
    precision,
    small,
    transformers,
)


class Section(Protocol):
    """A module of this folder."""

    TITLE: str

    def cases(self) -> Sequence[Case]:
        """What is measured, in order."""


SECTIONS: dict[str, Section] = {
    "attribution": attribution,
    "counts": counts,
    "concepts": concepts,
    "deeplift": deeplift,
    "captum": captum,
    "small": small,
    "memory": memory,
    "mining": mining,
    "methods": methods,
    "compiled": compiled,
    "precision": precision,
    "loading": loading,
    "transformers": transformers,
    "gpu": gpu,
}
#: Those that need a GPU.
ON_CUDA = {"gpu"}


def default(device: str) -> list[str]:
    """Sections that are measured on a device if none are named."""
    return [name for name in SECTIONS if (name in ON_CUDA) == (device == "cuda")]
