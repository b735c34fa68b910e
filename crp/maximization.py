"""Best samples of concepts, under the module name of zennit-crp."""

from __future__ import annotations

from pathlib import Path

from crp.compat import accumulators

__all__ = ["Maximization"]


class Maximization(accumulators.Maximization):
    """`crp.compat.accumulators.Maximization` that makes its folder at once, for code that lists it."""

    def __init__(
        self, mode: str = "relevance", max_target: str = "sum", abs_norm: bool = False, path: str | Path | None = None
    ) -> None:
        super().__init__(mode, max_target, abs_norm, path)
        self.PATH.mkdir(parents=True, exist_ok=True)
