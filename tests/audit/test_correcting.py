"""Corrections and interventions against closed forms; the model is as it was after each."""

from __future__ import annotations

import copy

import pytest
import torch
from attribution_cases import close, net
from concept_cases import drawn
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.audit import effect, intervene, part_of, penalty, project, prune
from crp.composites import EpsilonPlus, GradientTimesInput
from crp.concepts import AxisConcept, ChannelConcept, DirectionConcept, splice

C = 5


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return net(
        lambda s, x: s.fc(s.conv2(s.conv1(x).relu()).relu().mean((2, 3))),
        conv1=nn.Conv2d(3, C, 3), conv2=nn.Conv2d(C, C, 3), fc=nn.Linear(C, 4),
    )  # fmt: skip


@pytest.fixture
def data() -> Tensor:
    return drawn(4, 3, 7, 7, seed=2)


def output_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _a, out: kept.append(out))
    model(x)
    handle.remove()
    return kept[0].detach()


# --- projection -----------------------------------------------------------------------------------------------------


def test_projection(model, data, untouched):
    """The part along the direction is set, at every position; twice is as once; no rule takes the correction."""
    v, before = drawn(C), output_of(model, "conv1", data)
    unit = v / v.norm()
    coefficient = torch.einsum("c,bchw->bhw", unit, before)
    with untouched(model):
        with project(model, "conv1", v, at=0.7):
            found = output_of(model, "conv1", data)
            with project(model, "conv1", -2 * v, at=-0.7):
                again = output_of(model, "conv1", data)
        with project(model, "conv1", v):
            heatmap = CondAttribution(model)(data, [{"y": 1}], GradientTimesInput()).heatmap
            leaf = data.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert close(found, before + (0.7 - coefficient)[:, None] * unit[None, :, None, None])
    assert close(again, found, 1e-12)
    assert close(heatmap, (data * gradient).sum(1), 1e-9)


def test_reactive_projection(model, data):
    chosen = torch.tensor([True, False, False, True])
    plain = model(data)
    with project(model, "conv2", drawn(C)):
        corrected = model(data)
    with project(model, "conv2", drawn(C), when=lambda output: chosen):
        found = model(data)
    assert close(found[chosen], corrected[chosen])
    assert torch.equal(found[~chosen], plain[~chosen])


def test_relevance_of_what_is_projected_out(model, data):
    """No relevance is left to the direction in the layer, whose output is without it."""
    v = drawn(C)
    attribution = CondAttribution(model)
    with project(model, "conv2", v):
        result = attribution(data, [{"y": 1}], EpsilonPlus(), ["conv2"])
    assert close(torch.einsum("c,bchw->bhw", v, result.activations["conv2"]) + 1, torch.ones(4, 3, 3).double(), 1e-12)
    kept = DirectionConcept(v).relevance(result.activations["conv2"], result.multipliers["conv2"])
    assert kept[:, 0].abs().max() < 1e-12


# --- pruning and penalty --------------------------------------------------------------------------------------------


def test_pruning(model, data, untouched):
    scores = {"conv1": [5.0, 1.0, 4.0, 3.0, 9.0], "conv2": torch.tensor([2.0, 8.0, 7.0, 6.0, 0.0])}
    with untouched(model), prune(model, scores, 0.3) as pruned:
        assert pruned == {"conv1": [1], "conv2": [0, 4]}
        first, second = output_of(model, "conv1", data), output_of(model, "conv2", data)
    assert not first[:, 1].any() and first[:, [0, 2, 3, 4]].flatten(1).any()
    assert not second[:, [0, 4]].any()
    with prune(model, scores, 0.0):
        assert torch.equal(model(data), model(data))
    with prune(model, scores, 1.0):
        assert close(model(data), model.fc.bias.expand(4, -1))


def test_penalty(model, data):
    """(v·∇)² by finite differences, and a step against it makes the model less sensitive."""
    v, eps = drawn(C), 1e-6
    with penalty(model, "conv2", v) as term:
        with pytest.raises(RuntimeError, match="layer 'conv2' has not run inside of the context"):
            term(torch.zeros(1))
        found = term(model(data)[:, 1])
    slopes = []
    for sign in (1, -1):
        handle = model.conv2.register_forward_hook(lambda _m, _a, out, s=sign: out + s * eps * v[:, None, None])
        slopes.append(model(data)[:, 1])
        handle.remove()
    assert found.item() == pytest.approx((((slopes[0] - slopes[1]) / (2 * eps)) ** 2).mean().item(), rel=1e-5)
    found.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    with penalty(model, "conv2", v) as term:
        assert term(model(data)[:, 1]) < found


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.one(self.one(x).tanh()).tanh())


