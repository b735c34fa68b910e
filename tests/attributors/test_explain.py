"""One call for all methods: names, options, targets, inputs and shapes; what DeepExplain and excitationbp define."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from attributor_cases import GIVEN, MAPS, NAMES, TwoInputs, close, explain, gap_net, gradient, images, two_inputs
from torch import nn

import crp
from crp import composites
from crp.attributors import Gradient, Neuron
from crp.composites.registry import _registry, register
from crp.outputs import Element

DEEP_EXPLAIN = ["saliency", "grad*input", "intgrad", "elrp", "deeplift", "occlusion", "shapley_sampling"]


# --- names and shapes -------------------------------------------------------------------------------------------------


def test_every_method_has_its_place_in_the_table():
    assert set(DEEP_EXPLAIN) | set(MAPS) | set(composites.names()) <= set(NAMES)
    assert {"sensitivity", "simple_taylor", "smoothgrad", "meaningful_perturbation"} <= set(NAMES)
    assert sorted(NAMES) == NAMES
    for method in crp.methods():
        assert method.family in ("gradient", "propagation", "cam", "perturbation")
        assert method.paper and "batch_size" in method.options, method


@pytest.mark.parametrize("name", NAMES)
def test_every_method_gives_the_shape_of_the_data_in_batches_of_any_size(name, untouched):
    model, x = gap_net(), images()
    with untouched(model):
        whole = explain(name, model, x, [0, 3, 1])
    assert whole.shape == x.shape and whole.dtype == x.dtype and not whole.requires_grad
    assert whole.isfinite().all() and (name == "meaningful_perturbation" or whole.abs().sum() > 0)
    close(explain(name, model, x, [0, 3, 1], batch_size=2), whole, rtol=1e-8, atol=1e-12)
    close(explain(name, model, x[2:], 1), whole[2:], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "setting"), [("intgrad", "steps"), ("smoothgrad", "n"), ("shapley_sampling", "samples")]
)
def test_counts_in_numbers_of_numpy(name, setting):
    model, x = gap_net(), images()
    found, wanted = (crp.explain(name, model, x, 1, batch_size=n, **{setting: n}) for n in (np.int64(2), 2))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*MAPS, "meaningful_perturbation")])
def test_tuples_in_tuples_out(name):
    model, inputs = TwoInputs(), two_inputs()
    options = {"occlusion": {"window_shape": 1}, "shapley_sampling": {"sampling_dims": (1,)}}.get(
        name, GIVEN.get(name, {})
    )
    found = crp.explain(name, model, inputs, [0, 1, 2], **options)
    assert isinstance(found, tuple)
    assert [part.shape for part in found] == [data.shape for data in inputs]
    if name not in ("epsilon_gamma_box", "contrastive_excitation_backprop"):
        assert all(part.abs().sum() > 0 for part in found)


def test_composites_registered_by_users_are_methods_at_once():
    @register("of_mine")
    class OfMine(composites.UniformEpsilon):
        pass

    try:
        model, x = gap_net(), images()
        close(crp.explain("of_mine", model, x, 1, epsilon=0.1), crp.explain("epsilon", model, x, 1, epsilon=0.1))
        assert {method.name: method.paper for method in crp.methods()}["of_mine"] == ""
    finally:
        del _registry["of_mine"]


# --- what DeepExplain defines -----------------------------------------------------------------------------------------


def test_saliency_and_gradient_times_input():
    model, x = gap_net(), images()
    g = gradient(model, x, 2)
    close(crp.explain("saliency", model, x, 2), g.abs())
    close(crp.explain("grad*input", model, x, 2), g * x)
    close(crp.explain("gradient_x_input", model, x, 2), g * x)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("epsilon", [1e-4, 0.5])
def test_elrp_is_gradient_times_input_with_ratios_for_derivatives(activation, epsilon):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 6), activation(), nn.Linear(6, 4)
    )
    model, x = model.double().eval().requires_grad_(False), torch.randn(3, 2, 6, 6).double()

    class Ratio(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            y = activation()(a)
            ctx.save_for_backward(y / (a + epsilon * torch.where(a < 0, -1.0, 1.0)))
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    leaf = x.clone().requires_grad_()
    value = leaf
    for layer in model:
        value = Ratio.apply(value) if isinstance(layer, activation) else layer(value)
    (expected,) = torch.autograd.grad(value[:, 2].sum(), leaf)
    close(crp.explain("elrp", model, x, 2, epsilon=epsilon), x * expected, rtol=1e-7, atol=1e-9)


def test_elrp_takes_batch_norm_for_a_layer_and_no_activation():
    """At a ReLU, the ratio is the derivative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model(torch.randn(50, 4).double() * 3 + 1)
    x = torch.randn(5, 4).double()
    close(crp.explain("elrp", model.eval(), x, 1, epsilon=1e-12), crp.explain("grad*input", model, x, 1), rtol=1e-6)


