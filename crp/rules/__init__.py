"""Propagation rules: each says how one layer's relevance is shared among its inputs."""

from crp.rules.base import Rule, Term
from crp.rules.first import Flat, WSquare, ZBox
from crp.rules.layer import Layer
from crp.rules.lift import lift
from crp.rules.lrp import LRP0, AlphaBeta, Epsilon, Gamma, Norm, Pass, ZPlus

__all__ = [
    "LRP0",
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "Layer",
    "Norm",
    "Pass",
    "Rule",
    "Term",
    "WSquare",
    "ZBox",
    "ZPlus",
    "lift",
]
