"""Presets, and what they are built from.

``canonizers="auto"`` is the first parameter of each: batch norm is merged unless you say otherwise.
"""

from crp.composites.attention import CPLRP, AttnLRP, RelP
from crp.composites.base import Composite
from crp.composites.by_depth import LRPCMP, EpsilonGamma
from crp.composites.deep_taylor import DeepTaylor
from crp.composites.deeplift import DeepLift
from crp.composites.excitation import ContrastiveExcitationBackprop, ExcitationBackprop
from crp.composites.gradient import BetaSmooth, DeconvNet, Gradient, GradientTimesInput, GuidedBackprop
from crp.composites.lrp import (
    LRP,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
)
from crp.composites.registry import get, names, register
from crp.composites.report import Report
from crp.composites.selection import Depth, First, Functions, Kind, Last
from crp.composites.uniform import UniformAlphaBeta, UniformEpsilon, UniformGamma, UniformLRP0, UniformZPlus

__all__ = [
    "CPLRP",
    "LRP",
    "LRPCMP",
    "AttnLRP",
    "BetaSmooth",
    "Composite",
    "ContrastiveExcitationBackprop",
    "DeconvNet",
    "DeepLift",
    "DeepTaylor",
    "Depth",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGamma",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "ExcitationBackprop",
    "First",
    "Functions",
    "Gradient",
    "GradientTimesInput",
    "GuidedBackprop",
    "Kind",
    "Last",
    "RelP",
    "Report",
    "UniformAlphaBeta",
    "UniformEpsilon",
    "UniformGamma",
    "UniformLRP0",
    "UniformZPlus",
    "get",
    "names",
    "register",
]
