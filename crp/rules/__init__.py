"""Propagation rules: each says how one layer's relevance is shared among its inputs."""

from crp.rules.activations import Pass
from crp.rules.attention import DotProductAttention, MatrixProduct
from crp.rules.base import Rule
from crp.rules.constant import Constant
from crp.rules.deeplift import MaxPool, Rescale, RevealCancel
from crp.rules.excitation import ContrastiveExcitation, Excitation
from crp.rules.from_zennit import lift
from crp.rules.functional import GLU, Gate, Normalization, Quotient
from crp.rules.gamma import Gamma
from crp.rules.gradient import DeconvReLU, GuidedReLU, SmoothReLU
from crp.rules.input_layer import Flat, WSquare, ZBox
from crp.rules.kernels import register_attention
from crp.rules.layer import Layer, negative, positive
from crp.rules.linearized import Linearized
from crp.rules.lrp import LRP0, AlphaBeta, Epsilon, Norm, ZPlus
from crp.rules.pooling import SumPool
from crp.rules.terms import Term
from crp.rules.whole import Whole

__all__ = [
    "GLU",
    "LRP0",
    "AlphaBeta",
    "Constant",
    "ContrastiveExcitation",
    "DeconvReLU",
    "DotProductAttention",
    "Epsilon",
    "Excitation",
    "Flat",
    "Gamma",
    "Gate",
    "GuidedReLU",
    "Layer",
    "Linearized",
    "MatrixProduct",
    "MaxPool",
    "Norm",
    "Normalization",
    "Pass",
    "Quotient",
    "Rescale",
    "RevealCancel",
    "Rule",
    "SmoothReLU",
    "SumPool",
    "Term",
    "WSquare",
    "Whole",
    "ZBox",
    "ZPlus",
    "lift",
    "negative",
    "positive",
    "register_attention",
]
