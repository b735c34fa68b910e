"""What does not fit is refused before anything is mined: nothing is written, and the model is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_net import make_fv, mined
from mining_cases import Data, make_net, run
from zennit.composites import EpsilonPlus

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.errors import CRPError
from crp.visualization import Table


def changed(function: Any) -> Data:
    """Data whose images are changed by a function."""
    data = Data(8)
    data.images = function(data.images)
    return data


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dtype of the data": (
        {"data": changed(lambda x: x.float())},
        "has weights of torch.float64 and gets torch.float32",
    ),
    "complex data": ({"data": changed(lambda x: x * 1j)}, "complex"),
    "channels": ({"data": changed(lambda x: x.repeat(1, 3, 1, 1))}, "expected input.* to have 1 channels|1 channel"),
    "no sample": ({"data": Data(0)}, "the dataset is empty"),
    "no data set": ({"data": 3}, "dataset"),
    "no layer": ({"layer_map": {}}, "layer_map must map layers to concepts"),
    "a list of layers": ({"layer_map": ["conv"]}, "layer_map must map layers to concepts"),
    "an unknown layer": ({"layer_map": {"conv9": ChannelConcept()}}, "'conv9' not found in model"),
    "a class of concepts": ({"layer_map": {"conv": ChannelConcept}}, "must be a concept, such as ChannelConcept"),
    "composite": ({"composite": "epsilon_plus"}, "composite must be None, or a composite of crp.composites or zennit"),
    "mode": ({"modes": ["relevances"]}, "modes must be among 'relevance', 'activation'"),
    "mode in a word": ({"modes": "relevance"}, "modes must be among"),
    "no kind": ({"kinds": []}, "kinds must be among"),
    "a number for a part": ({"part": 3}, r"part must be \(i, n\) with i from 0 to n - 1, not 3"),
    "a number of modes": ({"modes": 2}, "modes must be among 'relevance', 'activation'; not 2"),
    "a list in modes": ({"modes": [["relevance"]]}, "modes must be among"),
    "batches of none": ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
    "batches of a fraction": ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, not 1.5"),
    "batches of truth": ({"batch_size": True}, "batch_size must be a whole number of at least 1, not True"),
    "workers": ({"num_workers": -1}, "num_workers must be a whole number of at least 0, not -1"),
    "shards": ({"shard_size": 0}, "shard_size must be a whole number of at least 1, not 0"),
    "on_error": ({"on_error": "ignore"}, "on_error must be one of 'stop', 'skip', not 'ignore'"),
    "on_error in a list": ({"on_error": ["skip"]}, r"on_error must be one of 'stop', 'skip', not \['skip'\]"),
    "storage": ({"storage": "int8"}, "storage must be one of 'float32', 'float16', not 'int8'"),
    "device": ({"device": "banana"}, "device is 'banana', which is no device of this machine"),
    "an option that is none": ({"batchsize": 3}, "mining has no option 'batchsize'"),
    "targets": ({"targets": "labels"}, "targets must be 'label', 'prediction'"),
    "negative targets": ({"targets": [-1]}, "targets must be"),
    "fractions of targets": ({"targets": [0.5]}, "targets must be"),
    "targets beyond the outputs": ({"targets": [5000, 1]}, r"^targets=\[1, 5000\]: the model has outputs 0 to 2$"),
    "labels of other targets": ({"targets": "all", "single_targets": list}, "single_targets is about labels"),
    "a function that keeps no batch": (
        {"preprocess": lambda x: x[:0]},
        r"preprocess must make a sample of shape \(1, ",
    ),
    "a function that returns nothing": ({"preprocess": lambda x: None}, "preprocess must make a sample"),
    "what is no function": (
        {"preprocess": "normalize"},
        "preprocess must be a function of samples, .*not 'normalize'",
    ),
    "what is no function of labels": (
        {"single_targets": 3},
        "single_targets must be a function of labels, .*not 3",
    ),
    "begin": ({"start": -1}, "the range -1 to 8 must be within the dataset, 0 to 8"),
    "end": ({"start": 4, "stop": 2}, "the range 4 to 2 must be within the dataset"),
}


@pytest.mark.promise("Input", "Mining refuses what does not fit before it begins")
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(tmp_path: Path, untouched: Any, case: str) -> None:
    options, message = WRONG[case]
    net = make_net()
    options = {"attribution": CondAttribution(net), "data": Data(8)} | options
    with untouched(net), pytest.raises(CRPError, match=message):
        run(tmp_path / "table", **options)
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("data_start", None), *((name, value) for name in ("data_start", "data_end") for value in (1.5, "3", True))],
    ids=str,
)
def test_ranges_are_whole_numbers(tmp_path: Path, name: str, value: Any) -> None:
    """A fraction was cut off, and another range mined."""
    fv = make_fv(tmp_path)
    with pytest.raises(TypeError, match=f"{name} must be integers"):
        fv.run(EpsilonPlus(), **{"data_start": 0, "data_end": 6} | {name: value}, progress=False)
    assert not Table.exists(fv.path)


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, None])
def test_a_checkpoint_is_told_by_its_name(tmp_path: Path, value: Any) -> None:
    fv = make_fv(tmp_path)
    with pytest.raises(ValueError, match=f"checkpoint must be a whole number of at least 1, not {value!r}"):
        fv.run(EpsilonPlus(), checkpoint=value, progress=False)
    assert not Table.exists(fv.path)


def test_ranges_of_numpy_are_numbers(tmp_path: Path) -> None:
    fv = make_fv(tmp_path)
    fv.run(EpsilonPlus(), np.int64(2), torch.tensor(5), np.int64(2), num_workers=np.int64(0), progress=False)
    assert sorted({*Table.open(fv.path).rows().sample.tolist()}) == [2, 3, 4]


# --- samples and reference queries ------------------------------------------------------------------------------------

QUERIES: dict[str, tuple[Any, str]] = {
    "fraction of a sample": (lambda fv: fv.get_data_sample(1.5), "a sample's index must be integers, not"),
    "sample beyond": (lambda fv: fv.get_data_sample(12), "the dataset has 12 samples, 0 to 11; there is no sample 12"),
    "sample before": (lambda fv: fv.get_data_sample(-13), "there is no sample -13"),
    "fractions of samples": (lambda fv: fv.get_data_concurrently([0, 1.5]), "indices must be integers"),
    "mask of samples": (lambda fv: fv.get_data_concurrently(torch.ones(12).bool()), "indices must be integers"),
    "several concepts": (
        lambda fv: fv.get_stats_reference([0, 1], "first", targets=[0]), "one concept is asked at a time, not"
    ),
    "fraction of a concept": (lambda fv: fv.get_max_reference([0.5], "first"), "concept ids must be integers"),
    "concept beyond": (lambda fv: fv.get_max_reference([4], "first"), "has 4 concepts, 0 to 3; there is no concept 4"),
    "one rank": (lambda fv: fv.get_max_reference(0, "first", r_range=(0,)), "r_range must be"),
    "fraction of a rank": (lambda fv: fv.get_max_reference(0, "first", r_range=(0, 2.5)), "r_range must be integers"),
    "ranks of words": (lambda fv: fv.get_max_reference(0, "first", r_range="02"), "r_range must be integers, not '02'"),
    "ranks backwards": (lambda fv: fv.get_max_reference(0, "first", r_range=(3, 1)), "r_range must be"),
    "no rank": (lambda fv: fv.get_max_reference(0, "first", r_range=(2, 2)), "r_range must be"),
    "plot function": (
        lambda fv: fv.get_max_reference(0, "first", composite=EpsilonPlus(), plot_fn="vis"), "plot_fn must be a"
    ),
    "batches of none": (
        lambda fv: fv.get_max_reference(0, "first", composite=EpsilonPlus(), batch_size=0), "batch_size must be a whole"
    ),
    "batches of a fraction": (
        lambda fv: fv.get_max_reference(0, "first", composite=EpsilonPlus(), batch_size=1.5), "batch_size must be a"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def fv(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mined(tmp_path_factory.mktemp("door"))


@pytest.mark.parametrize("case", QUERIES)
def test_what_cannot_be_asked_is_refused(fv: Any, untouched: Any, case: str) -> None:
    call, message = QUERIES[case]
    with untouched(fv.attribution.model), pytest.raises(CRPError, match=message):
        call(fv)


def test_a_sample_counts_from_the_end(fv: Any) -> None:
    assert torch.equal(fv.get_data_sample(-1)[0], fv.get_data_sample(11)[0])
