"""Relevance propagation for PyTorch: rules in composites, concept-conditional attribution, reference mining.

Nothing is imported here, so that ``import crp`` is instant; import from the rooms instead, for example
``from crp.attribution import CondAttribution`` and ``from crp.composites import EpsilonPlusFlat``. `crp.explain`,
`crp.methods`, `crp.concept_flow`, `crp.attached` and `crp.clear` are loaded when they are first asked for.
"""

from typing import Any

__version__ = "0.2.0"
_METHODS, _ADDITIONS = "attributors.explaining", "engine.additions"
_HOMES = {"explain": _METHODS, "methods": _METHODS, "attached": _ADDITIONS, "clear": _ADDITIONS}
_HOMES["concept_flow"] = "attributors.flow"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"crp.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
