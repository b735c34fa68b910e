"""Models and layers that cannot be explained as asked: each says why, and is left as it was."""

from __future__ import annotations

import re

import pytest
import torch
from attribution_cases import COMPOSITES, SMALL, Net, ask, every_kind, net, plain_sums, small_net
from torch import Tensor, nn

import crp
from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import AxisConcept, ChannelConcept

X = SMALL


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round().detach()


@pytest.fixture
def model() -> Net:
    return small_net()


@pytest.mark.parametrize(
    ("wrap", "kind", "message"),
    [
        (lambda y: y.argmax(1), ValueError, "the model's output (dtype torch.int64) does not depend on the data in a"),
        (lambda y: y.detach(), ValueError, "differentiable way; explain a tensor before rounding, argmax or detach"),
        (lambda y: (y, y), TypeError, "and entry(0) for one of its parts [0, 1]"),
        (lambda y: {"out": y}, TypeError, "segmentation() and detection(), and entry('out') for one of its parts"),
        (lambda y: {"logits": None}, TypeError, "the model returns None, not a tensor"),
        (torch.fft.fft, TypeError, "the model puts out complex numbers, of torch.complex128, which"),
        (lambda y: y.sum(0), ValueError, "the model's output has shape (3,); its first axis must be that of 2 samples"),
        (lambda y: y.sum(), ValueError, "the model's output has shape (); its first axis must be that of 2 samples"),
        (lambda y: y[:, 0], ValueError, "the model's output has shape (2,); 'y' needs (batch, outputs, ...). Leave it"),
    ],
    ids=["argmax", "detached", "tuple", "dict", "none", "complex", "no batch", "number", "no outputs"],
)
@every_kind
def test_outputs(model, untouched, composite, wrap, kind, message):
    outer = net(lambda s, x: wrap(s.inner(x)), inner=model)
    with untouched(outer), pytest.raises(kind, match=re.escape(message)):
        ask(outer, [{"y": 1}], composite=composite)


@every_kind
def test_one_score_for_each_sample(model, composite):
    outer, output = net(lambda s, x: s.inner(x)[:, 1], inner=model), (lambda scores: scores[:, None])
    with pytest.raises(ValueError, match=re.escape("or choose the output: with output=lambda scores: scores[:, None]")):
        ask(outer, [{"y": 0}], composite=composite)
    found = CondAttribution(outer, output=output)(X, [{"y": 0}], composite)
    assert torch.equal(found.heatmap, CondAttribution(model)(X, [{"y": 1}], composite).heatmap)
    for target, message in ((None, "no class is the predicted one; with output="), (0, "no axis of classes; with")):
        with pytest.raises(ValueError, match=message):
            crp.explain("gradient", outer, X, target)
        kept = crp.explain("gradient", outer, X, target, output=output)
        assert torch.equal(kept, crp.explain("gradient", model, X, 1))


@every_kind
def test_layers_with_a_tuple_as_output(composite, untouched):
    """C11: recorded, conditioned or started from."""
    model = net(lambda s, x: s.head(s.lstm(x)[0].sum(1)), lstm=nn.LSTM(6, 4, batch_first=True), head=nn.Linear(4, 3))
    roles = [
        {"record_layer": ["lstm"], "conditions": [{"y": 1}]},
        {"conditions": [{"y": 1, "lstm": [0]}]},
        {"start_layer": "lstm", "conditions": [{}]},
    ]
    message = r"layer 'lstm' \(LSTM\) returns a tuple, not a tensor; name a layer inside it, or after it"
    for role in roles:
        with untouched(model), pytest.raises(TypeError, match=message):
            ask(model, data=X[:, 0], composite=composite, **role)


@every_kind
def test_layers_whose_first_axis_is_not_the_batch(composite, untouched):
    """Rows of such a layer would be taken from the wrong samples."""
    model = net(
        lambda s, x: s.head(s.windows(torch.cat([x[:1], x]).flatten(2)).reshape(len(x) + 1, -1)[1:]),
        windows=nn.Linear(36, 2),
        head=nn.Linear(6, 3),
    )
    assert ask(model, conditions=[{"y": 1}], composite=composite).heatmap.any()
    message = r"the output of layer 'windows' has shape \(3, 3, 2\); its first axis must be that of 2 samples, or have"
    for role in ({"record_layer": ["windows"], "conditions": [{"y": 1}]}, {"conditions": [{"y": 1, "windows": [0]}]}):
        with untouched(model), pytest.raises(ValueError, match=message):
            ask(model, composite=composite, **role)
    with pytest.raises(
        ValueError, match=r"the model's output has shape \(4,\); its first axis must be that of 6 samples"
    ):
        ask(nn.Linear(6, 4).double().eval(), data=X[0, 0, 0], conditions=[{"y": 1}])


