"""Feature visualization: mining a dataset for reference samples of concepts, and showing them.

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crp.compat.export import export
    from crp.visualization.cache import Cache, ImageCache
    from crp.visualization.decoding import Decoded
    from crp.visualization.feature import FeatureVisualization
    from crp.visualization.maximized import keep_maximized
    from crp.visualization.mining.datasets import Pairs
    from crp.visualization.mining.run import mine
    from crp.visualization.mining.texts import Texts
    from crp.visualization.synthesis import maximize
    from crp.visualization.table.store import Table

__all__ = [
    "Cache",
    "Decoded",
    "FeatureVisualization",
    "ImageCache",
    "Pairs",
    "Table",
    "Texts",
    "export",
    "keep_maximized",
    "maximize",
    "mine",
    "write_report",
]

_HOMES = {
    "Cache": "crp.visualization.cache",
    "Decoded": "crp.visualization.decoding",
    "FeatureVisualization": "crp.visualization.feature",
    "ImageCache": "crp.visualization.cache",
    "Pairs": "crp.visualization.mining.datasets",
    "Table": "crp.visualization.table.store",
    "Texts": "crp.visualization.mining.texts",
    "export": "crp.compat.export",
    "keep_maximized": "crp.visualization.maximized",
    "maximize": "crp.visualization.synthesis",
    "mine": "crp.visualization.mining.run",
    "write_report": "crp.visualization.report.write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
