"""Occlusion and Shapley values: closed forms, what windows cover, permutations, and passes through the model."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from attributor_cases import Call, TwoInputs, close, gap_net, images, two_inputs
from hypothesis import given, settings
from torch import nn

from crp import explain
from crp.attributors import Neuron, Occlusion, ShapleySampling, SmoothGrad
from crp.attributors.occlusion import windows
from crp.composites import EpsilonPlus
from crp.engine.independence import check_independent
from crp.engine.inputs import Inputs
from crp.errors import InputError, InputTypeError

few = settings(max_examples=20, deadline=None)


def by_hand(score, x, window, step, baseline=0.0):
    """Occlusion of one image, window by window."""
    height, width = x.shape[1:]
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(0, height - window + 1, step):
        for j in range(0, width - window + 1, step):
            covered = x.clone()
            covered[:, i : i + window, j : j + window] = baseline
            total[:, i : i + window, j : j + window] += score(x) - score(covered)
            count[:, i : i + window, j : j + window] += 1
    return total / count


# --- occlusion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "step"), [(2, 2), (3, 1), (2, 1), (8, 1), (4, 2)])
@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_occlusion_is_the_fall_of_the_score(window, step, batch_size):
    model, x = gap_net().requires_grad_(False), images()
    _, found = Occlusion(model, window_shape=window, step=step, batch_size=batch_size)(x, [0, 1, 2])
    for row in range(3):
        close(found[row], by_hand(lambda v, row=row: model(v[None])[0, row], x[row], window, step))


def test_linear_model_gives_its_terms():
    model, x = nn.Linear(5, 2).double().eval(), torch.randn(3, 5).double()
    x0 = torch.randn(3, 5).double()
    weight = model.weight[1].detach()
    close(Occlusion(model, baseline=x0)(x, 1)[1], weight * (x - x0))
    terms = weight * (x - x0)
    pairs = (terms[:, :-1] + terms[:, 1:]).clone()  # each window of two
    expected = torch.stack([pairs[:, 0], *[(pairs[:, i - 1] + pairs[:, i]) / 2 for i in range(1, 4)], pairs[:, 3]], 1)
    close(Occlusion(model, window_shape=2, baseline=x0)(x, 1)[1], expected)
    close(Occlusion(model, window_shape=2, baseline=x0, per_feature=True)(x, 1)[1], expected / 2)


def test_window_of_fewer_axes_covers_the_others_whole():
    for arguments in (2, 2), ((2, 2), (2, 2)), ((3, 2, 2), (1, 2, 2)):
        starts, offsets = windows((3, 4, 4), *arguments)
        assert starts.tolist() == [0, 2, 8, 10]
        assert offsets.tolist() == [c + p for c in (0, 16, 32) for p in (0, 1, 4, 5)]
    assert [len(part) for part in windows((3, 4, 4))] == [48, 1]
    assert [len(part) for part in windows((3, 4, 4), (1, 1))] == [16, 3]
    assert windows((3, 4), None, 2)[0].tolist() == [0, 2, 8, 10]
    assert [part.tolist() for part in windows((5,), 2, 3)] == [[0, 3], [0, 1]]
    assert [part.tolist() for part in windows((2, 3), (2, 3))] == [[0], list(range(6))]


@pytest.mark.parametrize(
    ("method", "options"), [("occlusion", {"window_shape": (24, 24)}), ("intgrad", {"steps": 1000})]
)
def test_long_sums_in_half_precision(method, options):
    """625 windows, and 1000 steps; a number in bfloat16 counts to 256."""
    weight = torch.linspace(0, 1, 48)[:, None].expand(48, 48).flatten()
    model, x = Call(lambda x: (x.flatten(1) @ weight.to(x))[:, None]), torch.ones(1, 1, 48, 48)
    wanted, found = (explain(method, model, x.to(dtype), 0, **options) for dtype in (torch.float64, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.005)


def test_features_without_a_window_get_nothing_and_one_warning():
    model, x = nn.Linear(5, 1, bias=False).double().eval(), torch.ones(2, 5).double()
    with pytest.warns(UserWarning, match="no window covers 1 of 5 features, which get 0") as caught:
        _, found = Occlusion(model, window_shape=2, step=2)(x, 0)
    assert len(caught) == 1
    assert (found[:, 4] == 0).all() and found.isfinite().all() and (found[:, :4] != 0).all()


def test_occlusion_of_several_inputs_covers_one_at_a_time():
    model, inputs = TwoInputs(), two_inputs()
    _, (picture, vector) = Occlusion(model, window_shape=[2, 1], step=[2, 1], baseline=(0.5, None))(inputs, [0, 1, 2])
    rows = torch.arange(3)
    with torch.no_grad():
        whole = model(*inputs)[rows, rows]
        covered = inputs[0].clone()
        covered[:, :, 2:, :2] = 0.5
        close(picture[:, 1, 3, 0], whole - model(covered, inputs[1])[rows, rows])
        without = inputs[1].clone()
        without[:, 2] = 0
        close(vector[:, 2], whole - model(inputs[0], without)[rows, rows])


def test_occlusion_of_a_neuron_and_of_a_function():
    model, x = gap_net().requires_grad_(False), images(1)
    found = Occlusion(model, window_shape=4, step=4)(x, Neuron("3", (1, 2, 2)))[1]
    close(found[0], by_hand(lambda v: model[:4](v[None])[0, 1, 2, 2], x[0], 4, 4))
    found = Occlusion(model, window_shape=4, step=4)(x, lambda y: y.softmax(1))[1]  # zennit: summed, so always 1
    close(found, torch.zeros_like(x))


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


def test_the_second_call_of_a_layer_is_covered_and_scored():
    model, x = Twice().eval(), torch.randn(3, 4, dtype=torch.float64)
    first, second = (Occlusion(model)(x, Neuron(f"layer#{call}", 2))[1] for call in range(2))
    close(first, Occlusion(model.layer)(x, 2)[1])
    close(second, Occlusion(model)(x, 2)[1])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", ["occlusion", "shapley_sampling", "intgrad", "smoothgrad"])
def test_models_whose_samples_depend_on_each_other_are_refused(name):
    with pytest.raises(InputError, match="depends on the samples beside it"):
        explain(name, Call(lambda x: x - x.mean(0)), torch.randn(3, 4, dtype=torch.float64), 1)


def test_the_seed_may_be_that_of_torch():
    model, x = gap_net(), images(1)
    torch.manual_seed(3)
    found = ShapleySampling(model, sampling_dims=(2,), seed=None)(x, 1)[1]
    torch.manual_seed(3)
    orders = torch.stack([torch.randperm(8) for _ in range(5)])
    close(found, ShapleySampling(model, sampling_dims=(2,), permutations=orders)(x, 1)[1])


def test_composites_have_no_effect(untouched):
    model, x = gap_net(), images()
    with untouched(model):
        close(
            Occlusion(model, EpsilonPlus(), window_shape=4, step=4)(x, 1)[1],
            Occlusion(model, window_shape=4, step=4)(x, 1)[1],
        )


def test_passes_through_the_model_are_few():
    seen = []
    model = Call(lambda v: (seen.append(len(v)), v.flatten(1))[1])
    check_independent(model, Inputs.single(torch.ones(1, 100)), [range(2)])
    seen.clear()
    Occlusion(model)(torch.ones(1, 100), 0)
    assert seen == [1, 64, 36, 1]


# --- Shapley values ---------------------------------------------------------------------------------------------------


def exact(score, x, x0):
    """Shapley values of one sample by the sum over all coalitions."""
    n = len(x)
    found = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            for coalition in itertools.combinations(others, size):
                weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                without = x0.clone()
                without[list(coalition)] = x[list(coalition)]
                joined = without.clone()
                joined[i] = x[i]
                found[i] += weight * (score(joined) - score(without))
    return found


def all_orders(n):
    return torch.tensor(list(itertools.permutations(range(n))))


def test_linear_model_gives_its_terms_in_any_permutation():
    model, x = nn.Linear(6, 2).double().eval(), torch.randn(3, 6).double()
    _, found = ShapleySampling(model, samples=1, baseline=1.0)(x, 1)
    close(found, (model.weight[1] * (x - 1)).detach())


def test_maximum_of_two():
    """max(x1, x2) from 0: the smaller one is shared, the rest is the larger's."""
    model = Call(lambda v: v.clamp(min=0).amax(1, keepdim=True))
    x = torch.tensor([[3.0, 1.0], [1.0, 4.0], [2.0, 2.0]]).double()
    _, found = ShapleySampling(model, permutations=all_orders(2))(x, 0)
    close(found, torch.tensor([[2.5, 0.5], [0.5, 3.5], [1.0, 1.0]]).double())


