"""Presets, and what they are built from.

``canonizers="auto"`` is the first parameter of each: batch norm is merged unless you say otherwise.
"""

from crp.composites.base import Composite
from crp.composites.deep_taylor import DeepTaylor
from crp.composites.excitation import ContrastiveExcitationBackprop, ExcitationBackprop
from crp.composites.gradient import BetaSmooth, DeconvNet, Gradient, GradientTimesInput, GuidedBackprop
from crp.composites.lrp import EpsilonAlpha2Beta1, EpsilonAlpha2Beta1Flat, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from crp.composites.registry import get, names, register

__all__ = [
    "BetaSmooth",
    "Composite",
    "ContrastiveExcitationBackprop",
    "DeconvNet",
    "DeepTaylor",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "ExcitationBackprop",
    "Gradient",
    "GradientTimesInput",
    "GuidedBackprop",
    "get",
    "names",
    "register",
]
