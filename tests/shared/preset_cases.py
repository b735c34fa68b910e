"""Every preset with rules of its own, and models that are one function in two spellings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from core_cases import Maps
from torch import Tensor, nn

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.composites import Composite

BOX = {"low": -4.0, "high": 4.0}
#: Every preset of layer-wise relevance propagation, and those that are built like it.
LRP_PRESETS: dict[str, Callable[..., Composite]] = {
    "lrp_0": partial(composites.get, "lrp_0"),
    "epsilon": partial(composites.get, "epsilon", epsilon=0.1),
    "gamma": partial(composites.get, "gamma"),
    "zplus": partial(composites.get, "zplus"),
    "alpha_beta": partial(composites.get, "alpha_beta"),
    "epsilon_plus": partial(composites.get, "epsilon_plus"),
    "epsilon_plus_flat": partial(composites.get, "epsilon_plus_flat"),
    "epsilon_alpha2_beta1": partial(composites.get, "epsilon_alpha2_beta1"),
    "epsilon_alpha2_beta1_flat": partial(composites.get, "epsilon_alpha2_beta1_flat"),
    "epsilon_gamma": partial(composites.get, "epsilon_gamma"),
    "epsilon_gamma_box": partial(composites.get, "epsilon_gamma_box", **BOX),
    "lrp_cmp": partial(composites.get, "lrp_cmp"),
    "lrp_cmp_box": partial(composites.get, "lrp_cmp", first="box", **BOX),
    "deep_taylor": partial(composites.get, "deep_taylor"),
    "deep_taylor_box": partial(composites.get, "deep_taylor", **BOX),
    "excitation_backprop": partial(composites.get, "excitation_backprop"),
    "contrastive_excitation_backprop": partial(composites.get, "contrastive_excitation_backprop"),
}
#: Those of which a rule stands at the model's input.
FIRST_PRESETS = {
    name: LRP_PRESETS[name]
    for name in ("epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box", "lrp_cmp", "lrp_cmp_box",
                 "deep_taylor", "deep_taylor_box")
}  # fmt: skip
#: Presets that change the backward pass of activations only.
ACTIVATION_PRESETS: dict[str, Callable[..., Composite]] = {
    "deeplift": partial(composites.get, "deeplift"),
    "guided_backprop": partial(composites.get, "guided_backprop"),
    "deconvnet": partial(composites.get, "deconvnet"),
    "beta_smooth": partial(composites.get, "beta_smooth"),
}
#: One rule of each kind, where presets do not matter.
FEW = {
    name: LRP_PRESETS[name]
    for name in ("epsilon", "gamma", "alpha_beta", "epsilon_plus_flat", "epsilon_gamma_box", "deep_taylor")
}


def numbers(*shape: int, seed: int = 7) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module, seed: int = 1) -> nn.Module:
    """Model in float64 and evaluation mode, with seeded parameters and statistics of batch norm."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() < 2 else max(parameter[0].numel(), 1) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return model


def ended(layer: nn.Module, data: Tensor) -> nn.Module:
    """Net of a layer and a dense one behind it."""
    size = layer.double()(data).flatten(1).shape[1]
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(size, 3)).double().eval()


def maps(model: nn.Module, data: Tensor, composite: Composite | None, target: object = 1, **keywords: object) -> Tensor:
    """Relevance of every entry of the data for a target."""
    return Maps(model)(data, [{"y": target}], composite, **keywords).heatmap


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value that is right."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found - wanted).abs().max() / wanted.abs().max())


def assert_same_map(
    model: nn.Module, plain: nn.Module, data: Tensor, composite: Composite, tolerance: float = 1e-9
) -> None:
    """Assert that two spellings of one function predict and explain alike."""
    predicted = plain(data.clone()).detach()
    assert off(model(data.clone()).detach(), predicted) <= 1e-12, "the models are two functions"
    targets = list(range(predicted.shape[1]))  # (some rules give nothing to an output that is negative)
    found, wanted = (maps(m, data, composite, targets) for m in (model, plain))
    assert wanted.abs().max() > 0
    assert off(found, wanted) <= tolerance


def kept(model: nn.Module, data: Tensor, composite: Composite, conditions: Iterable[dict] = ({"y": 1},), **keywords):
    """Account of the relevance that operations keep."""
    return CondAttribution(model).absorbed(data, list(conditions), composite, **keywords)


def assert_closes(model: nn.Module, data: Tensor, composite: Composite, tolerance: float = 1e-9, **keywords) -> None:
    """Assert that what arrives at the input and what is kept are all that started."""
    found = kept(model, data, composite, **keywords)
    missing = (found.input + found.total - found.initial).abs().max()
    assert found.initial.abs().max() > 0
    assert missing <= tolerance * found.initial.abs().max(), f"missing: {float(missing)}"
