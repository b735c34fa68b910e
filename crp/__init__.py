"""Relevance propagation for PyTorch: rules in composites, concept-conditional attribution, reference mining.

Nothing is imported here, so that ``import crp`` is instant; import from the rooms instead, for example
``from crp.attribution import CondAttribution`` and ``from crp.composites import EpsilonPlusFlat``. `crp.explain`,
`crp.methods`, `crp.attached` and `crp.clear` are loaded when they are first asked for.
"""

from typing import Any

__version__ = "0.2.0"
_ROOMS = {"explain": "explain", "methods": "explain", "attached": "engine.additions", "clear": "engine.additions"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"crp.{_ROOMS[name]}"), name)
    globals()[name] = found
    return found
