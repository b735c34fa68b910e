"""Metrics refuse what does not fit in our own words: data, relevance, methods, backgrounds, seeds, curves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attributor_cases import METRICS
from torch import Tensor, nn

from crp.attributors import Gradient, IntegratedGradients, MeaningfulPerturbation
from crp.attributors.explaining import explain
from crp.checks import check_number
from crp.composites import EpsilonPlus
from crp.engine.door import check_seed
from crp.errors import CRPError, InputError, InputTypeError
from crp.metrics import (
    area,
    continuity,
    local_lipschitz,
    pixel_flipping,
    quantus_explain,
    randomization,
    selectivity,
    translations,
)

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def giving(result: Any) -> Any:
    return lambda model, inputs, targets: result


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data must be a floating-point tensor, .* not NoneType"),
        ("x", "not str"),
        (X.numpy(), "not ndarray"),
        ([X[0], X[1]], "not list"),
        ((X, X), "not tuple|one input can be flipped, and 0, 1 are"),
        (X.long(), "not torch.int64"),
        (X[:0], "at least one sample"),
        (X * torch.nan, "NaN or infinite values in samples"),
        (X[:, :2], r"layer '0' \(Conv2d\)"),
        (X.double(), "has weights of torch.float32 and gets torch.float64"),
    ],
    ids=["none", "str", "array", "list", "tuple", "int", "empty", "nan", "channels", "dtype"],
)
def test_data_that_does_not_fit_is_named(name: str, data: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        METRICS[name](net(), data, 0, "epsilon_plus")
    assert isinstance(raised.value, CRPError)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (giving(None), "relevance must be an array or a tensor of numbers, not None"),
        (giving("a"), "not 'a'"),
        (giving(np.array([None, None])), "must be an array or a tensor of numbers"),
        (lambda model, inputs, targets: inputs * 1j, "relevance must be real numbers, not torch.complex"),
        (dict, "method must be a name, a composite or the class of an attributor, not <class 'dict'>"),
    ],
    ids=["none", "str", "objects", "complex", "class"],
)
def test_what_is_no_relevance_is_refused(name: str, method: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        METRICS[name](net(), X, 0, method)
    assert isinstance(raised.value, CRPError)


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_real_numbers(name: str) -> None:
    with pytest.raises(TypeError, match=r"scores of classes must be real numbers, not torch\.int64"):
        METRICS[name](net(), X, 0, "epsilon_plus", output=lambda y: y.long())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replacement": float("nan")}, "the background must be finite, without NaN or infinite values"),
        ({"replacement": lambda data: None}, "a background must give a tensor or a number, not None"),
        ({"replacement": lambda data: data / 0}, "the background must be finite, without NaN or infinite values"),
        ({"replacement": lambda data: data + 1j}, "the background must be real numbers, not of complex64"),
        ({"sigma": -1}, "sigma must be a number of at least 0, not -1"),
        ({"sigma": "a", "replacement": "blur"}, "sigma must be a number of at least 0, not 'a'"),
        ({"seed": "a"}, "seed must be a whole number of 64 bits, such as 0, not 'a'"),
        ({"seed": 2**64}, "seed must be a whole number of 64 bits"),
    ],
    ids=["nan", "none", "infinite", "complex", "sigma", "no sigma", "seed", "large seed"],
)
def test_settings_of_flipping(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pixel_flipping(net(), X, 0, "epsilon_plus", patch=4, **settings)


def test_relevance_of_a_table_has_a_number_for_each_feature() -> None:
    dense = nn.Sequential(nn.Linear(4, 3)).eval()
    with pytest.raises(InputError, match=r"relevance has shape \(2, 1\); it must have that of the data, \(2, 4\)$"):
        pixel_flipping(dense, torch.ones(2, 4), 0, relevance=torch.ones(2, 1))


def test_a_model_without_parameters_is_measured() -> None:
    curve = pixel_flipping(nn.Flatten().eval(), X, 0, "gradient", patch=4).most
    assert curve.shape == (2, 5) and curve.isfinite().all()


@pytest.mark.parametrize("metric", [local_lipschitz, randomization])
@pytest.mark.parametrize("seed", ["a", 1.5, True, None, 2**70])
def test_seeds(metric: Any, seed: Any) -> None:
    with pytest.raises(InputError, match="seed must be a whole number of 64 bits"):
        metric(net(), X, 0, "epsilon_plus", seed=seed)


def test_numbers_of_any_size() -> None:
    assert check_number("n", 2**2000, 1, whole=True) == 2**2000
    assert type(check_number("n", np.int64(3), 1, whole=True)) is int
    for seed in (0, -1, 2**64 - 1, -(2**63), np.int64(3)):
        check_seed(seed)
        torch.Generator().manual_seed(int(seed))


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("name", METRICS)
def test_batches_of_a_size_in_numbers_of_numpy(name: str, target: int | None) -> None:
    found, wanted = (METRICS[name](net(), X, target, "gradient", batch_size=size) for size in (np.int64(2), 2))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("curve", ["a", None, 5, [1.0, 2.0], torch.tensor(1.0), torch.ones(1), torch.ones(3, 0)])
def test_a_curve_has_two_points(curve: Any) -> None:
    with pytest.raises(InputError, match="a curve must be a tensor with at least two points"):
        area(curve)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": []}, "offsets must be whole numbers, and at least one"),
        ({"offsets": [1.5]}, "offsets must be whole numbers"),
        ({"offsets": "ab"}, "offsets must be whole numbers"),
        ({"axis": 9}, "a sample must be a tensor with the axis 9"),
        ({"axis": "a"}, "with the axis 'a'"),
        ({"sample": "a"}, "a sample must be a tensor"),
        ({"sample": torch.tensor(1.0)}, "a sample must be a tensor with the axis -1"),
        ({"fill": "a"}, "fill must be a finite number, not 'a'"),
    ],
)
def test_translations_need_a_sample_and_offsets(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        translations(**{"sample": X[0], "offsets": [0, 1], **changed})
    assert isinstance(raised.value, CRPError)


@pytest.mark.parametrize("method", ["epsilon_plus", EpsilonPlus()], ids=["name", "composite"])
def test_each_input_has_one_target(method: Any) -> None:
    """Several conditions for a sample would be summed, without a word."""
    explain_func = quantus_explain(method)
    with pytest.raises(InputError, match="there are 3 targets for 2 inputs; give one for each"):
        explain_func(net(), X.numpy(), [0, 1, 2])
    for inputs in ("a", None):
        with pytest.raises(TypeError, match="inputs must be an array or a tensor of numbers"):
            explain_func(net(), inputs, [0, 1])
    for targets in (["a", "b"], np.array([0.9, 1.0]), [True, False]):
        with pytest.raises(InputTypeError, match="targets must be whole numbers"):
            explain_func(net(), X.numpy(), targets)
    found: Tensor = explain_func(net(), X.numpy(), [1])
    assert (found == explain_func(net(), X.numpy(), [1, 1])).all()


def test_functions_that_write_into_their_input_leave_the_data_alone() -> None:
    def explain_func(model: nn.Module, inputs: Any, targets: Any) -> Any:
        inputs *= 0
        targets *= 0
        return inputs

    data, classes = X.clone(), torch.tensor([1, 0])
    pixel_flipping(net(), data, classes, explain_func, patch=4)
    assert torch.equal(data, X)
    assert classes.tolist() == [1, 0]


@pytest.mark.parametrize("method", ["gradient", EpsilonPlus()], ids=["name", "composite"])
def test_models_in_bfloat16(method: Any) -> None:
    found = pixel_flipping(net().bfloat16(), X.bfloat16(), 0, method, patch=2)
    assert found.most.dtype == torch.bfloat16
    assert (found.area_most - pixel_flipping(net(), X, 0, method, patch=2).area_most).abs().max() < 0.05


@pytest.mark.parametrize("neighbours", [True, False])
def test_continuity_in_bfloat16(neighbours: bool) -> None:
    wanted, found = (
        continuity(net().to(dtype), X.to(dtype), 0, "gradient_x_input", neighbours=neighbours)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert float(found) == pytest.approx(float(wanted), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
def test_relevance_is_summed_where_it_fits(dtype: torch.dtype) -> None:
    """Sums of a patch, and norms, that float16 takes for infinite, and so for equal."""
    patches = torch.tensor([[2e4, 1e4], [4e4, 3e4]]).repeat_interleave(3, 0).repeat_interleave(3, 1).expand_as(X)
    model, data = net().half(), X.half()
    found, wanted = (
        pixel_flipping(model, data, 0, relevance=patches.to(kind), patch=3, score="output")
        for kind in (dtype, torch.float64)
    )
    assert torch.equal(found.most, wanted.most) and torch.equal(found.least, wanted.least)
    assert not torch.equal(found.most, found.least)

    def steep(model: nn.Module, inputs: Any, targets: Any) -> Any:
        return (1.5e4 * torch.as_tensor(inputs).double()).to(dtype)

    assert local_lipschitz(model, data / 2, 0, steep, noise=0.5).tolist() == pytest.approx([1.5e4] * 2, rel=0.01)


def test_arrays_that_are_read_backward() -> None:
    """As those of flipped pictures are, of which torch makes no tensor."""
    flipped, classes = X.numpy()[..., ::-1], np.array([0, 1, 2])[:0:-1]
    wanted = explain("gradient", net(), X.flip(-1), [2, 1]).numpy()
    assert np.array_equal(quantus_explain("gradient")(net(), flipped, classes), wanted)
    assert np.array_equal(explain("gradient", net(), X.flip(-1), classes), wanted)
    starts = np.eye(3, dtype=np.float32)[:0:-1]
    assert np.array_equal(explain("gradient", net(), X.flip(-1), starts), wanted)
    assert np.array_equal(Gradient(net())(X.flip(-1), starts)[1], wanted)
    areas = (pixel_flipping(net(), X, 0, relevance=one).area_most for one in (flipped, X.flip(-1)))
    assert torch.equal(*areas)


def test_noise_of_selectivity_is_always_the_same() -> None:
    first, again = (selectivity(net(), X, 0, "gradient", patch=2, replacement="noise").curve for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", [IntegratedGradients, MeaningfulPerturbation])
def test_methods_that_are_made_for_a_model_are_told(kind: Any) -> None:
    with pytest.raises(InputTypeError, match=f"is made for one model; give the class {kind.__name__}, or quantus"):
        pixel_flipping(net(), X, 0, kind(net()))
