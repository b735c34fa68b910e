"""What a table says of itself in words, and how values are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import Data, make_net, rows_of, run
from safetensors import safe_open
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.outputs import detection, segmentation
from crp.visualization import FeatureVisualization
from crp.visualization.mining.recipe import in_words
from crp.visualization.mining.rows import _stored
from crp.visualization.mining.targets import top_class
from crp.visualization.table.ranking import top_k
from crp.visualization.table.store import Table, TableMismatchError

# --- words ------------------------------------------------------------------------------------------------------------


def halved(data: Tensor) -> Tensor:
    return data / 2


def test_a_table_says_what_it_is(tmp_path: Path) -> None:
    said = {"model": {"named": "digits"}, "class_names": ["a", "b", "c"], "note": (1, 2)}
    run(tmp_path, Data(), composite=EpsilonPlus(epsilon=0.25), preprocess=halved, recipe=said)
    recipe = Table.open(tmp_path).header.recipe
    assert recipe["model"] == {"class": "torch.nn.modules.container.Sequential", "named": "digits"}
    assert recipe["composite"]["name"] == "epsilon_plus" and recipe["composite"]["keywords"]["epsilon"] == 0.25
    assert list(recipe["layers"]) == ["conv", "relu", "fc"]
    assert recipe["layers"]["fc"] == {"concept": "crp.concepts.channels.ChannelConcept", "axis": 1, "settings": {}}
    assert recipe["preprocess"].endswith(".halved") and recipe["targets"] == "label"
    assert (recipe["batch_size"], recipe["shard_size"], recipe["mixed_shapes"]) == (4, 8, False)
    assert recipe["class_names"] == ["a", "b", "c"] and recipe["note"] == [1, 2]
    assert recipe["dataset"]["class"].endswith(".Data")
    # It tells, and decides nothing: a resumed run may know less.
    assert run(tmp_path, Data(), composite=EpsilonPlus(epsilon=0.25), preprocess=halved).header.recipe == recipe


def test_a_feature_visualization_says_what_it_is(tmp_path: Path) -> None:
    fv = FeatureVisualization(CondAttribution(make_net()), Data(), {"fc": ChannelConcept()}, halved, path=tmp_path)
    fv.run(None, progress=False, recipe={"note": "x"}, storage="float16")
    header = Table.open(tmp_path).header
    assert header.recipe["preprocess"].endswith(".halved") and header.recipe["note"] == "x"
    assert header.recipe["composite"] is None and header.storage == "float16"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("inf"), "inf"),
        ({1: (True, None)}, {"1": [True, None]}),
        (torch.ones(2), [1.0, 1.0]),
        (torch.ones(5, 5), "tensor of shape (5, 5), float32"),
        (nn.ReLU(), "torch.nn.modules.activation.ReLU"),
        (Path("a"), "PosixPath('a')"),
        (object(), "<object object>"),
        (len, "builtins.len"),
    ],
    ids=["infinite", "dict", "tensor", "large tensor", "module", "path", "object", "function"],
)
def test_values_in_words(value: Any, words: Any) -> None:
    assert in_words(value) == words
    assert json.loads(json.dumps(in_words(value), allow_nan=False)) == words


def test_nested_values_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert json.dumps(in_words(endless)).count("[") < 50


# --- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_of_scores_and_of_probabilities() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, -1.0]])
    prediction, probability = top_class(scores, 2)
    assert prediction.tolist() == [1, 0] and prediction.dtype == torch.int64
    np.testing.assert_allclose(probability, scores.softmax(1).max(1).values, rtol=1e-6)
    prediction, probability = top_class(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), 2)
    assert (prediction.tolist(), probability.tolist()) == ([1, 0], [0.75, 1.0])
    shares = torch.tensor([[0.3, 0.3, 0.4]]).bfloat16()  # (the sum of what is rounded is 1.002)
    assert top_class(shares, 1)[1].tolist() == [float(shares.max())]
    for other in (torch.zeros(2, 3, 4), torch.zeros(2, 1), torch.zeros(2, 3).long()):
        assert [column.tolist() for column in top_class(other, 2)] == [[-1, -1], [0.0, 0.0]]


@pytest.mark.parametrize(
    "changes", [{}, {"targets": "all"}, {"modes": ["activation"]}, {"single_targets": lambda t: [t, 0]}]
)
def test_predictions_are_kept_once_for_each_sample(tmp_path: Path, changes: dict[str, Any]) -> None:
    table = run(tmp_path, Data(), **changes)
    output = make_net()(Data().images).detach()
    samples = table.samples()
    assert samples.sample.tolist() == list(range(21)) and samples.label == [i % 3 for i in range(21)]
    assert samples.prediction.tolist() == output.argmax(1).tolist()
    np.testing.assert_allclose(samples.probability, output.softmax(1).max(1).values, rtol=1e-6)
    assert table.verify() == []


def test_a_model_that_gives_no_scores_of_classes(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, data: Tensor) -> dict[str, Tensor]:
            return {"map": self.net(data)[:, :, None]}

    settings: dict[str, Any] = {"modes": ["activation"], "layer_map": {"net.fc": ChannelConcept()}, "composite": None}
    table = run(tmp_path, Data(), attribution=CondAttribution(Both().eval()), **settings)
    samples = table.samples()
    assert set(samples.prediction.tolist()) == {-1} and np.isnan(samples.probability).all()


@pytest.mark.parametrize(
    "output",
    [segmentation(None, where="all", positive=False), detection(box=0)],
    ids=["segmentation", "detection"],
)
@pytest.mark.parametrize("modes", [["activation"], ["relevance", "activation"]], ids=["forward", "both"])
def test_classes_that_do_not_exclude_each_other_have_no_probability(tmp_path: Path, output: Any, modes: Any) -> None:
    """Neither in the shards nor in what is read of them; the class of the highest score is told all the same."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, data: Tensor) -> Any:
            scores = self.net(data)
            is_detector = "detection" in output.__qualname__
            return [{"logits": one[None]} for one in scores] if is_detector else scores[:, :, None, None]

    model = Dense().eval()
    attribution = CondAttribution(model, output=output)
    assert not attribution.exclusive and CondAttribution(model).exclusive
    table = run(tmp_path, Data(), attribution=attribution, modes=modes, layer_map={"net.fc": ChannelConcept()})
    samples = table.samples()
    assert samples.prediction.tolist() == make_net()(Data().images).argmax(1).tolist()
    assert samples.probability.shape == (21,) and np.isnan(samples.probability).all()
    for shard in tmp_path.rglob("*.safetensors"):
        with safe_open(shard, framework="numpy") as file:
            assert "prediction" in file.keys() and "probability" not in file.keys()  # noqa: SIM118
    assert table.verify() == []
    assert table.header.recipe["output"] == {"function": f"crp.outputs.{output.__qualname__}", "exclusive": False}


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float16_keeps_values_to_a_2048th_and_ranks_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    """Largest relative error of a value; and how much less the references of a concept are worth than the best ones."""
    data, net = Data(300), make_net(16)
    data.images = data.images.to(dtype)
    attribution = CondAttribution(net.to(dtype))
    settings: dict[str, Any] = {"attribution": attribution, "batch_size": 50, "shard_size": 100}
    exact = run(tmp_path / "exact", data, **settings)
    small = run(tmp_path / "small", data, storage="float16", **settings)
    assert small.verify() == [] and rows_of(small) == rows_of(exact)
    for mode in exact.modes:
        for kind in exact.kinds:
            left, right = ([*t.blocks("conv", mode, kind)] for t in (exact, small))
            true, kept = (np.concatenate([block.value for block in part]) for part in (left, right))
            assert kept.dtype == true.dtype
            largest = np.abs(true).max(0)
            assert (np.abs(kept - true) <= np.abs(true) / 2048 + largest * 2**-37).all()
            assert (np.concatenate([b.position for b in left]) == np.concatenate([b.position for b in right])).all()
            for normed in (False, True):
                best, found = (top_k(t, "conv", mode, kind, normed, k=40) for t in (exact, small))
                block = next(exact.blocks("conv", mode, kind, normed, concepts=0))
                assert len(block.value)
                whole = np.concatenate([b.value for b in exact.blocks("conv", mode, kind, normed)])
                order = np.concatenate([b.sample for b in exact.blocks("conv", mode, kind, normed)])
                assert order.tolist() == list(range(300))  # a row for each sample
                worth = np.take_along_axis(whole, found.sample, 0)
                loss = (best.value - worth) / np.abs(best.value).clip(1e-12)
                assert loss.max() <= 2 / 2048  # of a reference at its rank
                same = (best.sample == found.sample).mean()
                assert same > 0.95
    sizes = [sum(f.stat().st_size for f in (t.path / "shards").iterdir()) for t in (exact, small)]
    assert sizes[1] < (0.75 if dtype == torch.float32 else 0.45) * sizes[0]


def test_a_column_of_zeros_and_of_very_large_and_small_values() -> None:
    factors = np.array([0.0, 1e30, 1e-30, 1.0, 3e38, 1e-41, 1e-44], np.float32)
    values = np.random.default_rng(0).uniform(-1, 1, (50, 7)).astype(np.float32) * factors
    stored = _stored("relevance.sum/a", [values[:20], values[20:]], "float16")
    small, (scale,) = np.concatenate(stored["relevance.sum/a"]), stored["relevance.sum_scale/a"]
    assert small.dtype == np.float16 and scale.dtype == np.float32 and np.isfinite(small).all()
    kept = small.astype(np.float32) * scale
    for column in range(7):
        largest = float(np.abs(values[:, column]).max())
        np.testing.assert_allclose(kept[:, column], values[:, column], rtol=1 / 2048, atol=largest * 2.0**-37)
    assert not kept[:, 0].any() and kept[:, 6].any()


def test_another_storage_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Data(), stop=8)
    with pytest.raises(TableMismatchError, match="storage = float32, not float16"):
        run(tmp_path, Data(), storage="float16")
    with pytest.raises(ValueError, match="storage must be one of 'float32', 'float16', not"):
        run(tmp_path, Data(), storage="float8")
