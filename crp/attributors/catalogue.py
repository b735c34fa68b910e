"""All methods by name: what they are, what can be set, and how they are run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp import composites
from crp.attributors.base import Attributor
from crp.attributors.baselines import _all_baselines
from crp.attributors.cam import CAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM
from crp.attributors.elrp import ELRP
from crp.attributors.gradient import Gradient, Saliency, Sensitivity, SimpleTaylor
from crp.attributors.noise import SmoothGrad
from crp.attributors.occlusion import Occlusion
from crp.attributors.path import IntegratedGradients
from crp.attributors.perturbation import MeaningfulPerturbation
from crp.attributors.shapley import ShapleySampling
from crp.attributors.target import Target
from crp.composites.registry import classes
from crp.engine.inputs import Inputs, Tensors
from crp.errors import InputError

#: Attributors: class, family, paper.
ATTRIBUTORS: Mapping[str, tuple[type[Attributor], str, str]] = MappingProxyType(
    {
        "cam": (CAM, "cam", "Zhou et al. 2016"),
        "grad_cam": (GradCAM, "cam", "Selvaraju et al. 2017"),
        "grad_cam_pp": (GradCAMPlusPlus, "cam", "Chattopadhyay et al. 2018"),
        "guided_grad_cam": (GuidedGradCAM, "cam", "Selvaraju et al. 2017"),
        "intgrad": (IntegratedGradients, "gradient", "Sundararajan et al. 2017"),
        "occlusion": (Occlusion, "perturbation", "Zeiler and Fergus 2014"),
        "saliency": (Saliency, "gradient", "Simonyan et al. 2014"),
        "sensitivity": (Sensitivity, "gradient", "Gevrey et al. 2003; Montavon et al. 2018"),
        "shapley_sampling": (ShapleySampling, "perturbation", "Castro et al. 2009"),
        "simple_taylor": (SimpleTaylor, "gradient", "Montavon et al. 2018"),
        "smoothgrad": (SmoothGrad, "gradient", "Smilkov et al. 2017"),
    }
)
#: Composites: family, paper. Others of the registry have no paper here.
COMPOSITES = MappingProxyType(
    {
        "alpha_beta": ("propagation", "Bach et al. 2015"),
        "attn_lrp": ("propagation", "Achtibat et al. 2024"),
        "beta_smooth": ("gradient", "Dombrowski et al. 2019"),
        "contrastive_excitation_backprop": ("propagation", "Zhang et al. 2018"),
        "cp_lrp": ("propagation", "Ali et al. 2022"),
        "deconvnet": ("gradient", "Zeiler and Fergus 2014"),
        "deep_taylor": ("propagation", "Montavon et al. 2017"),
        "deeplift": ("propagation", "Shrikumar et al. 2017"),
        "elrp": ("propagation", "Bach et al. 2015; Ancona et al. 2018"),
        "epsilon": ("propagation", "Bach et al. 2015"),
        "epsilon_alpha2_beta1": ("propagation", "Bach et al. 2015; Kohlbrenner et al. 2020"),
        "epsilon_alpha2_beta1_flat": ("propagation", "Bach et al. 2015; Lapuschkin et al. 2019"),
        "epsilon_gamma": ("propagation", "Montavon et al. 2019"),
        "epsilon_gamma_box": ("propagation", "Montavon et al. 2019"),
        "epsilon_plus": ("propagation", "Montavon et al. 2019; Kohlbrenner et al. 2020"),
        "epsilon_plus_flat": ("propagation", "Montavon et al. 2019; Lapuschkin et al. 2019"),
        "excitation_backprop": ("propagation", "Zhang et al. 2018"),
        "gamma": ("propagation", "Montavon et al. 2019"),
        "grad*input": ("gradient", "Shrikumar et al. 2016"),
        "gradient": ("gradient", "Simonyan et al. 2014"),
        "gradient_x_input": ("gradient", "Shrikumar et al. 2016"),
        "guided_backprop": ("gradient", "Springenberg et al. 2015"),
        "lrp_0": ("propagation", "Bach et al. 2015"),
        "lrp_cmp": ("propagation", "Kohlbrenner et al. 2020"),
        "relp": ("propagation", "arXiv:2508.21258"),
        "zplus": ("propagation", "Montavon et al. 2017"),
    }
)


class Method(NamedTuple):
    """A method that `crp.explain` knows.

    Attributes
    ----------
    name : str
    family : "gradient", "propagation", "cam" or "perturbation"
    options : dict of str to object
        Keywords with their defaults; ``...`` where one must be given.
    paper : str
    """

    name: str
    family: str
    options: dict[str, Any]
    paper: str

    @property
    def has_concepts(self) -> bool:
        """Whether it gives concepts of layers relevance that flows on; the layer of a class activation map has none."""
        # (integrated gradients have a path of its own for each layer, so that what is relevant in two does not add up)
        has_flow = self.family != "cam" and "quadrature" not in self.options
        return has_flow and {"layer", "condition", "mask_map"} <= self.options.keys()


@dataclass(frozen=True)
class Entry:
    """A method, and the function from model, inputs, target and options to results."""

    method: Method
    run: Callable[[nn.Module, Inputs, Target, Mapping[str, Any]], Tensors]


def entries() -> dict[str, Entry]:
    """All methods, in the order of their names; composites that were registered meanwhile too."""
    known = {
        name: Entry(Method(name, family, _options(kind, "model", "attr_output"), paper), partial(_attribute, kind))
        for name, (kind, family, paper) in ATTRIBUTORS.items()
    }
    flow = _options(Gradient, "model", "composite", "attr_output")
    for name, make in {**classes(), "elrp": ELRP, "grad*input": composites.GradientTimesInput}.items():
        own = _options(make)
        if "layer" in own:  # (the composite's layer, not the layer that is explained)
            own["classifier"] = own.pop("layer")
        if issubclass(make, composites.DeepLift):
            own["baseline"] = None
        family, paper = COMPOSITES.get(name, ("propagation", ""))
        known[name] = Entry(Method(name, family, own | flow, paper), partial(_propagate, make, set(flow)))
    own = {**_options(MeaningfulPerturbation, "model"), "batch_size": None}
    method = Method("meaningful_perturbation", "perturbation", own, "Fong and Vedaldi 2017")
    known[method.name] = Entry(method, _perturb)
    return dict(sorted(known.items()))


def _options(make: Callable[..., Any], *without: str) -> dict[str, Any]:
    """Keywords of a constructor with their defaults; ``...`` where there is none."""
    return {
        name: ... if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if name not in without
    }


def _attribute(
    kind: type[Attributor], model: nn.Module, inputs: Inputs, target: Target, given: Mapping[str, Any]
) -> Tensors:
    return _explain(kind(model, **_with_composite(given)), inputs, target)


def _explain(attributor: Attributor, inputs: Inputs, target: Target) -> Tensors:
    relevance = attributor(inputs, target)[1]
    return (relevance,) if isinstance(relevance, Tensor) else inputs.parts(relevance)


def _with_composite(given: Mapping[str, Any]) -> dict[str, Any]:
    named = given.get("composite")
    return {**given, "composite": composites.get(named)} if isinstance(named, str) else dict(given)


def _propagate(
    make: Callable[..., Composite],
    flow: set[str],
    model: nn.Module,
    inputs: Inputs,
    target: Target,
    given: Mapping[str, Any],
) -> Tensors:
    how = {name: value for name, value in given.items() if name in flow}
    own = {name: value for name, value in given.items() if name not in flow}
    if "classifier" in own:
        own["layer"] = own.pop("classifier")
    if "baseline" not in own:
        return _explain(Gradient(model, make(**own), **how), inputs, target)
    if "reference" in own:
        raise InputError("baseline and reference are both given; they are two names of one option")
    references = _all_baselines(own.pop("baseline"), inputs, model)
    parts = []
    # Each part has references of its own.
    for sample in torch.split(torch.arange(len(inputs)), how.get("batch_size") or len(inputs)):
        part, totals = inputs.select(sample), list[Tensor]()
        for number in range(len(references[0])):
            of_part = tuple(each[number, sample.to(each.device)] for each in references)
            composite = _OfSeveral(of_part, **own) if len(of_part) > 1 else make(reference=of_part[0], **own)
            found = _explain(Gradient(model, composite, **how), part, target.rows(sample))
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else [*found]
        parts.append([total / len(references[0]) for total in totals])
    return tuple(map(torch.cat, zip(*parts, strict=True)))


class _OfSeveral(composites.DeepLift):
    """DeepLIFT of a model of several inputs, each with a reference of its own."""

    def __init__(self, references: Tensors, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.each = [composites.DeepLift(reference=reference) for reference in references]

    def reference_for(self, data: Tensor, number: int) -> Tensor:
        return self.each[number].reference_for(data, 0)


def _perturb(model: nn.Module, inputs: Inputs, target: Target, given: Mapping[str, Any]) -> Tensors:
    if len(inputs.values) > 1:
        raise InputError(
            f"meaningful_perturbation explains models of one input, not of {len(inputs.values)}; all other methods pass"
            " on what they do not explain"
        )
    (data,) = inputs.explained
    own = _with_composite(given)
    size = own.pop("batch_size", None) or len(data)
    attributor = MeaningfulPerturbation(model, **own)
    heatmaps = []
    for sample in torch.split(torch.arange(len(data)), size):
        part = data[sample.to(data.device)]
        heatmap = attributor(part, target.rows(sample)).heatmap
        heatmaps.append(heatmap[:, None].expand(part.shape).to(part))
    return (torch.cat(heatmaps),)
