"""Names of layers: found, checked, and seen through wrappers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from crp import explain
from crp.attribution import CondAttribution
from crp.engine.additions import attached, clear
from crp.errors import InputError
from crp.graph import trace_model_graph
from crp.helper import get_output_shapes
from crp.layers import (
    LayerNotFoundError,
    differentiable,
    evaluating,
    find_layers,
    get_layer_names,
    hooked,
    uncompiled,
    unwrap,
)
from crp.layers.lasting import Shared


def test_layer_names_are_those_of_named_modules_in_their_order(vgg_bn):
    assert get_layer_names(vgg_bn, [nn.Conv2d]) == ["features.0", "features.3", "features.7"]
    assert get_layer_names(vgg_bn, [nn.Linear, nn.Conv2d])[-2:] == ["classifier.1", "classifier.4"]
    assert get_layer_names(vgg_bn, []) == []


def test_subclasses_count_as_their_type(vgg_bn):
    assert get_layer_names(vgg_bn, [nn.modules.batchnorm._BatchNorm]) == ["features.1", "features.4", "features.8"]


def test_found_layers_are_the_modules(vgg_bn):
    found = find_layers(vgg_bn, ["features.3", "classifier"])
    assert found == {"features.3": vgg_bn.features[3], "classifier": vgg_bn.classifier}


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_unknown_layer_is_named_with_its_neighbours(vgg_bn, error):
    with pytest.raises(error) as caught:
        find_layers(vgg_bn, ["features.0", "feature.3"], "record_layer")
    assert str(caught.value).startswith("<record_layer> 'feature.3' not found in model; nearest: 'features.3'")


def test_the_model_itself_is_no_layer(vgg_bn):
    with pytest.raises(LayerNotFoundError, match="''"):
        find_layers(vgg_bn, [""])


def test_wrappers_are_looked_through(mlp):
    assert unwrap(nn.DataParallel(torch.compile(mlp))) is mlp
    assert unwrap(mlp) is mlp


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_models_are_refused(mlp):
    with pytest.raises(TypeError, match="Pass the Python model"):
        unwrap(torch.jit.script(mlp))


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_quantized_models_have_no_gradient_and_are_refused(mlp, vectors):
    """Torch sends zeros back through layers of packed integers; what only needs their output takes them."""
    quantized = torch.ao.quantization.quantize_dynamic(mlp.float(), {nn.Linear}, dtype=torch.qint8).eval()
    message = r"layer '0' is quantized \(torch\.ao\.nn\.quantized\.dynamic.*pass the model that was quantized"
    with pytest.raises(TypeError, match=message):
        CondAttribution(quantized)
    for method in ("intgrad", "saliency", "epsilon_plus"):
        with pytest.raises(TypeError, match=message):
            explain(method, quantized, vectors.float(), 1)
    assert explain("occlusion", quantized, vectors.float()[:1], 1, batch_size=1).abs().sum() > 0
    counted = nn.Sequential(mlp, torch.ao.nn.quantized.FloatFunctional())
    assert differentiable(nn.DataParallel(counted)) is counted


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_parts_run_as_written_for_a_while(mlp, vectors, untouched, how):
    part = mlp[2]
    if how == "in place":
        part.compile(backend="eager")
    else:
        mlp[2] = torch.compile(part, backend="eager")
    seen = []
    part.register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    with untouched(mlp), pytest.raises(ZeroDivisionError), uncompiled(mlp):
        mlp(vectors)
        assert seen == [False]
        raise ZeroDivisionError
    assert (part._compiled_call_impl is not None) == (how == "in place")


@pytest.mark.parametrize("nested", [False, True])
def test_evaluation_leaves_encoders_as_they_were(nested):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)
    assert encoder.use_nested_tensor == nested
    with evaluating(encoder):
        assert not (encoder.training or encoder.use_nested_tensor)
    assert encoder.training and encoder.use_nested_tensor == nested


def test_output_shapes_are_without_the_batch_axis(vgg_bn, images, untouched):
    with untouched(vgg_bn):
        shapes = get_output_shapes(vgg_bn, images[:1], ["features.0", "features.10", "classifier"])
    assert shapes == {"features.0": (6, 16, 16), "features.10": (8, 4, 4), "classifier": (5,)}


def test_output_shapes_leave_no_hook_behind_an_exception(vgg_bn, images, untouched):
    with untouched(vgg_bn), pytest.raises(InputError, match=r"'features.0' \(Conv2d\) takes 3 channels"):
        get_output_shapes(vgg_bn, images[:, :1], ["features.0"])


def test_output_shapes_check_the_names_first(mlp, vectors):
    with pytest.raises(LayerNotFoundError, match="'7'"):
        get_output_shapes(mlp, vectors, ["7"])


def test_output_shapes_are_those_of_the_call_that_is_named():
    pool = nn.MaxPool2d(2)
    net = nn.Sequential(pool, nn.Conv2d(2, 3, 1), pool).eval()
    found = get_output_shapes(net, torch.zeros(1, 2, 8, 8), ["0#0", "0#1", "0.input#1"])
    assert found == {"0#0": (2, 4, 4), "0#1": (3, 2, 2), "0.input#1": (3, 4, 4)}
    with pytest.warns(UserWarning, match="called 2 times; its last call is recorded"):
        assert get_output_shapes(net, torch.zeros(1, 2, 8, 8), ["0"]) == {"0": (3, 2, 2)}
    with pytest.raises(ValueError, match="called 2 times; there is no 0#2"):
        get_output_shapes(net, torch.zeros(1, 2, 8, 8), ["0#2"])


def test_output_shapes_and_names_are_the_same_in_wrappers(mlp, vectors):
    wrapped = nn.DataParallel(mlp)
    assert get_layer_names(wrapped, nn.Linear) == get_layer_names(mlp, nn.Linear) == ["0", "2", "4"]
    assert get_output_shapes(wrapped, vectors, ["2"]) == get_output_shapes(mlp, vectors, ["2"])


def test_output_shapes_refuse_what_attribution_refuses(vgg_bn, images):
    with pytest.raises(TypeError, match=r"layer '0' \(LSTM\) returns a tuple, not a tensor"):
        get_output_shapes(nn.Sequential(nn.LSTM(2, 3)), torch.zeros(1, 4, 2), ["0"])
    with pytest.raises(ValueError, match=r"with the samples on the first axis \(data\[None\] for a single one\)"):
        get_output_shapes(vgg_bn, images[0], ["features.0"])
    with pytest.raises(TypeError, match=r"record_layers must be a list of layer names, not 'classifier'"):
        get_output_shapes(vgg_bn, images[:1], "classifier")
    with pytest.raises(TypeError, match=r"must be a floating-point tensor, .* not ndarray"):
        get_output_shapes(vgg_bn, images[:1].numpy(), ["features.0"])


@pytest.mark.parametrize(
    "door",
    [
        lambda none: get_layer_names(none, [nn.Conv2d]),
        lambda none: find_layers(none, []),
        lambda none: trace_model_graph(none, torch.zeros(1, 6), ["0"]),
        attached,
        clear,
    ],
)
def test_what_is_no_model_is_refused_at_every_door(door):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not NoneType"):
        door(None)


def test_output_shapes_name_layers_that_are_not_called(mlp, vectors):
    mlp.unused = nn.Linear(2, 2)
    mlp.forward = mlp[:2].forward
    with pytest.warns(UserWarning, match="layer 'unused' is not called"):
        assert get_output_shapes(mlp, vectors, ["unused"]) == {}


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: (ids,), lambda ids: {"input_ids": ids}])
def test_output_shapes_of_token_ids(form):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, input_ids):
            return self.head(self.words(input_ids))

    found = get_output_shapes(Words().eval(), form(torch.tensor([[1, 2, 3]])), ["words", "head"])
    assert found == {"words": (3, 4), "head": (3, 2)}


def test_a_shared_change_is_there_as_long_as_anyone_is_inside():
    seen = []

    @Shared
    def change():
        seen.append("made")
        yield
        seen.append("undone")

    for n in (1, 2):
        with change:
            with change:
                assert len(seen) == 2 * n - 1
            assert len(seen) == 2 * n - 1
        assert seen == ["made", "undone"] * n


def test_hooks_for_a_while_act_in_their_thread_only():
    """Whoever calls the model meanwhile gets what it predicts."""
    model, data = nn.Linear(2, 2), torch.ones(1, 2)
    usual = model(data)
    with hooked({model: lambda module, args, output: 0 * output}), ThreadPoolExecutor(1) as others:
        assert not model(data).any()
        assert torch.equal(others.submit(model, data).result(), usual)