@every_kind
def test_order_of_the_layers(model, composite, untouched):
    """From the output to the input, in each condition by itself, whatever its neighbours and the batch size are."""
    right, wrong = {"y": 1, "conv2": [0], "conv1": [1]}, {"y": 1, "conv1": [1], "conv2": [0]}
    message = r"names must be ordered.*start with the last and end with the first.*from 'conv1' does not reach 'conv2'"
    for conditions in ([wrong], [right, wrong], [wrong, right]):
        with untouched(model), pytest.raises(RuntimeError, match=message):
            ask(model, conditions=conditions, composite=composite)
        with untouched(model), pytest.raises(RuntimeError, match=message):
            ask(model, conditions=conditions, composite=composite, generate=True, batch_size=1)
        ask(model, conditions=conditions, composite=composite, exclude_parallel=False)


@every_kind
def test_layers_that_the_flow_does_not_reach(composite, untouched):
    model = net(lambda s, x: s.head(x) + s.fixed(s.side(x)), head=nn.Linear(6, 3), fixed=Rounds(), side=nn.Linear(6, 3))
    data = X[:, 0, 0]
    for layer in ("fixed", "side"):
        message = rf"from the start does not reach {layer!r}.*would leave nothing: what is explained does not depend"
        with untouched(model), pytest.raises(RuntimeError, match=message):
            ask(model, data=data, conditions=[{"y": 1, layer: [0]}], composite=composite)
        with (
            untouched(model),
            pytest.warns(UserWarning, match=rf"conditions on \['{layer}'\] have no effect") as caught,
        ):
            found = CondAttribution(model)(data, [{"y": 1, layer: [0]}], composite, exclude_parallel=False)
        assert caught[0].filename == __file__
        assert torch.equal(found.heatmap, CondAttribution(model)(data, [{"y": 1}], composite).heatmap)
    with untouched(model), pytest.raises(ValueError, match=r"start_layer 'fixed'.*does not depend on the data"):
        ask(model, data=data, conditions=[{}], start_layer="fixed", composite=composite)
    with untouched(model), pytest.raises(RuntimeError, match="from the start does not reach 'head'"):
        ask(model, data=data, conditions=[{"head": [0]}], start_layer="side", composite=composite)


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.BatchNorm2d(1)], ids=["sigmoid", "batch norm"])
def test_a_gate_that_is_held_constant(gate, untouched):
    """What is held constant has no gradient at all, for hooks on the layer either."""
    model = net(
        lambda s, x: s.head((s.signal(x) * s.gate(s.below(x))).relu().mean((2, 3))),
        signal=nn.Conv2d(2, 4, 3), below=nn.Conv2d(2, 1, 3), gate=gate, head=nn.Linear(4, 3),
    )  # fmt: skip
    data = X[:1, :2]
    whole = CondAttribution(model)(data, [{"y": 1}], EpsilonPlus(None), record_layer=["gate"])
    assert whole.heatmap.any() and not whole.relevances["gate"].any()
    with untouched(model), pytest.warns(UserWarning, match=r"conditions on \['gate'\] have no effect"):
        found = CondAttribution(model)(data, [{"y": 1, "gate": [0]}], EpsilonPlus(None), exclude_parallel=False)
    assert torch.equal(found.heatmap, whole.heatmap)
    with untouched(model), pytest.raises(RuntimeError, match="from the start does not reach 'gate'"):
        CondAttribution(model)(data, [{"y": 1, "gate": [0]}], EpsilonPlus(None))


def test_the_same_error_when_asked_again(model, untouched):
    for make in COMPOSITES.values():
        composite = make()
        with untouched(model):
            for _ in range(2):
                with pytest.raises(IndexError, match="there is no channel 9"):
                    ask(model, conditions=[{"y": 1, "conv2": [9]}], composite=composite)
            ask(model, composite=composite)


class Tokens(nn.Module):
    """Tokens, (batch, token, feature), made of the columns of a picture, or frames, (batch, channel, time)."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.frames = last, nn.Conv1d(3, 5, 1)
        self.block, self.out = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.frames(x)
        tokens = frames.mT
        return self.out((tokens + self.block(tokens)).mean(1) if self.last else frames.mean(2))


@plain_sums
@pytest.mark.parametrize("generate", [False, True], ids=["call", "generate"])
@pytest.mark.parametrize("mask_map", [ChannelConcept.mask, {"block": ChannelConcept().mask}], ids=["function", "dict"])
@every_kind
def test_tokens_are_not_taken_for_channels(composite, mask_map, generate, untouched):
    model = Tokens(last=True).eval()
    pictures = torch.randn(2, 3, 8)
    asked = {"data": pictures, "composite": composite, "generate": generate}
    message = r"layer 'block' puts out \(1, 8, 5\), whose channels come last.* AxisConcept\(1\).mask for tokens"
    with untouched(model), pytest.raises(ValueError, match=message):
        ask(model, [{"y": 1, "block": [4]}], mask_map=mask_map, **asked)
    for axis in (1, -1):
        ask(model, [{"y": 1, "block": [4]}], mask_map=AxisConcept(axis).mask, **asked)


@pytest.mark.parametrize("n_frames", [5, 8])
def test_frames_have_their_channels_on_axis_1(n_frames, untouched):
    """Five channels, and maybe as many frames."""
    model = Tokens(last=False).eval()
    with untouched(model):
        found = CondAttribution(model)(torch.randn(2, 3, n_frames), [{"y": 1, "frames": [i]} for i in range(2)])
    assert found.heatmap.shape == (2, n_frames)
