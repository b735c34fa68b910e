"""Repeated attributions are recorded and replayed, and computed as usual when anything else than data has changed.

On the CPU, calls of kernels are recorded; they stand in for CUDA graphs, too.
"""

from __future__ import annotations

import copy
import ctypes
import pickle
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import Data, files_of, run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import crp.composites as composites
from crp import rules as of_crp
from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, EpsilonPlusFlat
from crp.engine import replay, replayed
from crp.engine.kernel_calls import CallRecorder
from crp.engine.model_state import State
from crp.engine.replay import Replays
from crp.engine.replayed import Replayed

LAYER = "features.7"


def replaying(model: nn.Module, ahead: bool = False) -> CondAttribution:
    """Attribution that records calls of kernels at the third time, and may replay them before it looks, as a GPU."""
    attribution, recorder = CondAttribution(model), CallRecorder(2, cost=0)
    recorder.runs_ahead = ahead
    attribution._replayed = Replayed(recorder)
    return attribution


def count(attribution: CondAttribution) -> int:
    """Replays so far that were right, or trusted."""
    return attribution._replayed.replays.replayed


def assert_same(attribution: CondAttribution, data: Tensor, conditions: Any, rules: Any, **keywords: Any) -> None:
    """Results are, to the last bit, those of an attribution that never replays."""
    plain = CondAttribution(attribution.model)
    plain.replay = False
    found, exact = (each(data, conditions, rules, **keywords) for each in (attribution, plain))
    for name in ("heatmap", "prediction"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0, atol=0)
    for name in ("activations", "relevances", "multipliers", "counted"):
        assert list(getattr(found, name) or ()) == list(getattr(exact, name) or ())
        for layer, tensor in (getattr(found, name) or {}).items():
            torch.testing.assert_close(tensor, getattr(exact, name)[layer], rtol=0, atol=0)
    assert found.encoding == exact.encoding


def warmed(attribution: CondAttribution, data: Tensor, rules: Any, conditions: Any = None, **keywords: Any) -> None:
    """Attribute until it is replayed and trusted."""
    for scale in (1, 2, 3, 4, 5):
        assert_same(attribution, data / scale, conditions or [{"y": [scale % 5]}], rules, **keywords)
    assert count(attribution) == 2


