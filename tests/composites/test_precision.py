"""Every preset on a small CNN in lower precision and other layouts, against float64.

Deviations are norms of the difference over the norm of the whole relevance. The table is what was measured (on CPU);
other machines and versions round in another order, so that the bounds are some times as much. The gradient itself
deviates by 0.13 in bfloat16, where some units change sides.
"""

import warnings

import pytest
import torch
from core_cases import exhibit, images
from torch import nn

import crp.composites as composites
from crp.attribution import CondAttribution

#: Measured deviations in float32 and under autocast to bfloat16.
MEASURED = {
    "alpha_beta": (4.4e-07, 8.9e-02),
    "attn_lrp": (6.2e-07, 7.2e-02),
    "beta_smooth": (3.4e-07, 2.1e-02),
    "contrastive_excitation_backprop": (5.1e-07, 6.6e-02),
    "cp_lrp": (1.3e-07, 4.5e-02),
    "deconvnet": (1.1e-07, 3.3e-03),
    "deep_taylor": (2.3e-07, 2.4e-02),
    "deeplift": (4.4e-07, 1.9e-02),
    "epsilon": (1.6e-07, 4.5e-02),
    "epsilon_alpha2_beta1": (3.5e-07, 1.4e-01),
    "epsilon_alpha2_beta1_flat": (3.5e-07, 3.2e-02),
    "epsilon_gamma": (5.3e-07, 2.0e-02),
    "epsilon_gamma_box": (3.9e-07, 1.6e-02),
    "epsilon_plus": (2.3e-07, 8.6e-03),
    "epsilon_plus_flat": (2.2e-07, 7.1e-03),
    "excitation_backprop": (2.2e-07, 2.7e-02),
    "gamma": (4.9e-07, 1.9e-02),
    "gradient": (1.2e-07, 1.3e-01),
    "gradient_x_input": (1.3e-07, 1.3e-01),
    "guided_backprop": (9.1e-08, 7.7e-02),
    "lrp_0": (1.3e-07, 4.5e-02),
    "lrp_cmp": (3.9e-07, 1.5e-02),
    "relp": (6.2e-07, 7.2e-02),
    "zplus": (2.2e-07, 8.7e-03),
}
#: How many times as much is allowed.
ROOM = 5, 3
KEYWORDS = {
    "deep_taylor": {"low": -5.0, "high": 5.0},
    "deeplift": {"reference": 0.1},
    "epsilon_gamma_box": {"low": -5.0, "high": 5.0},
    "lrp_cmp": {"first": "box", "low": -5.0, "high": 5.0},
}
QUIET = "outside DeepLIFT|(DeepLift|GuidedBackprop|DeconvNet|BetaSmooth) has no rule"


def relevance(name, model, data, autocast=False):
    composite = composites.get(name, **KEYWORDS.get(name, {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=QUIET)
        with composite.context(model):
            leaf = data.clone(memory_format=torch.preserve_format).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(leaf)
            assert out.dtype == (torch.bfloat16 if autocast else data.dtype)
            (found,) = torch.autograd.grad(out[:, 0].sum(), leaf)
    assert found.dtype == data.dtype
    return found.double()


def deviation(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_every_preset_was_measured():
    assert sorted(MEASURED) == composites.names()


@pytest.mark.parametrize("name", MEASURED)
def test_lower_precision(name):
    single, half = (measured * room for measured, room in zip(MEASURED[name], ROOM, strict=True))
    data = images(4, 8)
    wanted = relevance(name, exhibit(), data)
    model = exhibit().float()
    assert deviation(relevance(name, model, data.float()), wanted) < single
    assert deviation(relevance(name, model, data.float(), autocast=True), wanted) < half


@pytest.mark.parametrize("name", MEASURED)
def test_channels_last_and_compiled_models(name):
    data = images(4, 8)
    wanted = relevance(name, exhibit(), data)
    last = exhibit().to(memory_format=torch.channels_last)
    found = relevance(name, last, data.to(memory_format=torch.channels_last))
    assert deviation(found, wanted) < 1e-12
    compiled = exhibit()
    compiled.compile(backend="eager")
    assert deviation(relevance(name, compiled, data), wanted) < 1e-12
    assert compiled._compiled_call_impl is not None


@pytest.mark.parametrize("autocast", [False, True], ids=["model", "autocast"])
def test_relevance_that_is_lost_in_float16_is_told(autocast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        model[0].weight.abs_()
        model[4].weight.abs_()[:, 3] *= 1e-3  # (a channel that does little)
    data, whole, part = torch.rand(1, 3, 24, 24), {"y": 0}, {"y": 0, "1": [3]}
    (exact,) = CondAttribution(model.double())(data.double(), [part], composites.EpsilonPlus()).heatmap
    model, data = (model.float(), data) if autocast else (model.half(), data.half())

    def heatmaps(conditions, **options):
        with torch.autocast("cpu", torch.float16, enabled=autocast), warnings.catch_warnings():
            warnings.simplefilter("error")
            return CondAttribution(model)(data, conditions, composites.EpsilonPlus(), **options).heatmap

    heatmaps([whole])
    heatmaps([whole], on_device="meta")  # (where nothing can be said)
    with pytest.raises(UserWarning, match="below 6e-05 everywhere in some rows, where float16 has few digits"):
        heatmaps([whole, part])
    (found,) = heatmaps([part], init_rel=1000.0).double()
    shares, expected = found / found.sum(), exact / exact.sum()
    assert torch.linalg.vector_norm(shares - expected) < 0.01 * torch.linalg.vector_norm(expected)


def test_relevance_of_one_number_for_each_sample_in_float16():
    model, data = nn.Linear(4, 2).eval().half(), torch.ones(2, 4, dtype=torch.float16)
    assert CondAttribution(model)(data, [{"y": 0}], composites.EpsilonPlus()).heatmap.shape == (2,)
