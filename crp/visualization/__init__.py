"""Feature visualization: mining a dataset for reference samples of concepts, and showing them.

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crp.visualization.cache import Cache, ImageCache
    from crp.visualization.datasets import Pairs
    from crp.visualization.feature import FeatureVisualization
    from crp.visualization.mining import mine
    from crp.visualization.report import write_report
    from crp.visualization.results import export
    from crp.visualization.store import Table
    from crp.visualization.synthesis import maximize

__all__ = [
    "Cache",
    "FeatureVisualization",
    "ImageCache",
    "Pairs",
    "Table",
    "export",
    "maximize",
    "mine",
    "write_report",
]

_HOMES = {
    "Cache": "cache",
    "FeatureVisualization": "feature",
    "ImageCache": "cache",
    "Pairs": "datasets",
    "Table": "store",
    "export": "results",
    "maximize": "synthesis",
    "mine": "mining",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
