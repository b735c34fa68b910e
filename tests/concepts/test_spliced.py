"""Autoencoders within a model: predictions and heatmaps as they were, and latents that are concepts."""

from __future__ import annotations

import pytest
import torch
from attribution_cases import close, net
from concept_cases import Autoencoder, Identity
from torch import Tensor, nn
from torch.nn import functional as F
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.composites import DeepLift, EpsilonGamma, EpsilonPlus, EpsilonPlusFlat, GradientTimesInput
from crp.concepts import ChannelConcept, splice
from crp.rules import Epsilon, Whole, ZPlus

C = 5
COMPOSITES = [EpsilonPlus(), EpsilonPlusFlat(), EpsilonGamma(), GradientTimesInput(), DeepLift()]
every_composite = pytest.mark.parametrize("composite", COMPOSITES, ids=lambda c: type(c).__name__)


def autoencoder(width: int = 2, top: int | None = None) -> Autoencoder:
    return Autoencoder(C, width, top).double().eval()


def trained(width: int = 4) -> Autoencoder:
    torch.manual_seed(1)
    model, data = autoencoder(width), torch.randn(200, C).double().relu()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        latents = model.encode(data)
        (F.mse_loss(model.decode(latents), data) + 1e-3 * latents.mean()).backward()
        optimizer.step()
    return model


CODES = {
    "identity": Identity,
    "random": autoencoder,
    "wide": lambda: autoencoder(16),
    "top": lambda: autoencoder(4, 3),
    "trained": trained,
    "trained, wide": lambda: trained(16),
}
every_code = pytest.mark.parametrize("make", CODES.values(), ids=list(CODES))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return net(
        lambda s, x: s.fc(s.body(s.conv1(x).relu()).relu().mean((2, 3))),
        conv1=nn.Conv2d(3, C, 3), body=nn.Sequential(nn.Conv2d(C, C, 3), nn.ReLU()), fc=nn.Linear(C, 4),
    )  # fmt: skip


@pytest.fixture
def data() -> Tensor:
    return torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@every_code
@every_composite
@pytest.mark.filterwarnings("ignore:DeepLift finds other constants")  # (which latents are the largest)
@pytest.mark.parametrize("layer", ["conv1", "body.0", "body"])
def test_nothing_changes_but_the_names(model, data, untouched, make, composite, layer):
    attribution = CondAttribution(model)
    with untouched(model):
        wanted = attribution(data, [{"y": 1}], composite, [layer, "fc"])
        with splice(model, layer, make()) as names:
            found = attribution(data, [{"y": 1}], composite, [layer, "fc"])
            assert names.code == f"{layer}.code"
    assert close(found.prediction, wanted.prediction, 1e-12)
    assert close(found.heatmap, wanted.heatmap, 1e-9)
    for name in (layer, "fc"):
        assert close(found.relevances[name], wanted.relevances[name], 1e-9)


@every_code
@pytest.mark.parametrize("composite", COMPOSITES[:4], ids=lambda c: type(c).__name__)
def test_latents(model, data, make, composite):
    """R_k = z_k (d_k·m); with the error, and the decoder's bias, they are the relevance of the layer."""
    attribution, code = CondAttribution(model), make()
    plain = attribution(data, [{"y": 1}], composite, ["body.0"])
    a, m = (values["body.0"].movedim(1, -1) for values in (plain.activations, plain.multipliers))
    z = code.encode(a)
    z = (z[0] if isinstance(z, tuple) else z).detach()
    weight = torch.eye(C).double() if isinstance(code, Identity) else code.decoder.weight.detach()
    bias = torch.zeros(C).double() if isinstance(code, Identity) else code.decoder.bias.detach()
    with splice(model, "body.0", code) as names:
        found = attribution(data, [{"y": 1}], composite, [names.code, names.error])
    assert close(found.activations[names.code].movedim(1, -1), z, 1e-12)
    latents = found.relevances[names.code].movedim(1, -1)
    assert close(latents, z * (m @ weight), 1e-9)
    error = (a - z @ weight.mT - bias) * m
    assert torch.allclose(found.relevances[names.error].movedim(1, -1), error, rtol=1e-9, atol=1e-12)
    whole = latents.sum(-1) + error.sum(-1) + m @ bias
    assert close(whole, plain.relevances["body.0"].sum(1), 1e-10)