PRESETS = {
    "epsilon_plus_flat": EpsilonPlusFlat,
    "epsilon_gamma_box": lambda: composites.EpsilonGammaBox(low=-4.0, high=4.0),
    "epsilon_alpha2_beta1_flat": composites.EpsilonAlpha2Beta1Flat,
    "gradient": lambda: composites.get("gradient"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_data_and_targets_are_inputs(vgg_bn: nn.Module, images: Tensor, preset: str) -> None:
    attribution, rules = replaying(vgg_bn), PRESETS[preset]()
    warmed(attribution, images, rules, record_layer=["features.0", LAYER])
    assert_same(attribution, -images, [{"y": [i, 4]} for i in range(4)], rules, record_layer=["features.0", LAYER])
    assert count(attribution) == 3


def test_masks_are_inputs(vgg_bn: nn.Module, images: Tensor) -> None:
    """All concepts of a layer replay one recording."""
    attribution, rules = replaying(vgg_bn, ahead=True), EpsilonPlusFlat()
    plain = CondAttribution(vgg_bn)
    plain.replay = False
    conditions = [{"y": [i % 5], LAYER: [i % 8, 3], "features.3": [i % 6]} for i in range(20)]
    maps = [
        torch.cat([part.heatmap for part in each.generate(images[:1], conditions, rules, batch_size=2, verbose=False)])
        for each in (attribution, plain)
    ]
    torch.testing.assert_close(*maps, rtol=0, atol=0)
    assert count(attribution) == 10 - 1 - 2


def test_another_order_of_slots_is_another_recording(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    for number in range(6):
        for targets in ([1, 1, 1], [0, number % 5, 4]):  # (of one target, the upper part is sent back once)
            conditions = [{"y": [target], LAYER: [place]} for place, target in enumerate(targets)]
            assert_same(attribution, images[:1] + number, conditions, rules)
    assert count(attribution) > 4


def test_what_is_trusted_with_one_target_is_not_used_for_several(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images[:1], rules, [{"y": [1], LAYER: [place]} for place in range(4)])
    several = [{"y": [place], LAYER: [place]} for place in range(4)]
    for number in range(4):
        assert_same(attribution, images[:1] + number, several, rules)
    assert count(attribution) == 4


def test_results_are_the_callers_own(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    first = attribution(images, [{"y": [0]}], rules)
    kept = first.heatmap.clone()
    second = attribution(images * 2, [{"y": [1]}], rules)
    second.heatmap.zero_()
    assert torch.equal(first.heatmap, kept)
    assert_same(attribution, images, [{"y": [0]}], rules)
    leaf = images.clone().requires_grad_()
    result = attribution(leaf, [{"y": [2]}], rules)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.sum(1), result.heatmap)
    assert count(attribution) == 6


def test_an_error_comes_in_its_turn(vgg_bn: nn.Module, images: Tensor) -> None:
    """On a GPU, a part is computed while the one before is given; what goes wrong there does not take that one."""
    attribution, rules = replaying(vgg_bn, ahead=True), EpsilonPlusFlat()
    conditions = [{"y": [0], LAYER: [i % 8]} for i in range(10)]
    parts = attribution.generate(images[:1], conditions, rules, batch_size=2, verbose=False)
    plain = CondAttribution(vgg_bn)
    plain.replay = False
    exact = [part.heatmap for part in plain.generate(images[:1], conditions, rules, batch_size=2, verbose=False)]
    torch.testing.assert_close(next(parts).heatmap, exact[0], rtol=0, atol=0)
    with torch.no_grad():
        vgg_bn.features[0].weight.mul_(2)
    torch.testing.assert_close(next(parts).heatmap, exact[1], rtol=0, atol=0)  # (was computed before)
    with pytest.raises(ValueError, match=r"features.0.weight.* changed between parts"):
        next(parts)


@pytest.mark.parametrize("ahead", [True, False])
def test_memory_that_is_gone_is_not_read(vgg_bn: nn.Module, images: Tensor, ahead: bool) -> None:
    """A trusted recording is replayed before the model is looked at, but not where memory it reads was given back."""
    attribution, rules = replaying(vgg_bn, ahead), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    (entry,) = attribution._replayed.replays._entries.values()
    recording: Any = entry.recording
    recording.can_read = lambda: False
    recording.replay = lambda *_, **__: pytest.fail("it reads memory that is gone")
    for scale in (1, 2):
        assert_same(attribution, images * scale, [{"y": [scale]}], rules)
    assert count(attribution) == 4  # (by a recording of its own)


# --- what changes -----------------------------------------------------------------------------------------------------


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.features[0].weight.mul_(-1.5)


def replaced(model: nn.Module) -> None:
    model.features[3].weight = nn.Parameter(model.features[3].weight.detach() * 2)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def statistics(model: nn.Module) -> None:
    model.features[1].running_var.mul_(3.0)


def attribute(model: nn.Module) -> None:
    model.features[1].eps = 0.7


def other_layer(model: nn.Module) -> None:
    model.features[5] = nn.ELU().eval()


def other_class(model: nn.Module) -> None:
    model.features[5].__class__ = nn.Tanh


CHANGES = [in_place, replaced, loaded, statistics, attribute, other_layer, other_class]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_recorded_anew(
    vgg_bn: nn.Module, images: Tensor, change: Callable[[Any], None], ahead: bool
) -> None:
    attribution, rules = replaying(vgg_bn, ahead), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    change(vgg_bn)
    assert_same(attribution, images, [{"y": [0]}], rules)
    assert count(attribution) == 2
    for scale in (2, 3):
        assert_same(attribution, images * scale, [{"y": [0]}], rules)
    assert count(attribution) == 3


def test_a_class_whose_forward_is_replaced_is_recorded_anew(
    vgg_bn: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribution, rules, forward = replaying(vgg_bn), EpsilonPlusFlat(), nn.ReLU.forward
    warmed(attribution, images, rules)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: forward(self, x) * 2)
    assert_same(attribution, images, [{"y": [0]}], rules)
    assert count(attribution) == 2


class Configured(nn.Linear):
    """Reads its settings from an object, as models of Hugging Face do."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.config.scale if self.config._rule["on"] else y


def test_settings_in_an_object_are_compared(vectors: Tensor) -> None:
    model: Any = Configured(6, 4).double().eval()
    model.config = SimpleNamespace(scale=2.0, _rule={"on": True}, other=object())
    model.config.itself = model.config
    attribution, rules = replaying(model), composites.get("epsilon")
    warmed(attribution, vectors, rules, [{"y": [1]}])
    model.config.scale = 3.0
    assert_same(attribution, vectors, [{"y": [1]}], rules)
    model.config._rule["on"] = False
    assert_same(attribution, vectors, [{"y": [1]}], rules)
    assert count(attribution) == 2
    for scale in (2, 3):
        assert_same(attribution, vectors * scale, [{"y": [1]}], rules)
    assert count(attribution) == 3


class Quantized(nn.Linear):
    """Has a weight with a scale, which is an attribute of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        scale: float = getattr(self.weight, "scale")  # noqa: B009 (a tensor has none)
        return super().forward(x) * scale


def test_attributes_of_tensors_are_compared(vectors: Tensor) -> None:
    model = Quantized(6, 4).double().eval()
    vars(model.weight)["scale"] = 2.0
    attribution, rules = replaying(model), composites.get("epsilon")
    warmed(attribution, vectors, rules, [{"y": [1]}])
    vars(model.weight)["scale"] = 3.0
    assert_same(attribution, vectors, [{"y": [1]}], rules)
    assert count(attribution) == 2


def test_another_composite_is_recorded_anew(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), composites.get("epsilon", epsilon=0.1)
    warmed(attribution, images, rules)
    other = composites.get("epsilon", epsilon=10.0)
    assert_same(attribution, images, [{"y": [0]}], other)
    assert count(attribution) == 2


def test_other_shapes_have_recordings_of_their_own(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    assert_same(attribution, images[:2], [{"y": [0]}], rules)
    assert_same(attribution, images, [{"y": [0]}], rules, record_layer=[LAYER])
    assert_same(attribution, images.contiguous(memory_format=torch.channels_last), [{"y": [0]}], rules)
    assert count(attribution) == 2
    assert_same(attribution, images, [{"y": [3]}], rules)
    assert count(attribution) == 3


def test_only_some_recordings_are_kept(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, first = replaying(vgg_bn), EpsilonPlus()
    warmed(attribution, images, first)
    for number in range(replay.KEPT + 2):
        rules = EpsilonPlus()
        for scale in range(5):
            attribution(images / (scale + 1), [{"y": [0]}], rules)
        attribution(images, [{"y": [0]}], first)
        assert count(attribution) == 2 + 3 * (number + 1)  # (what is used is kept)
    assert len(attribution._replayed.replays._entries) == replay.KEPT
    attribution._replayed.replays.clear()
    assert_same(attribution, images, [{"y": [0]}], rules)
    assert len(attribution._replayed.replays._entries) == 1 and count(attribution) == 2 + 3 * (number + 1)


class Scaled(composites.Composite):
    """Has a rule whose scale is that of another object."""

    def __init__(self, scale: float) -> None:
        class ByOther(of_crp.Rule):
            def surrogate(self, layer: Any, a: Tensor) -> Tensor:
                return layer(a) + self.scaled(layer(a.clamp(min=0)))

        class Other:
            def __init__(self) -> None:
                self._scale = scale

            def scaled(self, z: Tensor) -> Tensor:
                return z * self._scale

        rule = ByOther()
        rule.scaled = Other().scaled  # type: ignore[attr-defined]
        super().__init__(layer_map=[(nn.Conv2d, rule)])


def test_a_rule_of_ones_own_with_another_setting_is_recorded_anew(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, composite = replaying(vgg_bn), Scaled(0.5)
    warmed(attribution, images, composite)
    composite.layer_map[0][1].scaled.__self__._scale = 5.0  # type: ignore
    assert_same(attribution, images, [{"y": [0]}], composite)
    assert count(attribution) == 2


@pytest.mark.parametrize("target", [0, 6])
def test_a_model_with_other_outputs_is_recorded_anew(vgg_bn: nn.Module, images: Tensor, target: int) -> None:
    attribution, composite = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, composite)
    vgg_bn.classifier[-1] = nn.Linear(vgg_bn.classifier[-1].in_features, 7).double().eval()
    for scale in (1, 2, 3, 4, 5):
        assert_same(attribution, images * scale, [{"y": [target]}], composite)
    assert count(attribution) == 4 - (target == 0)  # (its shapes are learned at the second call, or at the first)


def test_a_layer_with_other_channels_is_recorded_anew(vectors: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    attribution, composite = replaying(model), composites.get("epsilon")
    warmed(attribution, vectors, composite, [{"y": [1], "0": [2]}])
    model[0], model[2] = nn.Linear(6, 8).double().eval(), nn.Linear(8, 3).double().eval()
    for channel in (1, 2, 7, 7, 7):
        assert_same(attribution, vectors * channel, [{"y": [1], "0": [channel]}], composite)
    assert count(attribution) == 3


# --- what cannot be replayed ------------------------------------------------------------------------------------------


def test_the_switch(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution = replaying(vgg_bn)
    attribution.replay = False
    for _ in range(6):
        attribution(images, [{"y": [0]}], EpsilonPlusFlat())
    assert count(attribution) == 0 and not attribution._replayed.replays._entries


def test_a_cpu_records_once_that_pays(vgg_bn: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = CallRecorder()
    assert not recorder.pays(4, 0.001, 0.001) and recorder.pays(5, 0.001, 0.001)
    assert not recorder.pays(29, 1.0, 0.1) and recorder.pays(30, 1.0, 0.1)
    monkeypatch.setattr("crp.engine.replayed._SAVED", 1.0)
    attribution, rules = CondAttribution(vgg_bn), EpsilonPlusFlat()
    for number in range(8):
        assert_same(attribution, images * (number + 1), [{"y": [0]}], rules)
        assert count(attribution) == max(0, number - 4)


def test_other_devices_do_not_record() -> None:
    assert not Replays().serves(torch.device("meta")) and not Replays().runs_ahead(torch.device("meta"))


@pytest.mark.parametrize(
    "rules", [composites.get("gradient"), composites.get("deeplift")], ids=["gradient", "deeplift"]
)
def test_parts_that_share_a_forward_pass_are_not_replayed_on_a_cpu(
    vgg_bn: nn.Module, images: Tensor, rules: Any
) -> None:
    attribution, passes = replaying(vgg_bn), []
    conditions = [{"y": [0], LAYER: [i % 8]} for i in range(12)]
    for _ in range(3):
        parts = attribution.generate(images[:1], conditions, rules, batch_size=2, verbose=False)
        passes.append(len([*parts]))
    assert passes == [6] * 3 and count(attribution) == 0


def test_hooks_of_others_see_every_call(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules, seen = replaying(vgg_bn), EpsilonPlusFlat(), []
    warmed(attribution, images, rules)
    handle = vgg_bn.features[2].register_forward_hook(lambda *_: seen.append(1))
    attribution(images, [{"y": [0]}], rules)
    assert seen and count(attribution) == 2
    handle.remove()
    assert_same(attribution, images, [{"y": [0]}], rules)
    assert count(attribution) == 3


class Keeps(nn.Module):
    """Keeps what a layer puts out, or a gradient that arrives there, for whoever takes it away."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.below, self.above, self.kept = nn.Linear(6, 5), nn.Linear(5, 3), list[Tensor]()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        h = self.below(x)
        if self.what == "output":
            self.kept.append(h.detach())
        elif h.requires_grad:
            h.register_hook(self.kept.append)
        return self.above(h.relu())


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_what_a_model_keeps_is_of_every_call(vectors: Tensor, what: str) -> None:
    model, rules = Keeps(what).double().eval(), EpsilonPlus()
    attribution = replaying(model)
    for number in range(6):
        attribution(vectors + number, [{"y": 1}], rules)
        assert model.kept, f"call {number}"
        model.kept.clear()
    assert count(attribution) == 0


@pytest.mark.parametrize("ahead", [True, False])
def test_modes_of_others_see_every_call(vgg_bn: nn.Module, images: Tensor, ahead: bool) -> None:
    class Counting(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += "convolution" in func.overloadpacket.__name__
            return func(*args, **(kwargs or {}))

    attribution, rules = replaying(vgg_bn, ahead), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    plain = CondAttribution(vgg_bn)
    plain.replay = False
    with Counting() as usual:
        plain(images, [{"y": [0]}], rules)
    with Counting() as mode:
        attribution(images, [{"y": [0]}], rules)
    assert mode.n == usual.n > 3 and count(attribution) == 2  # (not even a replay of which nothing is taken)


def test_hooks_of_others_on_saved_tensors_see_every_call(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), composites.get("gradient")
    warmed(attribution, images, rules)
    twice = torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2 if t.is_floating_point() else t, lambda t: t)
    with twice:
        assert_same(attribution, images, [{"y": [0]}], rules)
    assert count(attribution) == 2


class Attending(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.view(3, 3, 2)).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(y, y, y).flatten(1)


def test_another_kernel_of_attention_is_recorded_anew() -> None:
    attribution, rules = replaying(Attending(2, 8).eval()), composites.get("gradient")
    data = torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(0))
    for number in range(12):
        with sdpa_kernel(SDPBackend.MATH) if number > 5 else nullcontext():
            assert_same(attribution, data[number], [{"y": [1]}], rules)
    assert count(attribution) == 6


def test_what_is_asked_of_kernels_is_heard(vgg_bn: nn.Module, images: Tensor) -> None:
    """A CUDA graph has the kernels that were chosen while recording, also those that are not deterministic."""
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(attribution, images, [{"y": [0]}], rules)
    finally:
        torch.use_deterministic_algorithms(False)
    assert count(attribution) == 2
    assert_same(attribution, images, [{"y": [0]}], rules)
    assert count(attribution) == 3


def test_training_mode_is_warned_of_each_time(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    vgg_bn.train()
    for _ in range(6):
        with pytest.warns(UserWarning, match="training mode"):
            attribution(images, [{"y": [0]}], rules)
    vgg_bn.eval()
    assert count(attribution) == 2


class Deciding(nn.Module):
    """Takes a way through the net that depends on values, on its history, or on nothing."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)
        self.by, self.calls, self.history = by, 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "value":
            return self.one(x) if x.sum() > 0 else self.two(x)
        if self.by == "attribute":
            self.calls += 1
        if self.by == "list":
            self.history.append(1)
        if self.by == "data":
            self.two.weight.data = self.two.weight.data * 1.0
        if self.by == "warning":
            warnings.warn("look here", stacklevel=1)
        odd = self.calls % 2 or len(self.history) % 2
        return self.one(x) if odd else self.two(x)


@pytest.mark.parametrize("by", ["value", "attribute", "list", "data", "warning"])
@pytest.mark.filterwarnings("ignore:look here")
def test_models_that_decide_are_computed_each_time(vectors: Tensor, by: str) -> None:
    model = Deciding(by).double().eval()
    attribution, rules, other = replaying(model), composites.get("epsilon"), copy.deepcopy(model)
    plain = CondAttribution(other)
    plain.replay = False
    for number in range(8):
        data = vectors * (-1) ** number
        found, exact = (each(data, [{"y": [number % 4]}], rules).heatmap for each in (attribution, plain))
        assert torch.equal(found, exact)
    assert count(attribution) == 0


class Drawing(nn.Linear):
    """Scales its output by a random number of the host."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__(6, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.draw())


@pytest.mark.filterwarnings("ignore:Drawing puts out something else")
@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_what_is_tried_once_more_draws_no_random_numbers(vectors: Tensor, draw: Callable[[], float]) -> None:
    """When something is recorded depends on a clock, and results of a seed must not."""
    net, found = Drawing(draw).double().eval(), []
    CondAttribution(net)(vectors, [{"y": 1}], EpsilonPlus())
    for on in (True, False):
        attribution, rules = replaying(net), EpsilonPlus()
        attribution.replay = on
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        found.append([attribution(vectors, [{"y": 1}], rules).prediction for _ in range(6)])
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_scripted_part_is_computed_each_time(vectors: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.Tanh())).double().eval()
    attribution, rules = replaying(model), composites.get("gradient")
    for number in range(5):
        assert_same(attribution, vectors * number, [{"y": [1]}], rules)
    assert count(attribution) == 0


class Neighbours(nn.Module):
    """A layer whose outputs are added up by a sparse matrix."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.own = nn.Linear(6, 3)
        matrix = torch.tensor([[0.0, 1, 0], [2, 0, 0], [0, 3, 1]], dtype=torch.float64)
        self.register_buffer("matrix", matrix.to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.get_buffer("matrix"), self.own(x).T).T


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_model_with_a_sparse_tensor_is_computed_each_time(vectors: Tensor, layout: torch.layout) -> None:
    attribution = replaying(Neighbours(layout).double().eval())
    rules = composites.get("gradient")
    for number in range(5):
        assert_same(attribution, vectors * number, [{"y": [1]}], rules)
    assert count(attribution) == 0


def test_hooks_on_all_modules_see_every_call(vectors: Tensor, mlp: nn.Module) -> None:
    attribution, rules, seen = replaying(mlp), composites.get("epsilon"), list[nn.Module]()
    for number in range(5):
        attribution(vectors * number, [{"y": [1]}], rules)
    assert count(attribution) == 2
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        for number in range(1, 4):
            assert_same(attribution, vectors * number, [{"y": [1]}], rules)
            assert seen.count(mlp[0]) == 2 * number
    finally:
        handle.remove()
    assert count(attribution) == 2


def test_much_that_starts_is_not_sent_for_a_replay(vectors: Tensor, mlp: nn.Module, monkeypatch: Any) -> None:
    counts = []
    for most in (16, 15):  # as many as the output has, or less
        monkeypatch.setattr(replayed, "_MOST_STARTED", {"cpu": most})
        attribution, rules = replaying(mlp), composites.get("epsilon")
        for number in range(5):
            assert_same(attribution, vectors * number, [{"y": [1]}] * len(vectors), rules)
        counts.append(count(attribution))
    assert counts[0] > counts[1] == 0


def test_what_leads_to_a_sparse_tensor_never_holds() -> None:
    values = [torch.eye(2).to_sparse(), [1.0]]
    assert not State(*values).holds(*values)
    assert State(values[1]).holds(values[1])


class WithoutLength(tuple):
    """Entries whose number is another one, as of irreducible representations."""

    __slots__ = ()

    def __len__(self) -> int:
        raise NotImplementedError


class Kinds(nn.Sequential):
    """Scales by what such a tuple holds, which counts the calls."""

    def forward(self, x: Tensor) -> Tensor:
        settings = self.kinds[0]
        settings["calls"] += 1
        return super().forward(x) * settings["scale"]


def test_what_a_container_without_length_holds_is_compared_and_put_back(vectors: Tensor, mlp: nn.Module) -> None:
    model = Kinds(mlp).eval()
    model.kinds = WithoutLength([settings := {"calls": 0, "scale": 1.0}])
    attribution, composite = CondAttribution(model), composites.get("epsilon")
    before = attribution(vectors, [{"y": [1]}], composite).heatmap
    assert settings["calls"] == 1  # (others only looked at the model)
    state = State(model)
    assert state.holds(model)
    settings["scale"] = 2.0
    assert not state.holds(model)
    torch.testing.assert_close(attribution(vectors, [{"y": [1]}], composite).heatmap, 2 * before)


class Peeking(nn.Linear):
    """Reads memory in a way that nobody can see."""

    def forward(self, x: Tensor) -> Tensor:
        (first,) = (ctypes.c_double * 1).from_address(x.data_ptr())
        return super().forward(x * (2 if first > 0 else 3))


@pytest.mark.parametrize("ahead", [True, False])
def test_what_depends_on_unseen_python_is_found_out(vectors: Tensor, ahead: bool) -> None:
    """A replay is compared with the computation once more, on other data."""
    attribution, rules = replaying(Peeking(6, 4).double().eval(), ahead), composites.get("epsilon")
    for sign in (1, 1, 1, -1, 1, -1):
        assert_same(attribution, vectors[:1].abs() * sign, [{"y": [1]}], rules)
    assert count(attribution) == 1


#: Calls before which weights change, and how many of 60 are replayed.
CHANGED = {
    "each third": (range(0, 60, 3), 2),
    "each fourth": (range(0, 60, 4), 4),
    "each sixth, as often again": (range(0, 60, 6), 40),
    "each third, with a pause": ((*range(0, 20, 3), 30, *range(33, 60, 3)), 11),
}


@pytest.mark.parametrize("when", CHANGED)
def test_recordings_that_are_discarded_soon_are_made_less_often(vectors: Tensor, when: str) -> None:
    model = nn.Linear(6, 4).double().eval()
    changes, replays = CHANGED[when]
    attribution, rules = replaying(model), composites.get("epsilon")
    attribution(vectors, [{"y": [0]}], rules)
    for number in range(60):
        if number in changes:
            model.weight.data.mul_(-1.5)
        assert_same(attribution, vectors / (number + 1), [{"y": [0]}], rules)
    assert count(attribution) == replays


class Splitting(nn.Module):
    """Runs a layer on as many entries as the values of its data say."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        entries = x.reshape(-1, 3) if float(x.detach().amax()) > 5 else x[:, :3]
        y = self.one(entries)
        return self.two(y.reshape(len(x), -1, 3).sum(1))


def test_samples_that_have_more_entries_at_a_later_call(vectors: Tensor) -> None:
    attribution, rules = replaying(Splitting().double().eval()), composites.get("epsilon")
    small = vectors / vectors.amax(1, keepdim=True)  # (each decides as all)
    for data in (small, small * 2, small * 10, small * 20, small * 3, small * 4):
        assert_same(attribution, data, [{"y": [1]}], rules, record_layer=["one"])
    assert count(attribution) == 0


def test_data_of_another_sign_goes_another_way(vgg_bn: nn.Module, images: Tensor) -> None:
    """Where no input is negative, z⁺ is one convolution; as soon as one is, two serve all."""
    attribution, rules = replaying(vgg_bn), EpsilonPlus()
    recordings = attribution._replayed.replays
    warmed(attribution, images.abs(), rules)
    signs = (1, 1, -1, 1, -1, 1, 1)
    for scale, sign in enumerate(signs):
        assert_same(attribution, images.abs() * sign * (scale + 1), [{"y": [1]}], rules)
    (entry,) = recordings._entries.values()
    assert entry.missed == 1 and entry.trusted and count(attribution) == 2 + len(signs)


class Turning(nn.Module):
    """One of two layers has inputs of both signs, the other has not, as the data has it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(1, 4, 3), nn.Conv1d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x[:, None] * 2) + self.two(-x[:, None])).sum(2)


def test_data_that_goes_another_way_each_time_is_computed(vectors: Tensor) -> None:
    attribution, rules = replaying(Turning().double().eval()), EpsilonPlus(canonizers=[])
    for place in range(12):
        assert_same(attribution, vectors.abs() * (place + 1) * (-1) ** (place // 4), [{"y": [1]}], rules)
    (entry,) = attribution._replayed.replays._entries.values()
    assert entry.refused and entry.recording is None and count(attribution) > 2


OVERRIDES: dict[str, Callable[..., Any]] = {
    "select_output": lambda self, output: output * 2,
    "relevance_init": lambda self, prediction, targets, init: prediction,
    "heatmap_modifier": lambda self, data, on_device=None: data.grad.sum(1) + 1,
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_methods_of_a_subclass_are_called_each_time(vgg_bn: nn.Module, images: Tensor, name: str) -> None:
    calls = []

    def counted(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        return OVERRIDES[name](*args, **keywords)

    attribution = type("Own", (CondAttribution,), {name: counted})(vgg_bn)
    attribution._replayed = Replayed(CallRecorder(2, cost=0))
    for _ in range(6):
        attribution(images, [{"y": [0]}], EpsilonPlusFlat())
    assert len(calls) >= 6 and not attribution._replayed.replays._entries


@pytest.mark.parametrize(
    "keywords",
    [{"init_rel": 1.0}, {"init_rel": lambda y: y * 2}, {"start_layer": LAYER}, {"on_device": "cpu"}],
    ids=["number", "function", "start layer", "device"],
)
def test_other_starts_are_computed_each_time(vgg_bn: nn.Module, images: Tensor, keywords: dict[str, Any]) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    condition = {} if "start_layer" in keywords else {"y": [0]}
    for _ in range(6):
        assert_same(attribution, images, [condition], rules, **keywords)
    assert not attribution._replayed.replays._entries


def test_inference_mode_is_refused_each_time(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) forbids"):
        attribution(images, [{"y": [0]}], rules)


def test_other_masks_are_computed_each_time(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules, calls = replaying(vgg_bn), EpsilonPlusFlat(), []

    def mask(row: int, ids: Any, layer: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: calls.append(row) or gradient * 0.5

    for _ in range(6):
        attribution(images, [{"y": [0], LAYER: [1]}], rules, mask_map=mask)
    assert len(calls) == 6 * 4 and count(attribution) == 0


def test_references_of_each_sample_are_computed_each_time(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), composites.get("deeplift", reference=torch.zeros_like(images))
    for _ in range(6):
        assert_same(attribution, images, [{"y": [0]}], rules)
    assert not attribution._replayed.replays._entries


def test_errors_are_those_of_the_computation(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    with pytest.raises(IndexError, match=r"row 2: 'y' is \[7\], but the model has outputs 0 to 4"):
        attribution(images, [{"y": [0]}, {"y": [1]}, {"y": [7]}, {"y": [2]}], rules)
    with pytest.raises(KeyError, match=r"features\.99"):
        attribution(images, [{"y": [0]}], rules, ["features.99"])
    for _ in range(6):
        with pytest.raises(RuntimeError, match="does not reach"):
            attribution(images, [{"y": [0], "features.0": [0], LAYER: [0]}], rules)
    assert_same(attribution, images, [{"y": [1]}], rules)
    assert count(attribution) == 3


def test_an_error_while_recording_is_no_obstacle(vgg_bn: nn.Module, images: Tensor) -> None:
    class Failing:
        runs_ahead, tolerance = False, 0.0

        def pays(self, *_: Any) -> bool:
            return True

        def record(self, run: Any, inputs: Any) -> Any:
            raise torch.OutOfMemoryError("too little")

    attribution, rules = CondAttribution(vgg_bn), EpsilonPlusFlat()
    attribution._replayed = Replayed(Failing())
    for _ in range(6):
        assert_same(attribution, images, [{"y": [0]}], rules)
    assert count(attribution) == 0


# --- lifetimes --------------------------------------------------------------------------------------------------------


def test_another_process_records_for_itself(vgg_bn: nn.Module, images: Tensor) -> None:
    attribution, rules = replaying(vgg_bn), EpsilonPlusFlat()
    warmed(attribution, images, rules)
    for other in (pickle.loads(pickle.dumps(attribution)), copy.deepcopy(attribution)):
        assert count(other) == 0
        warmed(other, images, rules)


def test_the_model_is_left_as_it_was(vgg_bn: nn.Module, images: Tensor, untouched: Any) -> None:
    with untouched(vgg_bn):
        warmed(replaying(vgg_bn), images, EpsilonPlusFlat())


def test_mining_by_replays_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(tmp_path / "plain", Data(40))
    replays: list[Replays] = []

    class Kept(Replayed):
        def __init__(self, recorder: Any = None) -> None:
            super().__init__(CallRecorder(2, cost=0))
            replays.append(self.replays)

    monkeypatch.setattr("crp.attribution.Replayed", Kept)
    table = run(tmp_path / "replayed", Data(40))
    assert files_of(table.path) == files_of(reference.path)
    assert sum(each.replayed for each in replays) > 3
