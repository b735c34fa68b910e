"""Methods that are no composite, in zennit's protocol: ``output, attribution = method(data, target)``.

Each takes a model and, where gradients are used, a composite that says what takes their place. `crp.explain` calls any
of them by name.
"""

from crp.attributors.base import Attributor
from crp.attributors.cam import CAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM, LayerCAM
from crp.attributors.elrp import ELRP, ActivationRatio
from crp.attributors.gradient import Gradient, Saliency, Sensitivity, SimpleTaylor
from crp.attributors.noise import SmoothGrad
from crp.attributors.occlusion import Occlusion
from crp.attributors.path import IntegratedGradients
from crp.attributors.perturbation import MeaningfulPerturbation
from crp.attributors.shapley import ShapleySampling
from crp.attributors.target import Classes, Mask, Neuron, Score, Start, Target

__all__ = [
    "CAM",
    "ELRP",
    "ActivationRatio",
    "Attributor",
    "Classes",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GuidedGradCAM",
    "IntegratedGradients",
    "LayerCAM",
    "Mask",
    "MeaningfulPerturbation",
    "Neuron",
    "Occlusion",
    "Saliency",
    "Score",
    "Sensitivity",
    "ShapleySampling",
    "SimpleTaylor",
    "SmoothGrad",
    "Start",
    "Target",
]