@every_code
@every_composite
@pytest.mark.filterwarnings("ignore:DeepLift finds other constants")  # (which latents are the largest)
def test_conditions(model, data, make, composite):
    """Heatmaps of all latents and of the error add up to the whole."""
    attribution = CondAttribution(model)
    with splice(model, "body.0", make()) as names:
        whole = attribution(data, [{"y": 1}], composite, [names.code])
        n = whole.activations[names.code].shape[1]
        conditions = [{"y": 1, names.code: [k]} for k in range(n)] + [{"y": 1, names.error: list(range(C))}]
        parts = attribution(data, conditions, composite, mask_map=ChannelConcept.mask)
    assert close(parts.heatmap.unflatten(0, (2, -1)).sum(1), whole.heatmap, 1e-10)
    assert parts.heatmap[:n].any()


@every_code
@pytest.mark.parametrize("composite", [EpsilonPlus(), EpsilonGamma()], ids=lambda c: type(c).__name__)
def test_account(model, data, make, composite):
    attribution = CondAttribution(model)
    before = attribution.absorbed(data, [{"y": 1}], composite)
    with splice(model, "body.0", make()):
        found = attribution.absorbed(data, [{"y": 1}], composite)
    assert close(found.input, before.input, 1e-9)
    assert (found.rest.abs() <= 1e-9 * found.initial.abs().max()).all()


@pytest.mark.parametrize(
    "composite",
    [
        EpsilonPlus(layer_map=[("body.0", ZPlus())]),
        EpsilonPlus(layer_map=[(nn.Linear, ZPlus())]),
        EpsilonPlus(layer_map=[("body", Whole(Epsilon()))]),
    ],
    ids=["name", "type", "around"],
)
def test_rules_that_are_mapped_to_its_maps_do_not_take_them(model, data, composite):
    attribution = CondAttribution(model)
    wanted = attribution(data, [{"y": 1}], composite).heatmap
    with splice(model, "body.0", autoencoder()):
        found = attribution(data, [{"y": 1}], composite).heatmap
        report = composite.report(model, data)
    assert close(found, wanted, 1e-9)
    assert "body.0.code" in str(report) or "Whole" in str(composite)


def test_tokens_and_transcoders():
    torch.manual_seed(0)
    model = net(lambda s, x: s.head(s.up(s.embed(x).relu()).relu().mean(1)), embed=nn.Linear(4, C), up=nn.Linear(C, C),
                head=nn.Linear(C, 2))  # fmt: skip
    attribution, data = CondAttribution(model), torch.randn(2, 3, 4).double()
    wanted = attribution(data, [{"y": 1}], EpsilonPlus())
    for reads in ("output", "input"):
        with splice(model, "up", autoencoder(3), axis=-1, reads=reads) as names:
            found = attribution(data, [{"y": 1}], EpsilonPlus(), [names.code, names.error])
        assert found.relevances[names.code].shape == (2, 3, 3 * C)
        assert close(found.prediction, wanted.prediction)
        if reads == "output":  # (a transcoder takes part of the relevance past the layer's own rule)
            assert close(found.heatmap, wanted.heatmap, 1e-9)


def test_composites_of_zennit_are_refused(model, data):
    attribution = CondAttribution(model)
    with (
        splice(model, "conv1", autoencoder()),
        pytest.raises(TypeError, match=r"'conv1.code' needs the ordinary chain"),
    ):
        attribution(data, [{"y": 1}], ZennitEpsilonPlus())
    attribution(data, [{"y": 1}], ZennitEpsilonPlus())


WRONG = [
    (KeyError, "'conv2' not found in model; nearest: 'conv1'", "conv2", Identity(), {}),
    (TypeError, "code needs the methods encode and decode; Linear has no encode", "conv1", nn.Linear(C, C), {}),
    (ValueError, "axis must be a whole number, and not 0, that of the samples", "fc", Identity(), {"axis": 0}),
    (RuntimeError, "must match the size of tensor b", "body", autoencoder(), {"axis": -1}),
]


@pytest.mark.parametrize(("error", "message", "layer", "code", "options"), WRONG, ids=[e.__name__ for e, *_ in WRONG])
def test_what_is_wrong_is_said(model, data, untouched, error, message, layer, code, options):
    with untouched(model), pytest.raises(error, match=message), splice(model, layer, code, **options):
        model(data)


class Odd(Identity):
    """An autoencoder, and something that happens to what it is given."""

    def __init__(self, encode=lambda a: a, decode=lambda z: z):
        self.encode, self.decode = encode, decode


