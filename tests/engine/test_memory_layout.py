"""Nets with depthwise convolutions run with the channels last: the same numbers in the usual layout, and no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mining_cases import files_of
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import DeepLift, EpsilonAlpha2Beta1Flat, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from crp.concepts import ChannelConcept
from crp.engine import memory_layout
from crp.engine.independence import check_independent, check_keeps_nothing
from crp.engine.inputs import Inputs
from crp.engine.kernel_calls import CallRecorder
from crp.engine.memory_layout import is_faster_channels_last
from crp.engine.replayed import Replayed
from crp.visualization.mining.run import mine

N = 32
COMPOSITES = {
    "EpsilonPlus": EpsilonPlus,
    "EpsilonPlusFlat": EpsilonPlusFlat,
    "EpsilonAlpha2Beta1Flat": EpsilonAlpha2Beta1Flat,
    "EpsilonGammaBox": lambda: EpsilonGammaBox(low=-3.0, high=3.0),
    "DeepLift": DeepLift,
}


class Net(nn.Module):
    """A depthwise separable block, with a residual sum, and a head that flattens as ``head`` says."""

    def __init__(self, head: Callable[[Tensor], Tensor] = lambda x: x.flatten(1)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU6()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6 * 16, 4)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.pointwise(self.act(self.depthwise(x)))
        found: Tensor = self.fc(self.head(nn.functional.avg_pool2d(x, 2)))
        return found


def made(head: Callable[[Tensor], Tensor] = lambda x: x.flatten(1)) -> Net:
    torch.manual_seed(0)
    net = Net(head).eval()
    net.norm.running_mean += 0.2
    return net


@pytest.fixture
def data() -> Tensor:
    return torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each forward pass, whether its data had the channels last."""
    found: list[bool] = []
    run = memory_layout.Inputs.run

    def noted(self: Inputs, model: Any) -> Any:
        found.append(not self.explained[0].is_contiguous())
        return run(self, model)

    monkeypatch.setattr(memory_layout.Inputs, "run", noted)
    yield found


def explained(net: nn.Module, data: Tensor, composite: Any, on: bool = True, **keywords: Any) -> Any:
    attribution = CondAttribution(net)
    attribution.channels_last = on
    conditions = keywords.pop("conditions", [{"y": i % 4} for i in range(len(data))])
    return attribution(data, conditions, composite, **keywords)


@pytest.mark.parametrize("n", [1, N], ids=["one-sample", "many"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_results_are_the_same_in_the_usual_layout(data: Tensor, seen: list[bool], name: str, n: int) -> None:
    data = data[:n]
    layers = ["stem", "depthwise", "pointwise", "fc"]
    net = made()
    plain = explained(net, data, COMPOSITES[name](), on=False, record_layer=layers)
    assert not any(seen)
    for _ in range(2):
        seen.clear()
        given = data.clone().requires_grad_()
        found = explained(net, given, COMPOSITES[name](), record_layer=layers)
        assert seen[-1]
        assert given.grad is not None and given.grad.is_contiguous()
        pairs = [(found.heatmap, plain.heatmap), (found.prediction, plain.prediction)]
        for group in ("activations", "relevances", "multipliers", "counted"):
            mine_, other = getattr(found, group), getattr(plain, group)
            pairs += [(mine_[layer], other[layer]) for layer in layers]
        for one, other in pairs:
            assert one.is_contiguous()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert seen == [True]  # (only the first call compares)


def test_the_model_is_left_as_it_was(data: Tensor, untouched: Any) -> None:
    net = made()
    strides = [parameter.stride() for parameter in net.parameters()]
    with untouched(net):
        explained(net, data, EpsilonPlus())
    assert [parameter.stride() for parameter in net.parameters()] == strides


def plain_convolutions() -> nn.Module:
    torch.manual_seed(0)
    grouped = nn.Conv2d(6, 6, 3, groups=2)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), grouped, nn.Flatten(), nn.Linear(150, 4))


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda data: (made().double(), data.double()),
    "no depthwise convolution": lambda data: (plain_convolutions().eval(), data),
}


@pytest.mark.parametrize("name", OTHERS)
def test_where_it_is_not_faster_nothing_changes(data: Tensor, seen: list[bool], name: str) -> None:
    net, images = OTHERS[name](data)
    explained(net, images, EpsilonPlus())
    assert seen and not any(seen)


def test_what_others_see_or_do_has_the_usual_layout(data: Tensor, seen: list[bool]) -> None:
    net = made()
    explained(net, data, None)
    explained(net, data, EpsilonPlus(), conditions=[{"y": 0, "depthwise": [1]}])
    handle = net.depthwise.register_forward_hook(lambda *_: None)
    explained(net, data, EpsilonPlus())
    handle.remove()
    with EpsilonPlus().context(net):
        explained(net, data, None)
    attribution = CondAttribution(net, output=lambda output: output)
    attribution(data, [{"y": 0}], EpsilonPlus())
    with torch.autocast("cpu"):
        explained(net, data, EpsilonPlus())
    assert len(seen) >= 6 and not any(seen)
    explained(net, data, EpsilonPlus())
    assert seen[-1]


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(len(x), -1),
    "strides": lambda x: torch.as_strided(x, (len(x), 96), (96, 1)),
}


