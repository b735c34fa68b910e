"""Many rows under zennit's composites go back together, by the numbers of rows that go back alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attribution_cases import plain_sums
from torch import Tensor, nn
from zennit import rules
from zennit.composites import NameMapComposite
from zennit.core import BasicHook

from crp.attribution import CondAttribution

pytestmark = plain_sums

RULES: dict[str, Callable[[], BasicHook]] = {
    "Epsilon": lambda: rules.Epsilon(1e-6),
    "Gamma": lambda: rules.Gamma(0.25),
    "ZPlus": rules.ZPlus,
    "AlphaBeta": lambda: rules.AlphaBeta(2, 1),
    "ZBox": lambda: rules.ZBox(low=0.0, high=3.0),
    "WSquare": rules.WSquare,
    "Flat": rules.Flat,
    "Norm": rules.Norm,
}
CONDITIONS = [{"y": i % 3, "middle": [i % 4, (i + 1) % 4]} for i in range(7)]


class Net(nn.Module):
    """A residual sum between layers that are changed in place."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = layer or nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.middle, self.last = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        y = self.second(x)
        y += x
        y = self.act(y)
        return self.last(self.act(self.middle(y)).mean((2, 3)))


class Counting(nn.Conv2d):
    """Counts how often it runs."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


class Twice(BasicHook):
    """Divides by what both of two equal inputs give, and does not multiply by them."""

    def __init__(self) -> None:
        super().__init__(
            input_modifiers=[lambda a: a, lambda a: a, lambda a: a.clamp(max=0)],
            gradient_mapper=lambda out_grad, outputs: [out_grad / (1 + sum(outputs).abs())] * 3,
            reducer=lambda inputs, gradients: gradients[0] + 2 * gradients[1] + 3 * gradients[2],
        )


class Narrow(BasicHook):
    """Gives one number for each position, which fits no input: nothing goes on, as in zennit."""

    def __init__(self) -> None:
        super().__init__(reducer=lambda inputs, gradients: (inputs[0] * gradients[0]).sum(1, keepdim=True))


class Negated(BasicHook):
    """Has a backward pass of its own."""

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return tuple(None if entry is None else -entry for entry in grad_input)


def heatmaps(model: nn.Module, data: Tensor, rule: BasicHook, n: int, **options: Any) -> Tensor:
    composite = NameMapComposite([(["first", "second"], rule), (["middle", "last"], rules.Epsilon(1e-6))])
    parts = CondAttribution(model).generate(data, CONDITIONS, composite, batch_size=n, verbose=False, **options)
    return torch.cat([part.heatmap for part in parts])


@pytest.fixture
def data() -> Tensor:
    return torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("signs", ["positive", "both"])
@pytest.mark.parametrize("make", [*RULES.values(), Twice, Narrow, Negated], ids=[*RULES, "Twice", "Narrow", "Negated"])
def test_rows_together_are_rows_alone(data: Tensor, make: Callable[[], BasicHook], signs: str, untouched: Any) -> None:
    model, data = Net(), data if signs == "positive" else data - 0.5
    with untouched(model):
        alone, together = heatmaps(model, data, make(), 1), heatmaps(model, data, make(), 14)
    assert alone.any() or make is Narrow
    assert torch.allclose(together, alone, rtol=1e-10, atol=1e-14)


def test_modified_outputs_are_computed_once_for_all_rows(data: Tensor) -> None:
    Counting.calls = 0
    heatmaps(Net(Counting(4, 4, 3, padding=1)), data[:1], rules.AlphaBeta(2, 1), 7)
    assert Counting.calls == 1 + 4


def test_inputs_of_zeros_are_not_sent_back_to(data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
        asked.append(len(inputs))
        return grad(outputs, inputs, *args, **keywords)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    heatmaps(Net(), data[:1], rules.ZPlus(), 7)  # (data and activations are positive: half of the inputs are zeros)
    assert 2 not in asked
    asked.clear()
    heatmaps(Net(), data[:1] - 0.5, rules.ZPlus(), 7)
    assert 2 in asked


def test_rows_of_their_own_samples_run_as_in_zennit(data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    backward = BasicHook.backward
    monkeypatch.setattr(
        BasicHook, "backward", lambda self, module, *args: (seen.append(module), backward(self, module, *args))[1]
    )
    composite = NameMapComposite([(["first"], rules.Flat())])
    attribution = CondAttribution(Net())
    attribution(data, [{"y": 0}, {"y": 1}], composite)
    assert len(seen) == 1
    attribution(data, [{"y": 0}, {"y": 1}, {"y": 2}], composite)
    assert len(seen) == 1


class Idle(rules.Flat):  # type: ignore[misc]
    """Is registered, and switched off."""

    def copy(self) -> Any:
        copied = super().copy()
        copied.active = False
        return copied


def test_an_inactive_hook_does_nothing(data: Tensor) -> None:
    model, composite = Net(), NameMapComposite([(["first", "second"], Idle())])
    found, plain = (CondAttribution(model)(data, CONDITIONS, each).heatmap for each in (composite, None))
    assert torch.equal(found, plain)


class Both(nn.Module):
    """A layer of two tensors."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * 2 + b


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.both = nn.Conv2d(2, 4, 3).double(), Both()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.both(x.relu(), x).mean((2, 3))


def test_a_layer_of_two_tensors_fails_as_in_zennit(data: Tensor, untouched: Any) -> None:
    model, composite = TwoInputs().eval(), NameMapComposite([(["both"], rules.Epsilon())])
    for n in (1, 3):
        with untouched(model), pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
            CondAttribution(model)(data[:1], [{"y": i} for i in range(n)], composite)


def test_hooks_are_those_of_zennit_again_after_an_error(data: Tensor, untouched: Any) -> None:
    def fail(row: int, ids: Any, layer_name: Any = None) -> Any:
        raise RuntimeError("mask")

    model = Net()
    with untouched(model), pytest.raises(RuntimeError, match="mask"):
        heatmaps(model, data, rules.ZPlus(), 14, mask_map=fail)
    composite = NameMapComposite([(["first"], rules.ZPlus())])
    with composite.context(model):
        before = [*model.first._forward_hooks.values()]
        CondAttribution(model)(data[:1], [{"y": i} for i in range(3)])
        assert [*model.first._forward_hooks.values()] == before
