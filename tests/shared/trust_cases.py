"""Entry points of the package on one small net, and all that must be as before after a call."""

from __future__ import annotations

import random
import signal
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
import zennit.composites
from model_state import state_of
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from zennit.canonizers import SequentialMergeBatchNorm

import crp
from crp.attribution import AttributionGraph, CondAttribution
from crp.attributors import GradCAM, IntegratedGradients, Occlusion, SmoothGrad
from crp.composites import DeepLift, EpsilonPlus, EpsilonPlusFlat
from crp.concepts import ChannelConcept
from crp.engine.turns import TURNS
from crp.helper import get_output_shapes
from crp.layers.interrupts import _Waiting
from crp.trace.graph import trace_model_graph
from crp.visualization.synthesis import logit, maximize

LAYERS = ["0", "3"]


def net(seed: int = 0) -> nn.Module:
    """(n, 2, 6, 6) -> (n, 3), with batch norm; convolutions are ``0`` and ``3``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(48, 3),
        ).double().eval()  # fmt: skip
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 1.5)
        return model


def images(n: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zennit_merged() -> zennit.composites.EpsilonPlusFlat:
    return zennit.composites.EpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()])


CONDITIONS = [{"y": 1}, {"y": 2, "3": [0]}, {"y": 0, "3": [1], "0": [2, 3]}]


def _graph(model: nn.Module, data: Tensor, composite: Any) -> Any:
    graph = trace_model_graph(model, data[:1], LAYERS)
    ask = AttributionGraph(CondAttribution(model), graph, dict.fromkeys(LAYERS, ChannelConcept()))
    return ask(data[:1], composite, 1, "3", target=1, width=[2], verbose=False)


def _generate(model: nn.Module, data: Tensor, composite: Any, **keywords: Any) -> list[Tensor]:
    parts = CondAttribution(model).generate(data, CONDITIONS, composite, ["0"], batch_size=2, verbose=False, **keywords)
    return [part.heatmap for part in parts]


def _abandoned(model: nn.Module, data: Tensor, composite: Any) -> Tensor:
    parts = CondAttribution(model).generate(data, CONDITIONS, composite, batch_size=2, verbose=False)
    return next(parts).heatmap


#: Entry points: ``(model, data) -> anything``.
ENTRIES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "call": lambda m, x: CondAttribution(m)(x, CONDITIONS, EpsilonPlusFlat(), ["0"]).heatmap,
    "call past masks": lambda m, x: (
        CondAttribution(m)(x, CONDITIONS, EpsilonPlus(), ["0"], exclude_parallel=False).heatmap
    ),
    "call of zennit": lambda m, x: CondAttribution(m)(x, CONDITIONS, zennit_merged(), ["0"]).heatmap,
    "call without a composite": lambda m, x: CondAttribution(m)(x, CONDITIONS, None, ["0"]).heatmap,
    "deeplift": lambda m, x: CondAttribution(m)(x, CONDITIONS, DeepLift(), ["0"]).heatmap,
    "generate": lambda m, x: _generate(m, x, EpsilonPlusFlat()),
    "generate of zennit": lambda m, x: _generate(m, x, zennit_merged(), exclude_parallel=False),
    "abandoned generate": lambda m, x: _abandoned(m, x, EpsilonPlusFlat()),
    "absorbed": lambda m, x: CondAttribution(m).absorbed(x, CONDITIONS, EpsilonPlus()).input,
    "graph": lambda m, x: _graph(m, x, EpsilonPlus()),
    "by hand": lambda m, x: _by_hand(m, x),
    "report": lambda m, x: EpsilonPlusFlat().report(m, x),
    "shapes": lambda m, x: get_output_shapes(m, x[:1], LAYERS),
    "smoothgrad": lambda m, x: SmoothGrad(m, n=2)(x, 1)[1],
    "integrated gradients": lambda m, x: IntegratedGradients(m, EpsilonPlus(), steps=2)(x, 1)[1],
    "occlusion": lambda m, x: Occlusion(m, window_shape=3, step=3)(x, 1)[1],
    "grad_cam": lambda m, x: GradCAM(m, layer="3")(x, 1)[1],
    "explain": lambda m, x: crp.explain("epsilon_plus", m, x, 1),
    "synthesis": lambda m, x: maximize(m, logit(1), x.shape, steps=3, composite=EpsilonPlus(), start=x).images,
}


def _by_hand(model: nn.Module, data: Tensor) -> Tensor:
    leaf = data.clone().requires_grad_()
    with EpsilonPlus().context(model):
        (relevance,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    return relevance


# (torch 2.4 does not tell)
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a call must leave as it was: of the model, of torch, and of this package."""
    hooks = nn.modules.module
    return {
        "model": state_of(model),
        "attached": crp.attached(model),
        "held": {key: value for key, value in TURNS._held.items() if value[0] == threading.get_ident()},
        "modes": len(_get_current_function_mode_stack()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "tensor hooks": _saved_tensors_hooks(True),
        "handles": torch.utils.hooks.RemovableHandle.__init__,
        "hooks of all modules": (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)),
        "warnings": list(warnings.filters),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "waiting": _Waiting.depth,
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


class Stop(BaseException):
    """An interrupt of these tests."""


def stop(number: int, frame: FrameType | None) -> None:
    raise Stop


def interrupted(call: Callable[[], Any], delay: float) -> bool:
    """Run a call that a signal interrupts after ``delay`` seconds; whether it came in time."""
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        try:
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Stop:
        return True
    finally:
        signal.signal(signal.SIGALRM, before)
    return False