def test_elrp_without_activations_is_gradient_times_input():
    """DeepExplain's definition: it overrides the gradient of activations, and there are none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    x = torch.randn(3, 2, 6, 6).double()
    with pytest.warns(UserWarning, match="Sequential calls no activation, .* the result is gradient × input") as caught:
        found = crp.explain("elrp", model, x, 2)
    assert len(caught) == 1
    close(found, x * gradient(model, x, 2))


def test_options_of_deep_explain():
    model, x = gap_net(), images()
    x0 = torch.rand_like(x)
    fall = (model(x) - model(x0))[:, 1].detach()
    close(crp.explain("deeplift", model, x, 1, baseline=x0).flatten(1).sum(1), fall)
    for size in (1, 2):
        close(
            crp.explain("deeplift", model, x, [2, 0, 1], baseline=x0, batch_size=size),
            crp.explain("deeplift", model, x, [2, 0, 1], reference=x0),
        )
    close(crp.explain("deeplift", model, x, 1, baseline=x0[0]), crp.explain("deeplift", model, x, 1, reference=x0[:1]))
    one = crp.explain("occlusion", model, x, 1, window_shape=(3, 2, 2), step=(1, 2, 2))
    shared = crp.explain("occlusion", model, x, 1, window_shape=(3, 2, 2), step=(1, 2, 2), per_feature=True)
    close(shared * 12, one)
    fall = (model(x) - model(torch.zeros_like(x)))[:, 1].detach()
    close(crp.explain("shapley_sampling", model, x, 1, samples=1).flatten(1).sum(1), fall)


def test_baselines_of_several_inputs():
    model, inputs = TwoInputs(), two_inputs()
    bases = tuple(map(torch.rand_like, inputs))
    fall = (model(*inputs) - model(*bases))[:, 1].detach()
    for options in ({}, {"batch_size": 2}):
        found = crp.explain("deeplift", model, inputs, 1, baseline=bases, **options)
        close(sum(part.flatten(1).sum(1) for part in found), fall)
    found = crp.explain("shapley_sampling", model, inputs, 1, baseline=bases)
    assert all(map(torch.equal, found, crp.explain("shapley_sampling", model, inputs, 1, baseline=list(bases))))
    first, alone = (crp.explain("occlusion", model, inputs, 1, explain=0, baseline=base) for base in (bases, bases[0]))
    assert torch.equal(first, alone)
    close(sum(part.flatten(1).sum(1) for part in found), fall)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradient", "epsilon", "deeplift", "intgrad", "occlusion", "sensitivity", "elrp"])
def test_kinds_of_targets_agree(name):
    model, x = gap_net(), images()
    found = explain(name, model, x, 2)
    one_hot = torch.eye(4).double()[2].expand(3, 4)
    for target in (torch.tensor(2), [2, 2, 2], torch.full((3,), 2), one_hot, one_hot.numpy(), -2, lambda y: y[:, 2]):
        close(explain(name, model, x, target), found)


@pytest.mark.parametrize("name", ["gradient", "epsilon", "deeplift", "intgrad", "occlusion", "shapley_sampling"])
def test_mask_is_a_weighted_sum_where_the_method_is_linear(name):
    model, x = gap_net(), images()
    mask = torch.randn(3, 4, dtype=torch.float64)
    each = [explain(name, model, x, c) for c in range(4)]
    close(explain(name, model, x, mask), sum(mask[:, c].view(-1, 1, 1, 1) * each[c] for c in range(4)))


def test_a_boolean_mask_is_one_of_the_outputs():
    model, x = gap_net(), images()
    mask = torch.tensor([True, False, True, False])
    close(crp.explain("gradient", model, x, mask), crp.explain("gradient", model, x, mask.double()))


class Unused(nn.Module):
    """Gives one score for each sample, without an axis of classes, and has a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.used(x)[:, 0]


@pytest.mark.filterwarnings("ignore:layer 'unused' is not called")
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (0, {}, r"output has shape \(2,\), which has no axis of classes"),
        (lambda y: y, {"layer": "unused"}, "layer 'unused' is not called in the forward pass"),
        (Neuron("unused", 0), {"method": "occlusion"}, "layer 'unused', named as layer, is not called"),
    ],
)
def test_a_score_alone_and_a_layer_that_is_not_called(target, options, message):
    method = options.pop("method", "gradient")
    with pytest.raises(ValueError, match=message):
        crp.explain(method, Unused().eval(), torch.ones(2, 4), target, **options)


