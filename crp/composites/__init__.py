"""Presets, and what they are built from.

``canonizers="auto"`` is the first parameter of each: batch norm is merged unless you say otherwise.
"""

from crp.composites.base import Composite, get, names, register
from crp.composites.lrp import EpsilonAlpha2Beta1, EpsilonAlpha2Beta1Flat, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat

__all__ = [
    "Composite",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "get",
    "names",
    "register",
]
