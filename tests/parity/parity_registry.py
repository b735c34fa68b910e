"""What a case is: a computation that both sides run, and where the peer is known to be wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from parity_nets import Results, prefixed

Compute = Callable[[], Results]
Build = Callable[[], tuple[Compute, Compute]]


@dataclass(frozen=True)
class Case:
    """Named arrays, and patterns of the names at which zennit-crp 0.6.0 is wrong, with the number of the defect."""

    compute: Compute
    wrong: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Defect:
    """One defect: its number in the list of the peer's defects, and two ways to compute the same figures."""

    number: str
    asked: Compute
    right: Compute

    def compute(self) -> Results:
        """What the peer gives for both; ``asked/error`` where it raises."""
        try:
            asked = self.asked()
        except Exception as error:
            asked = {"error": np.array(repr(error))}
        return prefixed(asked=asked, right=self.right())


def case_decorator(cases: dict[str, Case], pattern: str) -> Callable[..., Callable[[Compute], Compute]]:
    """Decorator that puts a case into ``cases``; its keywords go into ``pattern`` and name what is wrong."""

    def case(**wrong: str) -> Callable[[Compute], Compute]:
        def register(compute: Compute) -> Compute:
            cases[compute.__name__] = Case(compute, {pattern.format(what): number for what, number in wrong.items()})
            return compute

        return register

    return case


def defect_decorator(
    defects: dict[str, Defect],
) -> Callable[[str], Callable[[Build], None]]:
    """Decorator that puts what is ``asked``, and what is ``right``, into ``defects``."""

    def defect(number: str) -> Callable[[Build], None]:
        def register(build: Build) -> None:
            defects[f"{number}_{build.__name__}"] = Defect(number, *build())

        return register

    return defect