def test_penalty_of_all_calls_of_a_layer():
    torch.manual_seed(0)
    net, x, v, eps = Twice().double(), torch.randn(3, 4).double(), torch.randn(4).double(), 1e-6
    slopes = []
    for sign in (1, -1):
        handle = net.one.register_forward_hook(lambda _m, _a, out, s=sign: out + s * eps * v)
        slopes.append(net(x)[:, 1])
        handle.remove()
    with penalty(net, "one", v) as term:
        for _ in range(2):  # (each pass counts by itself)
            found = term(net(x)[:, 1])
        assert found.item() == pytest.approx((((slopes[0] - slopes[1]) / (2 * eps)) ** 2).mean().item(), rel=1e-6)
        early = net(x)
        net(x)
        with pytest.raises(RuntimeError, match="none of the last forward pass"):
            term(early[:, 1])
    assert not net._forward_pre_hooks and not net.one._forward_hooks


def test_effect(model, data):
    attribution, concept = CondAttribution(model), ChannelConcept()
    labels = model(data).argmax(1).tolist()
    found = effect(attribution, data, labels, EpsilonPlus(), prune(model, {"conv2": [0, 1, 1, 1, 1]}, 0.2), "conv2",
                   concept, [0])  # fmt: skip
    result = attribution(data, [{"y": label} for label in labels], EpsilonPlus(), ["conv2"])
    assert found.accuracy[0] == 1
    assert found.share[0] == pytest.approx(concept.attribute(result.relevances["conv2"])[:, 0].abs().mean().item())
    assert found.share[1] == 0 and found.accuracy[1] <= 1


def test_accuracy_is_of_all_samples(model, data):
    right = model(data).argmax(1)
    labels = torch.where(torch.arange(4) == 2, (right + 1) % 3, right)
    pruned = prune(model, {"conv2": [0, 1, 1, 1, 1]}, 0.2)
    found = effect(CondAttribution(model), data, labels.tolist(), EpsilonPlus(), pruned, "conv2", ChannelConcept(), [0])
    with prune(model, {"conv2": [0, 1, 1, 1, 1]}, 0.2):
        assert found.accuracy == (0.75, (model(data).argmax(1) == labels).double().mean().item())


def test_correction_of_another_model_is_told(model, data):
    """It changes nothing here, which must not be taken for a correction without effect."""
    labels, other = model(data).argmax(1).tolist(), copy.deepcopy(model)
    with pytest.warns(UserWarning, match="changes nothing here: is it on another model"):
        found = effect(CondAttribution(model), data, labels, EpsilonPlus(),
                       prune(other, {"conv2": [0, 1, 1, 1, 1]}, 0.2), "conv2", ChannelConcept(), [0])  # fmt: skip
    assert found.share[0] == found.share[1]


def test_effect_of_training(model, data):
    """The model after training takes the place of a context; its figures are its own."""
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.conv2.weight[0] = trained.conv2.bias[0] = 0
    before, after = CondAttribution(model), CondAttribution(trained)
    labels = model(data).argmax(1).tolist()
    found = effect(before, data, labels, EpsilonPlus(), after, "conv2", ChannelConcept(), [0])
    pruned = prune(model, {"conv2": [0, 1, 1, 1, 1]}, 0.2)
    wanted = effect(before, data, labels, EpsilonPlus(), pruned, "conv2", ChannelConcept(), [0])
    assert found.accuracy == wanted.accuracy and found.share == pytest.approx(wanted.share)
    assert found.share[0] > 0 == found.share[1]
    with pytest.raises(ValueError, match=r"the corrected model is the model itself.*copy.deepcopy\(model\)"):
        effect(before, data, labels, EpsilonPlus(), CondAttribution(model), "conv2", ChannelConcept(), [0])