@pytest.mark.parametrize("name", HEADS)
def test_models_that_need_the_usual_layout_get_it(data: Tensor, seen: list[bool], name: str) -> None:
    net = made(HEADS[name])
    plain = explained(net, data, EpsilonPlus(), on=False)
    for _ in range(2):
        seen.clear()
        found = explained(net, data, EpsilonPlus())
        assert torch.equal(found.heatmap, plain.heatmap)
    assert seen == [False]


def test_an_error_is_that_of_the_usual_layout(data: Tensor) -> None:
    errors = []
    for on in (True, False):
        with pytest.raises(ValueError, match="layer 'stem'") as raised:
            explained(made(), data[:, :2], EpsilonPlus(), on=on)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_lack_of_memory_says_nothing_about_the_model(data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net, run = made(), memory_layout.Inputs.run
    plain = explained(net, data, EpsilonPlus(), on=False)

    def failing(self: Inputs, model: Any) -> Any:
        if not self.explained[0].is_contiguous():
            raise MemoryError
        return run(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(memory_layout.Inputs, "run", failing)
        assert torch.equal(explained(net, data, EpsilonPlus()).heatmap, plain.heatmap)
        assert memory_layout._same[net] == {}
    explained(net, data, EpsilonPlus())
    assert memory_layout._same[net] == {data.shape[1:]: True}
    with monkeypatch.context() as patch:
        patch.setattr(memory_layout.Inputs, "run", failing)
        assert torch.equal(explained(net, data, EpsilonPlus()).heatmap, plain.heatmap)
    assert memory_layout._same[net] == {data.shape[1:]: True}


class Keeping(Net):
    """The same, with half of what the call before gave in each."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x))) + 0.5 * self.kept
        self.kept = x.detach()[:1]
        found: Tensor = self.fc(nn.functional.avg_pool2d(self.depthwise(x), 2).flatten(1))
        return found


@pytest.mark.parametrize("n", [1, N], ids=["one-sample", "many"])
def test_what_a_model_keeps_of_a_call_is_of_one_call(data: Tensor, n: int, seen: list[bool]) -> None:
    """What is looked at in either layout leaves nothing behind: the call that is explained is the first one."""
    net, other = Keeping().eval(), Keeping().eval()
    other.load_state_dict(net.state_dict())
    wanted = other(data[:n]).detach()
    found = explained(net, data[:n], EpsilonPlus())
    assert True in seen
    torch.testing.assert_close(found.prediction, wanted)
    torch.testing.assert_close(net.kept, other.kept)


def test_the_switch_is_heard_after_a_recording_too(data: Tensor, request: pytest.FixtureRequest) -> None:
    attribution, rules = CondAttribution(made()), EpsilonPlus()
    attribution._replayed = Replayed(CallRecorder(2, cost=0))
    for number in range(6):
        attribution(data + number, [{"y": [0]}], rules)
    assert attribution._replayed.replays.replayed == 3
    attribution.channels_last = False
    seen = request.getfixturevalue("seen")
    attribution(data, [{"y": [0]}], rules)
    assert seen == [False]


def test_the_rule_knows_the_families(data: Tensor) -> None:
    from torchvision import models

    for name, expected in {"mobilenet_v2": True, "efficientnet_b0": True, "resnet18": False, "vgg11_bn": False}.items():
        with torch.device("meta"):
            net = getattr(models, name)()
        assert is_faster_channels_last(net, Inputs.single(data)) is expected


def test_mined_shards_do_not_depend_on_what_ran_before(tmp_path: Path, data: Tensor, seen: list[bool]) -> None:
    pairs = [(image, i % 4) for i, image in enumerate(torch.cat([data, data.flip(0) * 2]))]
    layers, options = {"depthwise": ChannelConcept(), "fc": ChannelConcept()}, {"batch_size": N, "progress": False}
    net = made()
    check_independent(net, Inputs.single(data), [range(2)])
    check_keeps_nothing(net, Inputs.single(data))
    seen.clear()
    one = mine(CondAttribution(net), pairs, layers, EpsilonPlus(), tmp_path / "one", **options)
    assert seen == [False, True, True, True]  # (a look in either layout, and two batches)
    options["shard_size"] = N
    again = mine(CondAttribution(net), pairs, layers, EpsilonPlus(), tmp_path / "again", stop=N, **options)
    other = mine(CondAttribution(made()), pairs, layers, EpsilonPlus(), again.path, **options)
    whole = mine(CondAttribution(made()), pairs, layers, EpsilonPlus(), tmp_path / "whole", **options)
    assert files_of(other.path) == files_of(whole.path)
    assert one.n_rows == other.n_rows == 2 * N
