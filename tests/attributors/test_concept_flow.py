"""`crp.concept_flow`: which concepts a prediction is made of, and how relevance flows between those of layers."""

from __future__ import annotations

import functools

import pytest
import torch
from attributor_cases import gap_net, images
from torch import nn

import crp
from crp.concepts import AxisConcept, ChannelConcept
from crp.outputs import entry

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


class Linear(nn.Sequential):
    """y = W3 W2 W1 x without rules: relevance of every unit is known."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)]
        super().__init__(*layers)
        self.double().eval()


def linear_flow(net: Linear, x: torch.Tensor, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance of units of layer 1, and of those of layer 0 by unit of layer 1: gradient times activation."""
    first, second, last = (layer.weight.detach() for layer in net)
    low = first @ x[0]
    high = second @ low
    return last[target] * high, last[target][:, None] * second * low


def test_shares_of_a_linear_net_are_those_of_its_weights() -> None:
    net, x = Linear(), torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    flow = crp.concept_flow("epsilon", net, x, 1, ["1", "0"], width=5)
    high, between = linear_flow(net, x, 1)
    own = high / high.abs().sum()
    assert flow.columns[0] == {("y", 1): 1.0}
    close(torch.tensor([flow.columns[1]["1", c] for c in range(5)], dtype=torch.float64), own, atol=1e-5, rtol=1e-4)
    wanted = own[:, None] * between / between.abs().sum(1, keepdim=True)
    for (layer, c), (lower, d) in flow.edges:
        if layer == "1":
            assert lower == "0"
            assert flow.edges[("1", c), ("0", d)] == pytest.approx(float(wanted[c, d]), rel=1e-4, abs=1e-6)
    for d in range(4):
        assert flow.columns[2]["0", d] == pytest.approx(float(wanted[:, d].sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["epsilon_plus", "gradient_x_input", "LRP", "gradient"])
def test_edges_are_those_of_the_engine(method: str) -> None:
    """By `crp.explain` with a condition on one concept, in the context of the class."""
    net, x = gap_net(), images(1)
    flow = crp.concept_flow(method, net, x, 2, ["4", "1", "0"], width=2)

    def shares(layer: str, **through: object) -> torch.Tensor:
        relevance = crp.explain(method, net, x, 2, layer=layer, **through).flatten(2).sum(2)[0]
        return relevance / relevance.abs().sum()

    own = shares("4")
    assert [node[1] for node in flow.columns[1]] == own.argsort(descending=True)[:2].tolist()
    total: dict[tuple[str, int], float] = {}
    for above, column in zip(flow.columns[1:], flow.columns[2:], strict=False):
        for (layer, c), share in above.items():
            (lower,) = {node[0] for node in column}
            part = shares(lower, condition={layer: [c]}) * share
            for node in column:
                found = flow.edges.get(((layer, c), node), 0.0)
                assert found == pytest.approx(float(part[node[1]]), rel=1e-6, abs=1e-9)
                total[node] = total.get(node, 0.0) + found
        assert list(column.values()) == pytest.approx([total[node] for node in column])
        assert list(column.values()) == sorted(column.values(), reverse=True) and len(column) == 2


def test_concepts_and_their_kind_may_be_named() -> None:
    net, x = gap_net(), images(1)
    flow = crp.concept_flow("epsilon_plus", net, x, 0, {"4": ChannelConcept(), "1": AxisConcept(1)}, concepts=[5, 0])
    assert list(flow.columns[1]) == [("4", 5), ("4", 0)]
    plain = crp.concept_flow("epsilon_plus", net, x, 0, ["4", "1"], concepts=[5, 0])
    assert flow.columns[2] == pytest.approx(plain.columns[2])
    alone = crp.concept_flow("epsilon_plus", net, x, 0, ["4"])
    assert len(alone.columns) == 2 and len(alone.edges) == 4


def test_what_is_explained_may_be_taken_from_a_dict() -> None:
    class InDict(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"scores": self.net(x)}

    net, x = gap_net(), images(1)
    found = crp.concept_flow("epsilon_plus", InDict(net).eval(), x, 0, ["net.4", "net.1"], output=entry("scores"))
    plain = crp.concept_flow("epsilon_plus", net, x, 0, ["4", "1"])
    assert list(found.edges.values()) == pytest.approx(list(plain.edges.values()))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right, self.out = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Linear(2, 3)
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((self.left(x).relu() + self.right(x).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layers": ["1", "4"]}, ValueError, r"\['1', '4'\] must go from the output to the input"),
        ({"layers": ["4", "0", "1"]}, ValueError, "must go from the output to the input"),
        ({"model": Branches(), "layers": ["left", "right"]}, ValueError, "each feeding the one before"),
        ({"layers": ["4", "4"]}, ValueError, "has a layer twice"),
        ({"layers": "4"}, TypeError, "layers must be names of layers, or a mapping"),
        ({"layers": []}, TypeError, "layers must be names of layers, or a mapping"),
        ({"layers": ["4", "nine"]}, KeyError, "'nine'"),
        ({"layers": {"4": "channel"}}, TypeError, "channel"),
        ({"method": "occlusion"}, ValueError, "method 'occlusion' has no relevance of concepts"),
        ({"method": "intgrad"}, ValueError, "method 'intgrad' has no relevance of concepts"),
        ({"method": "grad_cam"}, ValueError, "method 'grad_cam' has no relevance of concepts"),
        ({"method": "epsilonn"}, ValueError, "there is no method 'epsilonn'"),
        ({"target": 7}, IndexError, "target 7"),
        ({"target": None}, TypeError, "target must be a class, a whole number, not None"),
        ({"target": 1.5}, TypeError, "target must be a class, a whole number, not 1.5"),
        ({"target": True}, TypeError, "target must be a class"),
        ({"width": 0}, ValueError, "width"),
        ({"width": [4, 2]}, ValueError, "width"),
        ({"concepts": [6]}, IndexError, "layer '4' has the concepts 0 to 5; there is no 6"),
        ({"concepts": [-1]}, IndexError, "there is no -1"),
        ({"concepts": []}, ValueError, "concepts is empty"),
        ({"concepts": [0.5]}, TypeError, "concepts"),
        ({"data": images(2)}, ValueError, "concepts of one sample are shown; data has 2"),
        ({"steps": 3}, ValueError, "no option 'steps'"),
    ],
)
def test_what_is_wrong_is_said(changed: dict, error: type, message: str, untouched) -> None:
    given = {"method": "epsilon_plus", "model": gap_net(), "data": images(1), "target": 0, "layers": ["4", "1"]}
    given |= changed
    with untouched(given["model"]), pytest.raises(error, match=message):
        crp.concept_flow(**given)