# --- interventions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[0], [1, 2], [-1]], ids=str)
def test_part_of_an_activation(ids):
    a, d, e = drawn(3, C, 2, 3), drawn(3, C, seed=1), drawn(3, C, seed=2)
    kept = torch.zeros(C).double()
    kept[ids] = 1
    assert close(part_of(ChannelConcept(), a, ids), a * kept[:, None, None])
    parts = torch.einsum("kc,kd,bdhw->bkchw", d, e, a)
    rest = a - parts.sum(1)
    wanted = rest if ids == [-1] else parts[:, ids].sum(1)
    assert close(part_of(DirectionConcept(d, e), a, ids), wanted)


def test_switched_off(model, data, untouched):
    attribution, targets = CondAttribution(model), [0, 1, 2, 3]
    a = output_of(model, "conv2", data)
    with untouched(model):
        found = intervene(attribution, data, "conv2", ChannelConcept(), range(C), targets)
    weight = model.fc.weight.detach()
    for k in range(C):
        wanted = -weight[targets, k] * a[:, k].relu().mean((1, 2))
        assert close(found[:, k], wanted, 1e-9)
    doubled = intervene(attribution, data, "conv2", ChannelConcept(), [0], targets, scale=2.0)
    assert close(doubled[:, 0], -found[:, 0], 1e-9)


def test_a_linear_model_is_as_relevance_says(data):
    """Where nothing but sums follows, the change is the relevance itself, also of directions and of latents."""
    torch.manual_seed(1)
    model = net(lambda s, x: s.fc(s.conv(x).mean((2, 3))), conv=nn.Conv2d(3, C, 3), fc=nn.Linear(C, 4))
    attribution, concept = CondAttribution(model), DirectionConcept(drawn(3, C))
    result = attribution(data, [{"y": 2}], GradientTimesInput(), ["conv"])
    relevance = concept.relevance(result.activations["conv"], result.multipliers["conv"]).flatten(2).sum(2)
    found = intervene(attribution, data, "conv", concept, range(4), [2] * 4)
    assert close(found, -relevance, 1e-9)

    class Turned:
        def encode(self, activation):
            return (activation @ TURN).relu()

        def decode(self, latents):
            return latents @ TURN.mT

    TURN = torch.linalg.qr(drawn(C, C))[0]
    with splice(model, "conv", Turned()) as names:
        result = attribution(data, [{"y": 2}], GradientTimesInput(), [names.code])
        found = intervene(attribution, data, names.code, ChannelConcept(), range(C), [2] * 4)
    assert close(found, -result.relevances[names.code].flatten(2).sum(2), 1e-9)


def test_patched_from_another_sample(model, data):
    other = data.flip(0)
    found = intervene(CondAttribution(model), data, "conv2", ChannelConcept(), [1], [3] * 4, scale=1.0, patch=other)
    a = output_of(model, "conv2", data).relu().mean((2, 3))[:, 1]
    assert close(found[:, 0], model.fc.weight.detach()[3, 1] * (a.flip(0) - a), 1e-9)


@pytest.mark.parametrize("layer", ["fc.input", "fc"])
def test_what_a_layer_is_called_with_is_switched_off(model, data, layer, untouched):
    """Places of a vector; each but the target's own place of the output changes nothing."""
    attribution, targets = CondAttribution(model), [0, 1, 2, 3]
    with untouched(model):
        found = intervene(attribution, data, layer, AxisConcept(-1), range(4), targets)
    values = output_of(model, "conv2", data).relu().mean((2, 3))
    weight = model.fc.weight.detach()[targets]
    wanted = -weight * values if layer == "fc.input" else -torch.diag_embed(model(data)[range(4), targets])
    assert close(found, wanted[:, :4], 1e-9)


