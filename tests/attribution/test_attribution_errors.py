"""Bad input: the message names the culprit, the value and what would be right, before the model runs if it can.

Numbers (S8, C14, ...) are those of zennit-crp's known defects.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from attribution_cases import SMALL, Net, ask, parallel, small_net

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.layers import LayerNotFoundError

X = SMALL
GOOD = [{"y": 1, "conv2": [0]}]


@pytest.fixture
def model() -> Net:
    return small_net()


def bad(kind: type[Exception], message: str, **keywords: object) -> tuple[type[Exception], str, dict[str, object]]:
    return kind, message, keywords


#: What is wrong: the error, what its message must say, and the arguments.
BEFORE = {
    "S26 no conditions": bad(ValueError, "conditions is empty; give at least one, such as [{'y': [0]}]", conditions=[]),
    "conditions are a dict": bad(TypeError, "list of dicts, not dict; put the dict in a list", conditions={"y": 1}),
    "conditions are an iterator": bad(TypeError, "dicts, not map; list(...) makes one", conditions=map(dict, GOOD)),
    "a condition is no dict": bad(
        TypeError, "conditions[1] must be a dict, not list: ['y']", conditions=[{"y": 1}, ["y"]]
    ),
    "a layer is no string": bad(
        TypeError, "conditions[0]: layers are named by strings, not 2", conditions=[{"y": 1, 2: [0]}]
    ),
    "init_rel is a list": bad(
        TypeError, "init_rel must be a tensor, a number or a function, not list", init_rel=[1.0, 2.0, 3.0]
    ),
    "init_rel is an array": bad(
        TypeError, "not ndarray (torch.from_numpy makes a tensor of it)", init_rel=np.ones((1, 3))
    ),
    "init_rel is complex": bad(
        TypeError, "init_rel must be a tensor, a number or a function, not complex", init_rel=1j
    ),
    "init_rel is a complex tensor": bad(
        TypeError, "init_rel must be real numbers, not torch.complex64", init_rel=torch.ones(3) * 1j
    ),
    "init_rel is NaN": bad(ValueError, "init_rel has NaN or infinite values", init_rel=float("nan")),
    "init_rel has infinity": bad(
        ValueError, "init_rel has NaN or infinite values", init_rel=torch.tensor([1.0, torch.inf, 0.0])
    ),
    "empty y": bad(
        ValueError, "conditions[1]['y'] is empty; name at least one output", conditions=[{"y": 1}, {"y": []}]
    ),
    "empty tensor as y": bad(
        ValueError, "conditions[0]['y'] is empty", conditions=[{"y": torch.tensor([], dtype=int)}]
    ),
    "y is a float": bad(
        TypeError,
        "conditions[0]['y'] must be an int, or a list, array or tensor of int, not 1.0",
        conditions=[{"y": 1.0}],
    ),
    "y is a bool": bad(
        TypeError, "must be an int, or a list, array or tensor of int, not True", conditions=[{"y": True}]
    ),
    "y is a name": bad(
        TypeError,
        "conditions[0]['y'] must be an int, or a list, array or tensor of int, not 'cat'",
        conditions=[{"y": "cat"}],
    ),
    "y is a set": bad(TypeError, "must be an int, or a list, array or tensor of int, not {1}", conditions=[{"y": {1}}]),
    "y is ragged": bad(TypeError, "tensor of int, not [[1], [1, 2]]", conditions=[{"y": [[1], [1, 2]]}]),
    "nowhere to start": bad(
        ValueError,
        "Either y in 'conditions' or 'start_layer' or 'init_rel' must be defined; conditions[1] is {'conv2':",
        conditions=[{"y": 1}, {"conv2": [0]}],
    ),
    "the output in another case": bad(ValueError, "{'Y': 1}; 'Y' is not 'y'", conditions=[{"Y": 1}]),
    "a layer in another case": bad(KeyError, "nearest: 'conv2'", conditions=[{"y": 1, "CONV2": [0]}]),
    "S8 unknown layer": bad(
        KeyError, "<conditions> 'conv3' not found in model; nearest: 'conv", conditions=[{"y": 1, "conv3": [0]}]
    ),
    "S8 numbered layer": bad(KeyError, "<conditions> '7' not found in model", conditions=[{"y": 1, "7": [0]}]),
    "the root as a layer": bad(KeyError, "<conditions> '' not found in model", conditions=[{"y": 1, "": [0]}]),
    "unknown recorded layer": bad(
        KeyError, "<record_layer> 'cnv2' not found in model; nearest: 'conv2'", record_layer=["conv1", "cnv2"]
    ),
    "recorded layer is no string": bad(
        TypeError, "<record_layer> layers are named by strings, as in model.named_modules(), not 1", record_layer=[1]
    ),
    "C13 one recorded layer": bad(
        TypeError, "record_layer must be a list of layer names, not 'conv1'", record_layer="conv1"
    ),
    "no list of recorded layers": bad(
        TypeError, "record_layer must be a list of layer names, not None", record_layer=None
    ),
    "recorded layers that can be read once": bad(
        TypeError, "record_layer must be a list of layer names, not <map", record_layer=map(str, ["conv1"])
    ),
    "unknown start layer": bad(
        KeyError, "<start_layer> 'conv' not found in model; nearest: 'conv", start_layer="conv", conditions=[{}]
    ),
    "start layer is no string": bad(
        TypeError,
        "<start_layer> layers are named by strings, as in model.named_modules(), not 1",
        start_layer=1,
        conditions=[{}],
    ),
    "mask_map lacks the layer": bad(
        KeyError, "mask_map has no entry for layer 'conv2'; it has ['conv1']", mask_map={"conv1": ChannelConcept.mask}
    ),
    "mask_map of nothing": bad(
        ValueError,
        "<mask_map> must be a dictionary or callable function, such as concept.mask, not NoneType",
        mask_map=None,
    ),
    "mask_map of concepts": bad(
        TypeError,
        "mask_map['conv2'] must be a function such as concept.mask, not ChannelConcept()",
        mask_map={"conv2": ChannelConcept()},
    ),
    "mask_map is a concept": bad(ValueError, "such as concept.mask, not ChannelConcept", mask_map=ChannelConcept()),
    "mask_map is a class of concepts": bad(
        ValueError, "such as concept.mask, not ChannelConcept", mask_map=ChannelConcept
    ),
    "composite by name": bad(
        TypeError,
        "composite must be None, or a composite of crp.composites or zennit, such as EpsilonPlusFlat(), not",
        composite="epsilon_plus",
    ),
    "composite is a class": bad(TypeError, "such as EpsilonPlusFlat(), not <class", composite=EpsilonPlus),
    "data are no tensor": bad(
        TypeError,
        "data must be a floating-point tensor, which relevance can be assigned to, not ndarray",
        data=X.numpy(),
    ),
    "data are integers": bad(
        TypeError,
        "data must be a floating-point tensor, which relevance can be assigned to, not torch.int64",
        data=X.long(),
    ),
    "no data": bad(
        ValueError, "data has shape (0, 3, 6, 6); it needs a batch axis with at least one sample", data=X[:0]
    ),
    "data are a number": bad(
        ValueError, "data has shape (); it needs a batch axis with at least one sample", data=X[0, 0, 0, 0]
    ),
    "NaN in the data": bad(
        ValueError, "data has NaN or infinite values in samples [1]", data=X.index_fill(0, torch.tensor(1), np.nan)
    ),
    "infinity in the data": bad(
        ValueError, "data has NaN or infinite values in samples [0, 1, 2]", data=torch.full((3, 3, 6, 6), torch.inf)
    ),
}


@pytest.mark.parametrize("generate", [False, True], ids=["call", "generate"])
@parallel
@pytest.mark.parametrize("case", BEFORE)
def test_before_the_model_runs(model, untouched, case, generate, exclude_parallel):
    kind, message, keywords = BEFORE[case]
    with untouched(model):
        for composite in ({}, {"composite": EpsilonPlus()}):
            with pytest.raises(kind, match=re.escape(message)):
                ask(model, generate=generate, exclude_parallel=exclude_parallel, **composite | keywords)
    assert model.calls == 0


def test_generate_complains_when_it_is_called(model):
    """Not at the first result only."""
    attribution = CondAttribution(model)
    wrong = [({"conditions": []}, ValueError), ({"start_layer": "nope"}, KeyError), ({"data": X.long()}, TypeError)]
    for keywords, kind in wrong:
        with pytest.raises(kind):
            attribution.generate(**{"data": X, "conditions": [{}], **keywords})
    for size in (0, -1, 2.5, "3", None):
        message = f"batch_size must be a whole number of at least 1, not {size!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            attribution.generate(X, GOOD, batch_size=size)


def test_an_unknown_layer_is_a_bad_value_too(model):
    with pytest.raises(ValueError, match="'conv2'") as error:
        ask(model, conditions=[{"y": 1, "conv_2": [0]}])
    assert isinstance(error.value, LayerNotFoundError)
    assert str(error.value).startswith("<conditions> 'conv_2' not found in model")


#: The same for what only the model's output can tell.
AFTER = {
    "C14 id out of range": bad(
        IndexError,
        "layer 'conv2' has 4 channels, 0 to 3; there is no channel 4",
        conditions=[{"y": 1, "conv2": [1, 4]}],
    ),
    "C14 negative id out of range": bad(
        IndexError, "layer 'conv1' has 5 channels, 0 to 4; there is no channel -6", conditions=[{"y": 1, "conv1": -6}]
    ),
    "id is a float": bad(
        TypeError, "layer 'conv2': concept ids must be integers, not [1.5]", conditions=[{"y": 1, "conv2": [1.5]}]
    ),
    "id is infinite": bad(
        TypeError, "layer 'conv2': concept ids must be integers, not inf", conditions=[{"y": 1, "conv2": float("inf")}]
    ),
    "id is a name": bad(
        TypeError, "layer 'conv2': concept ids must be integers, not 'ab'", conditions=[{"y": 1, "conv2": "ab"}]
    ),
    "ids are None": bad(
        TypeError, "layer 'conv2': concept ids must be integers, not None", conditions=[{"y": 1, "conv2": None}]
    ),
    "ids are a boolean mask": bad(
        TypeError,
        "layer 'conv2': concept ids must be integers, not tensor([ True, False])",
        conditions=[{"y": 1, "conv2": torch.tensor([True, False])}],
    ),
    "ids can be read once": bad(
        TypeError,
        "layer 'conv2': concept ids must be integers, not <map",
        conditions=[{"y": 1, "conv2": map(int, [0])}],
    ),
    "ids are for mask_rf": bad(
        TypeError, "layer 'conv2': concept ids must be integers, not {2: [1]}", conditions=[{"y": 1, "conv2": {2: [1]}}]
    ),
    "ids are not for mask_rf": bad(
        TypeError, "layer 'conv2': mask_rf needs {channel: positions}, not [0]", mask_map=ChannelConcept.mask_rf
    ),
    "position out of range": bad(
        IndexError,
        "layer 'conv2' has 4 positions, 0 to 3; there is no position 4",
        conditions=[{"y": 1, "conv2": {1: [4]}}],
        mask_map=ChannelConcept.mask_rf,
    ),
    "target out of range": bad(
        IndexError,
        "row 1: 'y' is [0, 3], but the model has outputs 0 to 2",
        conditions=[{"y": 1}, {"y": [0, 3]}, {"y": 2}],
    ),
    "negative target out of range": bad(
        IndexError, "row 0: 'y' is -4, but the model has outputs 0 to 2", conditions=[{"y": -4}]
    ),
    "boolean target of wrong length": bad(
        IndexError, "row 0: 'y' is [True, False], but the model has outputs 0 to 2", conditions=[{"y": [True, False]}]
    ),
    "C18 init_rel with other rows": bad(
        ValueError,
        "init_rel has shape (5, 3); it must broadcast to (rows, *output shape) = (2, 3)",
        init_rel=torch.ones(5, 3),
    ),
    "C18 init_rel with other outputs": bad(
        ValueError, "init_rel has shape (2,); it must broadcast to", init_rel=torch.ones(2)
    ),
    "init_rel with more axes": bad(
        ValueError, "init_rel has shape (1, 2, 3); it must broadcast to", init_rel=torch.ones(1, 2, 3)
    ),
    "init_rel gives nothing": bad(
        TypeError,
        "init_rel is a function that gives None, not a tensor or a number",
        init_rel=lambda prediction: None,
    ),
    "init_rel gives an array": bad(
        TypeError,
        "init_rel is a function that gives an ndarray of shape (2, 3), not a tensor or a number",
        init_rel=lambda prediction: prediction.numpy(),
    ),
    "mask_map gives nothing": bad(
        TypeError,
        "mask_map must give a function of the gradient; for 'conv2' it gives None",
        mask_map=lambda row, ids, layer: None,
    ),
    "mask gives nothing": bad(
        TypeError,
        "must return a gradient of (2, 4, 2, 2), not NoneType",
        mask_map=lambda row, ids, layer: lambda grad: None,
    ),
    "mask gives another shape": bad(
        TypeError,
        "must return a gradient of (2, 4, 2, 2), not (4, 2, 2)",
        mask_map=lambda row, ids, layer: lambda grad: grad[0],
    ),
}


@pytest.mark.parametrize("generate", [False, True], ids=["call", "generate"])
@parallel
@pytest.mark.parametrize("case", AFTER)
def test_after_the_model_ran(model, untouched, case, generate, exclude_parallel):
    kind, message, keywords = AFTER[case]
    with untouched(model):
        for composite in (None, EpsilonPlus()):
            with pytest.raises(kind, match=re.escape(message)):
                ask(model, generate=generate, composite=composite, exclude_parallel=exclude_parallel, **keywords)