ODD = {
    "no gradient": (Odd(lambda a: a.detach()), "what encode gives, of torch.float64, has no gradient to its argument"),
    "whole numbers": (Odd(lambda a: a.long()), "what encode gives, of torch.int64, has no gradient"),
    "decoder without gradient": (Odd(decode=torch.no_grad()(lambda z: z * 1)), "what decode gives"),
    "random": (Odd(lambda a: a + torch.randn_like(a)), "gives other numbers for the same activation"),
    "random decoder": (Odd(decode=lambda z: z * torch.rand(1)), "gives other numbers for the same activation"),
    "in place": (Odd(lambda a: a.relu_()), "encode changes its argument in place"),
    "decoder in place": (Odd(lambda a: a * 1, lambda z: z.mul_(2)), "decode changes its argument in place"),
    "one sample": (Odd(lambda a: a[:1]), r"encode gives \(1, 5, 5, 5\) for \(2, 5, 5, 5\); only the last axis"),
    "no positions": (Odd(lambda a: a.mean((1, 2))), r"encode gives \(2, 5\) for \(2, 5, 5, 5\)"),
    "one latent": (Odd(decode=lambda z: z[..., :1]), r"decode gives \(2, 1, 5, 5\) for an output of \(2, 5, 5, 5\)"),
    "another dtype": (
        Odd(decode=lambda z: z.float()),
        "decode gives torch.float32 on cpu; the layer's output is torch.fl",
    ),
    "nothing": (Odd(lambda a: None), "encode must return a dense tensor, not NoneType"),
    "array": (Odd(decode=lambda z: z.detach().numpy()), "decode must return a dense tensor, not ndarray"),
    "pair": (Odd(decode=lambda z: (z, z)), "decode must return a dense tensor, not tuple"),
    "empty": (Odd(lambda a: ()), "encode must return a dense tensor, not tuple"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_autoencoder_is_refused(model, data, untouched, name):
    """Latents would have no relevance, or the prediction would be another one."""
    code, message = ODD[name]
    with (
        untouched(model),
        pytest.raises((ValueError, TypeError), match=message),
        splice(model, "conv1", code) as names,
    ):
        CondAttribution(model)(data, [{"y": 1}], EpsilonPlus(), [names.code])


@pytest.mark.parametrize("axis", [4, -4, -5])
def test_an_axis_that_is_none_of_channels(model, data, axis):
    with (
        pytest.raises(ValueError, match=rf"axis {axis} is none of channels"),
        splice(model, "conv1", Identity(), axis=axis),
    ):
        model(data)


def test_what_cannot_be_spliced(model, data):
    with (
        pytest.raises(TypeError, match="code must be an autoencoder, not the class Identity"),
        splice(model, "fc", Identity),
    ):
        pass
    with (
        pytest.raises(ValueError, match="reads must be one of 'output', 'input', not 'both'"),
        splice(model, "fc", Identity(), reads="both"),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not function"),
        splice(lambda x: x, "fc", Identity()),
    ):
        pass
    with pytest.raises(KeyError, match=r"\['fc'\] not found in model"), splice(model, ["fc"], Identity()):
        pass
    taken = "the model has a layer 'fc.code'; what is spliced behind 'fc' would have its name"
    with splice(model, "fc", Identity()), pytest.raises(ValueError, match=taken), splice(model, "fc", Identity()):
        pass


def test_an_input_by_name_is_refused():
    model = net(lambda s, x: s.fc(input=x), fc=nn.Linear(C, 4))
    with (
        splice(model, "fc", Identity(), reads="input"),
        pytest.raises(TypeError, match="the layer's first argument must be a tensor, and not given by name"),
    ):
        model(torch.ones(1, C).double())


def test_a_layer_with_two_names_is_spliced_in_all_its_places(untouched):
    shared = nn.Linear(C, C)
    model = net(lambda s, x: s.fc(s.second(s.first(x).relu()).relu()), first=shared, second=shared, fc=nn.Linear(C, 4))
    data = torch.ones(1, C).double()
    wanted = CondAttribution(model)(data, [{"y": 1}], EpsilonPlus(), ["first#0", "first#1"]).relevances
    with untouched(model), splice(model, "first", Identity()) as names:
        calls = [f"{names.code}#{number}" for number in range(2)]
        found = CondAttribution(model)(data, [{"y": 1}], EpsilonPlus(), calls).relevances
    for number in range(2):
        assert close(found[calls[number]], wanted[f"first#{number}"], 1e-9)


def test_attributes_of_the_layer_are_still_there(model):
    with splice(model, "conv1", Identity()):
        assert model.conv1.weight.shape == (C, 3, 3, 3)
        assert model.conv1.kernel_size == (3, 3)
        with pytest.raises(AttributeError, match="nothing"):
            model.conv1.nothing  # noqa: B018