def test_neurons():
    model, x = gap_net(), images()
    for name in ("gradient", "epsilon", "intgrad", "occlusion"):
        found = explain(name, model, x, layer="3", neuron=(2, 1, 1))
        close(explain(name, model, x, Neuron("3", (2, 1, 1))), found)
        close(explain(name, model[:4].eval(), x, lambda y: y[:, 2, 1, 1]), found)
    head = explain("gradient", model, x, Neuron("3", 1), layer="1")  # a neuron, explained by a layer below it
    close(head, gradient_of_channel(model, x))


class Again(nn.Module):
    """Returns twice what it gives when it calls itself on its own output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, again=True):
        output = self.layer(x)
        return 2 * self(output, again=False) if again else output


@pytest.mark.parametrize("method", ["occlusion", "intgrad"])
def test_a_model_that_calls_itself_is_explained_by_what_it_returns(method):
    model, x = Again().double().eval(), torch.rand(2, 3, dtype=torch.float64)
    close(crp.explain(method, model, x, 1).sum(1), model(x)[:, 1] - model(torch.zeros_like(x))[:, 1])


def gradient_of_channel(model, x):
    hidden = model[:2](x).detach().requires_grad_()
    return torch.autograd.grad(model[2:4](hidden)[:, 1].sum(), hidden)[0]


def test_default_target_is_what_is_predicted():
    model, x = gap_net(), images(6)
    predicted = model(x).argmax(1)
    close(crp.explain("gradient", model, x), crp.explain("gradient", model, x, predicted))
    with pytest.raises(ValueError, match="no class is the predicted one; give a target"):
        crp.explain("gradient", model[:4].eval(), x)


def test_outputs_with_positions():
    model, x = gap_net()[:4].eval(), images()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)
    close(crp.explain("gradient", model, x, 3), expected)


def test_conditions_and_composites_by_name():
    model, x = gap_net(), images()
    parts = [crp.explain("epsilon", model, x, 1, condition={"3": c}) for c in range(6)]
    close(sum(parts), crp.explain("epsilon", model, x, 1))
    found = crp.explain("smoothgrad", model, x, 1, composite="epsilon", n=3)
    close(found, crp.explain("smoothgrad", model, x, 1, composite=composites.UniformEpsilon(), n=3))
    assert not torch.allclose(found, crp.explain("smoothgrad", model, x, 1, n=3))


# --- excitation backprop ----------------------------------------------------------------------------------------------


def eb_in_matrices(weights, activations, start):
    """Zhang et al. (2018), eq. 10, from the top layer down; a list with the distribution of each layer."""
    found = [start]
    for w, a in zip(reversed(weights), reversed(activations), strict=True):
        z = a @ w.clamp(min=0).T
        found.append(a * (torch.where(z > 0, found[-1] / z, 0) @ w.clamp(min=0)))
    return found


def dense():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 17), nn.ReLU(), nn.Linear(17, 15), nn.ReLU(), nn.Linear(15, 4)).double().eval()
    x = torch.rand(3, 6).double()
    with torch.no_grad():
        return model, x, [x, model[:2](x), model[:4](x)], [model[i].weight.detach() for i in (0, 2, 4)]


@pytest.mark.parametrize("start", ["one class", "distribution"])
def test_excitation_backprop_to_any_layer(start):
    model, x, activations, weights = dense()
    target = 2 if start == "one class" else model(x).detach().softmax(1)
    begin = torch.eye(4).double()[[2, 2, 2]] if start == "one class" else target
    _, upper, lower, inputs = eb_in_matrices(weights, activations, begin)
    close(crp.explain("excitation_backprop", model, x, target), inputs)
    close(crp.explain("excitation_backprop", model, x, target, layer="1"), lower)
    close(crp.explain("excitation_backprop", model, x, target, layer="3"), upper)
    close(inputs.sum(1), torch.ones(3).double())


@pytest.mark.parametrize("start", ["one class", "distribution"])
def test_contrastive_excitation_backprop_to_any_layer(start):
    model, x, activations, weights = dense()
    target = 2 if start == "one class" else model(x).detach().softmax(1)
    begin = torch.eye(4).double()[[2, 2, 2]] if start == "one class" else target
    against = eb_in_matrices([*weights[:2], -weights[2]], activations, begin)
    positive = eb_in_matrices(weights, activations, begin)
    for options, number in ({}, 3), ({"layer": "1"}, 2), ({"layer": "3"}, 1):
        found = crp.explain("contrastive_excitation_backprop", model, x, target, **options)
        close(found, positive[number] - against[number])
        close(found.sum(1), torch.zeros(3).double(), atol=1e-12)
    below = eb_in_matrices([weights[0], -weights[1], weights[2]], activations, begin)
    named = crp.explain("contrastive_excitation_backprop", model, x, target, classifier="2")
    close(named, positive[3] - below[3])


# --- errors, and how it is imported -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: crp.explain("intgrads", m, x, 0), ValueError, "no method 'intgrads'; nearest: 'intgrad'"),
        (lambda m, x: crp.explain(3, m, x, 0), TypeError, "method must be a name, .*, not 3"),
        (lambda m, x: crp.explain("intgrad", m, x, 0, step=5), ValueError, "no option 'step'; nearest: 'steps'"),
        (lambda m, x: crp.explain("occlusion", m, x, 0, layer="1"), ValueError, "'occlusion' has no option 'layer'"),
        (lambda m, x: crp.explain("grad_cam", m, x, 0), ValueError, "method 'grad_cam' needs layer="),
        (lambda m, x: crp.explain("grad_cam", m, x, layer="1", neuron=0), ValueError, "'grad_cam' needs layer="),
        (lambda m, x: crp.explain("epsilon_gamma_box", m, x, 0, low=0), ValueError, "needs high="),
        (lambda m, x: crp.explain("epsilon", m, x, 9), IndexError, "target 9 is out of range"),
        (lambda m, x: crp.explain("occlusion", m, x, 9), IndexError, "target 9 is out of range"),
        (lambda m, x: crp.explain("occlusion", m, x, 0, window_shape=()), ValueError, r"window_shape .* has 0 axes"),
        (lambda m, x: crp.explain("occlusion", m, x, Neuron("3#1", 0)), ValueError, "there is no 3#1"),
        (lambda m, x: crp.explain("gradient", m, x, Element((9,))), IndexError, r"the element \(9,\), but the"),
        (lambda m, x: crp.explain("gradient", m, x, [Element((0,))] * 2), ValueError, "has 2 places for 3 samples"),
        (lambda m, x: crp.explain("gradient", m, x, Element("a")), TypeError, r"target names the element \('a',\);"),
        (lambda m, x: crp.explain("gradient", m, x, torch.tensor(1.0)), TypeError, "mask of the outputs has their"),
        (lambda m, x: crp.explain("epsilon", m, x, 0, baseline=0), ValueError, "'epsilon' has no option 'baseline'"),
        (lambda m, x: crp.explain("intgrad", m, x, 0, baseline={"a": 0}), ValueError, "baseline for 'a', which is not"),
        (lambda m, x: crp.explain("deeplift", m, x, 0, baseline=0, batch_size=-1), ValueError, "batch_size must be"),
        (lambda m, x: Gradient(m)(x, torch.ones(2, 4)), ValueError, r"attr_output of shape \(2, 4\) is for other"),
        (lambda m, x: crp.explain("epsilon", m, x, [0, 1]), ValueError, "2 classes for 3 samples"),
        (lambda m, x: crp.explain("epsilon", m, x, 0, neuron=1, layer="1"), ValueError, "both given"),
        (lambda m, x: crp.explain("epsilon", m, x, neuron=1), ValueError, "needs the layer that it is in"),
        (lambda m, x: crp.explain("epsilon", m, x, 0, batch_size=-1), ValueError, "batch_size must be"),
        (lambda m, x: crp.explain("epsilon", m, x, 0, layer="nope"), KeyError, "'nope' not found"),
        (lambda m, x: crp.explain("deeplift", m, x, 0, baseline=0, reference=0), ValueError, "two names of one option"),
        (lambda m, x: crp.explain("deeplift", m, x, 0, baseline=x[:2]), ValueError, "the baseline has shape"),
        (lambda m, x: crp.explain("deeplift", m, x, [0, 1], baseline=0, batch_size=2), ValueError, "2 classes for 3"),
        (lambda m, x: crp.explain("meaningful_perturbation", m, (x, x), 0), ValueError, "one input, not of 2"),
        (lambda m, x: crp.explain("smoothgrad", m, x, 0, composite="epsilom"), KeyError, "there is no composite"),
        (lambda m, x: crp.explain("gradient", m, x, lambda y: y[:1, 0], batch_size=2), ValueError, "with batch_size"),
    ],
)  # fmt: skip
def test_errors(call, error, message, untouched):
    model, x = gap_net(), images()
    with untouched(model), pytest.raises(error, match=message):
        call(model, x)


def test_package_has_the_function_however_it_is_imported():
    code = """
import sys, torch
for imports in ("import crp", "import crp.attributors.explaining", "from crp import explain; import crp"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "crp"]:
        del sys.modules[name]
    exec(imports)
    assert crp.methods()[0].name == "alpha_beta", imports
    assert crp.explain("gradient", torch.nn.Linear(2, 1).eval(), torch.ones(1, 2), 0).shape == (1, 2), imports
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_has_no_other_names():
    with pytest.raises(AttributeError, match="module 'crp' has no attribute 'explains'"):
        crp.explains  # noqa: B018
