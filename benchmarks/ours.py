"""Our candidates."""

from __future__ import annotations

import gc
from collections import deque
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from zennit.core import Composite

import crp.composites
from benchmarks.clocks import Run
from benchmarks.nets import PRESETS, gradient
from crp.attribution import CondAttribution
from crp.engine.kernel_calls import CallRecorder
from crp.engine.replayed import Replayed


def composite(preset: str) -> Composite:
    """One of our presets, with the keywords that both sides use."""
    made: Composite = getattr(crp.composites, preset)(**PRESETS[preset])
    return made


def gradient_of(model: nn.Module, data: Tensor) -> Run:
    """Forward pass and gradient by the input: the unit."""
    return lambda: gradient(model, data)


def attribution(model: nn.Module, data: Tensor, rules: Composite) -> Run:
    """One attribution of a batch, computed each time."""
    explain = CondAttribution(model)
    explain.replay = False
    return lambda: explain(data, [{"y": [0]}], rules)


def replayed(model: nn.Module, data: Tensor, rules: Composite) -> Run:
    """The same again and again, by a recording that was made before, whether or not it has paid by now."""
    explain = CondAttribution(model)
    if data.device.type == "cpu":
        explain._replayed = Replayed(CallRecorder(cost=0))
    for _ in range(8):
        explain(data, [{"y": [0]}], rules)
    return lambda: explain(data, [{"y": [0]}], rules)


def graph(model: nn.Module, data: Tensor, rules: Composite | None = None) -> Run:
    """Forward pass alone, with what it keeps for the backward pass; the second one, so that all else is known."""
    leaf, kept = data.clone().requires_grad_(), []

    def run() -> None:
        with rules.context(model) if rules is not None else nullcontext(model) as modified:
            kept.append(modified(leaf))

    run()
    kept.clear()
    gc.collect()
    return run


def concepts(model: nn.Module, data: Tensor, rules: Composite, layer: str, n: int, batch_size: int) -> Run:
    """Several concepts of a layer, for one sample; results are dropped one by one."""
    explain = CondAttribution(model)
    conditions = [{"y": [0], layer: [channel]} for channel in range(n)]

    def run() -> None:
        deque(explain.generate(data[:1], conditions, rules, batch_size=batch_size, verbose=False), maxlen=0)

    return run


def gradient_below(model: nn.Module, data: Tensor, layer: str, n: int) -> Run:
    """Gradient of a layer's output by the input, for ``n`` copies of one sample; the forward pass is done before."""
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _module, _args, output: outputs.append(output))
    leaf = data[:1].repeat_interleave(n, 0).requires_grad_()
    try:
        model(leaf)  # (its output is dropped, and with it the graph above the layer)
    finally:
        handle.remove()
    start = torch.ones_like(outputs[0])
    return lambda: torch.autograd.grad(outputs[0], leaf, start, retain_graph=True)


def backward(model: nn.Module, data: Tensor, rules: Composite) -> Run:
    """Backward pass of an attribution alone, again and again."""
    leaf = data.clone().requires_grad_()
    with rules.context(model) as modified:
        output = modified(leaf)[:, 0].sum()
    return lambda: torch.autograd.grad(output, leaf, retain_graph=True)