def test_players_come_in_the_order_of_the_permutation():
    model = Call(lambda v: v.cumprod(1)[:, -1:] + v.amax(1, keepdim=True))
    x = torch.tensor([[2.0, 3.0, 5.0]]).double()
    _, found = ShapleySampling(model, permutations=torch.tensor([[1, 2, 0]]))(x, 0)
    close(found, torch.tensor([[30.0, 3.0, 2.0]]).double())  # 1 alone, then 2, then 0


@few
@given(st.integers(0, 10_000))
def test_all_permutations_are_the_sum_over_coalitions(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval().requires_grad_(False)
    x, x0 = torch.randn(2, 2, 4).double()
    _, found = ShapleySampling(model, permutations=all_orders(4), baseline=x0)(x, 1)
    for row in range(2):
        close(found[row], exact(lambda v: model(v[None])[0, 1], x[row], x0[row]))


@pytest.mark.parametrize("dims", [None, (2, 3), (1,), [3]])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_players_share_the_whole_fall(dims, batch_size):
    model, x = gap_net(), images(2)[..., :4, :4]
    _, found = ShapleySampling(model, samples=2, sampling_dims=dims, batch_size=batch_size)(x, [0, 1])
    axes = tuple(axis for axis in (1, 2, 3) if dims is not None and axis not in dims)
    if axes:
        close(found, found.mean(axes, keepdim=True).expand(x.shape))
        found = found.mean(axes)
    fall = (model(x) - model(torch.zeros_like(x)))[[0, 1], [0, 1]].detach()
    close(found.flatten(1).sum(1), fall)


def test_several_inputs_have_players_of_their_own():
    model = Call(lambda a, b: (a.sum(1) * 2 + b.sum(1) * 3)[:, None])
    x = torch.rand(2, 3).double(), torch.rand(2, 2).double()
    _, found = ShapleySampling(model)(x, 0)
    close(found[0], x[0] * 2)
    close(found[1], x[1] * 3)


def test_permutations_depend_on_the_seed():
    model, x = gap_net(), images(1)
    first = ShapleySampling(model, sampling_dims=(2,))(x, 1)[1]
    close(ShapleySampling(model, sampling_dims=(2,), batch_size=3)(x, 1)[1], first)
    assert not torch.allclose(ShapleySampling(model, sampling_dims=(2,), seed=1)(x, 1)[1], first)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: Occlusion(m, window_shape=9)(x, 0), r"window_shape 9 is larger than the input.*\(3, 8, 8\)"),
        (lambda m, x: Occlusion(m, window_shape=(4, 2, 2))(x, 0), "larger than the input"),
        (lambda m, x: Occlusion(m, window_shape=(1, 1, 1, 1))(x, 0), "has 4 axes; the input has 3"),
        (lambda m, x: Occlusion(m, window_shape=0)(x, 0), "window_shape must be a whole number of at least 1, not 0"),
        (lambda m, x: Occlusion(m, window_shape=())(x, 0), "has 0 axes; the input has 3"),
        (
            lambda m, x: Occlusion(m, window_shape=2, step=(1, 0))(x, 0),
            "step must be a whole number of at least 1, not 0",
        ),
        (lambda m, x: Occlusion(m, window_shape=[1, 2])(x, 0), "settings for 2 inputs, .* are a tuple"),
        (lambda m, x: Occlusion(m, baseline=x[:2])(x, 0), "the baseline has shape"),
        (lambda m, x: Occlusion(m, baseline=x[0] * torch.nan)(x, 0), "the baseline must be finite"),
        (lambda m, x: SmoothGrad(m, noise=x[None] * torch.nan)(x, 0), "noise must be real numbers, and finite"),
        (lambda m, x: SmoothGrad(m, noise=x[None] + 1j)(x, 0), "noise must be real numbers, and finite"),
        (lambda m, x: ShapleySampling(m, samples=0), "samples must be a whole number"),
        (lambda m, x: ShapleySampling(m, sampling_dims=(0,))(x, 0), "must name axes from 1 to 3"),
        (lambda m, x: ShapleySampling(m, sampling_dims=(4,))(x, 0), "must name axes from 1 to 3"),
        (lambda m, x: ShapleySampling(m, sampling_dims=())(x, 0), "must name axes from 1 to 3"),
        (lambda m, x: ShapleySampling(m, permutations=torch.zeros(1, 3))(x, 0), r"the shape \(samples, 192\)"),
        (lambda m, x: ShapleySampling(m, sampling_dims=(1,), permutations=torch.tensor([[0, 1, 1]]))(x, 0), "every"),
    ],
)
def test_errors_before_the_model_runs(call, message):
    model = Call(lambda v: pytest.fail("the model runs"))
    with pytest.raises(InputError, match=message):
        call(model, images())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: Occlusion(m, baseline=x[0] + 1j)(x, 0), "the baseline must be real numbers, not of complex128"),
        (lambda m, x: Occlusion(m, baseline=np.array(["0"]))(x, 0), "the baseline must be real numbers, not of <U1"),
        (lambda m, x: Occlusion(m, baseline=[[1.0, 2.0], [3.0]])(x, 0), "the baseline must be real numbers"),
        (lambda m, x: ShapleySampling(m, sampling_dims=(True,))(x, 0), "sampling_dims must be integers"),
        (lambda m, x: ShapleySampling(m, sampling_dims=(2.0,))(x, 0), "sampling_dims must be integers"),
        (lambda m, x: ShapleySampling(m, sampling_dims=(1,), permutations="012")(x, 0), "permutations must be real"),
    ],
)
def test_what_is_no_such_number(call, message):
    with pytest.raises(InputTypeError, match=message):
        call(Call(lambda v: pytest.fail("the model runs")), images())


def test_one_axis_of_players_needs_no_tuple():
    model, x = gap_net(), images(1)
    close(ShapleySampling(model, sampling_dims=2)(x, 1)[1], ShapleySampling(model, sampling_dims=(2,))(x, 1)[1])