@pytest.mark.parametrize("layer", ["attn.out_proj.input", "attn.out_proj"])
def test_heads_of_attention_that_is_fused(layer, untouched):
    """The projection is never called as a module; without a head, its columns of the weight are missing."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = net(lambda s, x: s.attn(x, x, x, need_weights=False)[0].sum(1), attn=attention)
    x, heads = drawn(3, 5, 4), AxisConcept(-1, groups=2)
    with untouched(model):
        found = intervene(CondAttribution(model), x, layer, heads, [0, 1], [2] * 3)
    for head in (0, 1):
        without = copy.deepcopy(model)
        with torch.no_grad():
            if layer.endswith("input"):
                without.attn.out_proj.weight[:, 2 * head : 2 * head + 2] = 0
            else:
                without.attn.out_proj.weight[2 * head : 2 * head + 2] = 0
                without.attn.out_proj.bias[2 * head : 2 * head + 2] = 0
            wanted = (without(x) - model(x))[:, 2]
        torch.testing.assert_close(found[:, head], wanted, rtol=1e-9, atol=1e-12)


def test_one_call_of_several_is_changed(data):
    """Of each call, its own part takes the place of that of other samples, and a name without a number is refused."""
    torch.manual_seed(2)
    model = net(
        lambda s, x: s.fc(s.conv(s.conv(s.first(x)).tanh()).mean((2, 3))),
        first=nn.Conv2d(3, C, 3), conv=nn.Conv2d(C, C, 3, padding=1), fc=nn.Linear(C, 4),
    )  # fmt: skip
    attribution, targets = CondAttribution(model), [3] * 4
    with torch.no_grad():
        once = model.conv(model.first(data))
        again = model.conv(once.tanh())
        for call, values, rest in (
            (0, once, lambda a: model.fc(model.conv(a.tanh()).mean((2, 3)))),
            (1, again, lambda a: model.fc(a.mean((2, 3)))),
        ):
            other = values.clone()
            other[:, 1] = values.flip(0)[:, 1]
            wanted = (rest(other) - rest(values))[:, 3]
            found = intervene(
                attribution, data, f"conv#{call}", ChannelConcept(), [1], targets, scale=1.0, patch=data.flip(0)
            )
            assert close(found[:, 0], wanted, 1e-9)
    with pytest.raises(ValueError, match=r"'conv' is called 2 times in .* name one: conv#0, conv#1"):
        intervene(attribution, data, "conv", ChannelConcept(), [1], targets)
    with pytest.raises(ValueError, match="the forward pass does not use layer 'conv#2'"):
        intervene(attribution, data, "conv#2", ChannelConcept(), [1], targets)


def test_a_layer_that_gives_no_tensor_is_refused(data):
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x, 1

    model = net(lambda s, x: s.fc(s.two(x)[0].mean((2, 3))), two=Two(), fc=nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"layer 'two' \(Two\) returns a tuple, not a tensor; name a layer inside it"):
        intervene(CondAttribution(model), data, "two", ChannelConcept(), [1], [0] * 4)


def test_a_concept_is_told_which_layer_is_changed(model, data):
    class OfLayer(ChannelConcept):
        """As concepts of zennit-crp may be: other channels in each layer."""

        @staticmethod
        def mask(batch_id, concept_ids, layer_name=None):
            return ChannelConcept.mask(batch_id, [one + {"conv2": 1}[layer_name] for one in concept_ids], layer_name)

    attribution, ids = CondAttribution(model), [0, 1]
    found = intervene(attribution, data, "conv2", OfLayer(), ids, 1)
    assert torch.equal(found, intervene(attribution, data, "conv2", ChannelConcept(), [1, 2], 1))


def test_one_target_is_for_all_samples(model, data):
    attribution, channel = CondAttribution(model), ChannelConcept()
    found = [intervene(attribution, data, "conv1", channel, [0, 2], of) for of in (1, torch.tensor(1), [1] * len(data))]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said(model, data, untouched):
    attribution, channel = CondAttribution(model), ChannelConcept()
    with untouched(model):
        with (
            pytest.raises(ValueError, match=r"direction must be a vector other than 0"),
            project(model, "conv1", [0.0] * C),
        ):
            pass
        with (
            pytest.raises(ValueError, match="the direction has 3 channels; the layer's output is"),
            project(model, "conv1", [1.0] * 3),
        ):
            model(data)
        with pytest.raises(ValueError, match="share must be between 0 and 1, not 2"), prune(model, {}, 2):
            pass
        with (
            pytest.raises(ValueError, match="there are 2 scores; the layer's output is"),
            prune(model, {"conv1": [1, 2]}, 0.5),
        ):
            model(data)
        with pytest.raises(KeyError, match="'conv3' not found"):
            intervene(attribution, data, "conv3", channel, [0], [0] * 4)
        with pytest.raises(ValueError, match="there are 1 targets for 4 samples"):
            intervene(attribution, data, "conv1", channel, [0], [0])
        with pytest.raises(ValueError, match="patch is of shape"):
            intervene(attribution, data, "conv1", channel, [0], [0] * 4, patch=data[:1])
        with pytest.raises(IndexError, match="there is no channel 9"):
            intervene(attribution, data, "conv1", channel, [9], [0] * 4)
