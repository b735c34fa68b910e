from __future__ import annotations

import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_cases import plain_sums
from feature_net import LAYERS, Images, expected_scores, make_fv, make_net, mined
from PIL import Image
from torch import Tensor, nn
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus, NameMapComposite

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.helper import load_maximization, load_stat_targets, load_statistics
from crp.hooks import FeatVisHook
from crp.maximization import Maximization
from crp.statistics import Statistics
from crp.visualization import FeatureVisualization, ImageCache, Table
from crp.visualization.mining import batches
from crp.visualization.table.store import TableError, TableMismatchError

QUIET: dict[str, Any] = {"progress": False}


def results(fv: FeatureVisualization, layer: str = "first") -> list[np.ndarray]:
    """Everything that the table says about a layer."""
    found = [*load_maximization(fv.RelMax.PATH, layer), *load_maximization(fv.ActMax.PATH, layer)]
    for path in (fv.RelStats.PATH, fv.ActStats.PATH):
        for target in load_stat_targets(path):
            found += load_statistics(path, layer, target)
    return [np.array(array) for array in found]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


# --- construction -----------------------------------------------------------------------------------------------------


def test_attributes_and_order_of_the_parameters(tmp_path):
    attribution, dataset, layer_map = CondAttribution(make_net()), Images(), {"first": ChannelConcept()}
    fv = FeatureVisualization(attribution, dataset, layer_map, torch.sigmoid, "max", False, tmp_path / "x", "cpu", None)
    assert (fv.attribution, fv.dataset, fv.layer_map, fv.Cache) == (attribution, dataset, layer_map, None)
    assert (fv.device, fv.preprocess_fn) == (torch.device("cpu"), torch.sigmoid)
    for name in ("RelMax", "ActMax", "RelStats", "ActStats"):
        assert tmp_path / "x" / f"{name}_max_unnormed" == getattr(fv, name).folder
        assert getattr(fv, name).SAMPLE_SIZE == 40
    assert not (tmp_path / "x").exists()
    default = FeatureVisualization(attribution, dataset, layer_map)
    assert Path("FeatureVisualization", "RelMax_sum_normed") == default.RelMax.folder


def test_C17_a_misspelt_layer_is_named_at_once(tmp_path):
    with pytest.raises(KeyError, match=r"<layer_map> 'frist' not found in model; nearest: 'first'"):
        make_fv(tmp_path, layers=["frist"])


def test_a_concept_class_is_no_concept(tmp_path):
    with pytest.raises(TypeError, match=r"layer_map\['first'\] must be a concept, such as .*, not \{'a'"):
        make_fv(tmp_path, layers={"first": {"a": make_net()}})
    with pytest.raises(TypeError, match="layer_map must be layers and their concepts, or a list of layers; not None"):
        FeatureVisualization(CondAttribution(make_net()), Images(), None)
    with pytest.raises(TypeError, match=r"layer_map\['first'\] is a class; it must be an instance: ChannelConcept\(\)"):
        make_fv(tmp_path, layers={"first": ChannelConcept})


# --- what a run records -----------------------------------------------------------------------------------------------


def test_a_run_ranks_all_samples(tmp_path):
    fv = make_fv(tmp_path)
    saved = fv.run(EpsilonPlus(), 0, 12, 5, progress=False)
    assert list(saved) == ["r_max", "r_stats", "a_max", "a_stats"]
    assert saved["r_max"] == [str(fv.RelMax.PATH / f"{layer}_") for layer in LAYERS]
    assert saved["a_stats"] == [str(fv.ActStats.PATH / layer / f"{t}_") for layer in LAYERS for t in range(3)]
    for layer in LAYERS:
        scores = expected_scores(fv, layer, "relevance", fv.dataset.labels)
        sample, value, _ = load_maximization(fv.RelMax.PATH, layer)
        np.testing.assert_array_equal(sample, scores.argsort(dim=0, descending=True, stable=True))
        np.testing.assert_allclose(value, scores.sort(dim=0, descending=True).values, rtol=1e-9)


def test_positions_are_those_of_the_maximum(tmp_path):
    fv = mined(tmp_path)
    sample, _, position = load_maximization(fv.ActMax.PATH, "first")
    for rank, concept in np.ndindex(*sample.shape):
        activation = fv.attribution.model.first(fv.dataset.data[sample[rank, concept]][None])[0, concept]
        assert position[rank, concept] == activation.flatten().argmax()


@pytest.mark.parametrize(("n", "batch_size"), [(11, 5), (12, 1), (4, 32), (1, 5)])
def test_C1_every_number_of_samples_and_batch_size_works(tmp_path, n, batch_size):
    fv, reference = make_fv(tmp_path, Images(n)), mined(tmp_path / "whole", Images(n))
    fv.run(EpsilonPlus(), 0, n, batch_size, progress=False)
    assert_same(results(fv), results(reference))


def test_C1_a_range_of_one_sample(tmp_path):
    fv = make_fv(tmp_path)
    fv.run(EpsilonPlus(), 3, 4, **QUIET)
    assert load_maximization(fv.RelMax.PATH, "first")[0].tolist() == [[3, 3, 3, 3]]


@pytest.mark.parametrize("span", [(0, 0), (5, 3), (0, 13), (-1, 4), (12, 20)])
def test_C6_an_empty_or_impossible_range_is_refused_before_anything_runs(tmp_path, span):
    fv = make_fv(tmp_path)
    with pytest.raises(ValueError, match=f"{span[0]} to {span[1]}"):
        fv.run(EpsilonPlus(), *span, **QUIET)
    assert not Table.exists(fv.path)


def test_the_default_range_is_the_whole_dataset(tmp_path):
    fv = make_fv(tmp_path)
    fv.run(EpsilonPlus(), **QUIET)
    assert_same(results(fv), results(mined(tmp_path / "whole")))


def test_without_a_composite_relevance_is_gradient(tmp_path):
    fv = make_fv(tmp_path)
    fv.run(None, 0, 12, **QUIET)
    sample, value, _ = load_maximization(fv.path / "RelMax_sum_unnormed", "second")
    result = fv.attribution(
        fv.dataset.data[sample[0, 0]][None], [{"y": int(sample[0, 0]) % 3}], record_layer=["second"]
    )
    np.testing.assert_allclose(value[0, 0], result.relevances["second"][0, 0].sum(), rtol=1e-9)


def test_preprocessing_is_for_the_model_only(tmp_path):
    fv = mined(tmp_path, preprocess_fn=lambda x: (x - 0.5) / 2)
    assert_same(results(fv), results(mined(tmp_path / "other", _scaled(Images()))))
    raw = fv.get_max_reference(0, "first")[0]
    assert torch.equal(raw, fv.dataset.data[load_maximization(fv.RelMax.PATH, "first")[0][:8, 0]])


def _scaled(dataset: Images) -> Images:
    dataset.data = (dataset.data - 0.5) / 2
    return dataset


def test_modes_that_are_left_out_are_not_kept(tmp_path):
    fv = make_fv(tmp_path)
    saved = fv.run(EpsilonPlus(), 0, 12, modes=["activation"], progress=False)
    assert saved["r_max"] == saved["r_stats"] == [] and len(saved["a_max"]) == 2
    load_maximization(fv.ActMax.PATH, "first")
    with pytest.raises((KeyError, ValueError), match="relevance"):
        load_maximization(fv.RelMax.PATH, "first")


class Sevenfold(CondAttribution):
    factor = 7.0

    def relevance_init(self, *args: Any) -> Any:
        return super().relevance_init(*args) * self.factor


def test_relevance_by_an_attribution_of_ones_own_is_not_mixed_with_any_other(tmp_path):
    plain = make_fv(tmp_path)
    plain.run(EpsilonPlus(), 0, 6, **QUIET)
    own = make_fv(tmp_path)
    own.attribution = Sevenfold(own.attribution.model)
    with pytest.raises(TableMismatchError, match=r"another attribution \(attribution none there, .*Sevenfold here"):
        own.run(EpsilonPlus(), 6, 12, **QUIET)
    own.run(EpsilonPlus(), 0, 6, overwrite=True, **QUIET)
    own.attribution.factor = 8.0
    with pytest.raises(TableMismatchError, match="another attribution"):
        own.run(EpsilonPlus(), 6, 12, **QUIET)


def test_a_cache_keeps_pictures_by_an_attribution_of_ones_own_apart(tmp_path):
    plain = mined(tmp_path, cache=ImageCache(tmp_path / "cache"))
    asked = ([0], "first", "relevance", (0, 1), EpsilonPlus())
    own = make_fv(tmp_path, cache=plain.Cache)
    own.attribution = Opposite(own.attribution.model)
    drawn = [np.asarray(fv.get_max_reference(*asked)[0][1]) for fv in (plain, own)]
    assert (drawn[0] != drawn[1]).any()


class Opposite(CondAttribution):
    def heatmap_modifier(self, *args: Any, **kwargs: Any) -> Any:
        return -super().heatmap_modifier(*args, **kwargs)


# --- ranges, resuming, overwriting ------------------------------------------------------------------------------------


def test_S20_a_second_range_is_added(tmp_path):
    fv = make_fv(tmp_path)
    fv.run(EpsilonPlus(), 0, 7, **QUIET)
    assert load_maximization(fv.RelMax.PATH, "first")[0].shape == (7, 4)
    fv.run(EpsilonPlus(), 7, 12, **QUIET)
    assert_same(results(fv), results(mined(tmp_path / "whole")))


def test_a_finished_range_is_not_computed_again(tmp_path, monkeypatch):
    fv = mined(tmp_path)
    before = results(fv)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(batches, "score_unit", fail)
    saved = fv.run(EpsilonPlus(), 0, 12, **QUIET)
    assert len(saved["r_max"]) == 2
    assert_same(results(fv), before)


def test_L6_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    dataset = Images(broken={5: RuntimeError("disk trouble")})
    fv = make_fv(tmp_path, dataset)
    with pytest.raises(RuntimeError, match=r"sample 5: .*disk trouble"):
        fv.run(EpsilonPlus(), 0, 12, batch_size=2, checkpoint=1, progress=False)
    dataset.broken.clear()
    fv = make_fv(tmp_path, dataset)
    seen: list[int] = []
    original = batches.score_unit

    def counting(*args: Any, unit: Any, **kwargs: Any) -> Any:
        seen.append(len(unit))
        return original(*args, unit=unit, **kwargs)

    monkeypatch.setattr(batches, "score_unit", counting)
    fv.run(EpsilonPlus(), 0, 12, batch_size=2, checkpoint=1, progress=False)
    assert sum(seen) == 8
    assert_same(results(fv), results(mined(tmp_path / "whole")))


def test_L9_overlapping_ranges_count_every_sample_once(tmp_path):
    fv = make_fv(tmp_path)
    parts = [fv.run_distributed(EpsilonPlus(), *span, **QUIET) for span in ((0, 8), (4, 12))]
    fv.collect_results({key: parts[0][key] + parts[1][key] for key in parts[0]})
    assert_same(results(fv), results(mined(tmp_path / "whole")))


def test_distributed_ranges_are_collected(tmp_path):
    fv = make_fv(tmp_path)
    first = fv.run_distributed(EpsilonPlus(), 0, 4, **QUIET)
    assert list(first) == ["r_max", "a_max", "r_stats", "a_stats"] and fv.saved_checkpoints == first
    third = fv.run_distributed(EpsilonPlus(), 8, 12, **QUIET)
    assert not set(first["r_max"]) & set(third["r_max"])
    joined = {key: first[key] + third[key] for key in first}
    with pytest.raises(TableError, match=r"samples \[\(4, 8\)\] of \(0, 12\) were not mined"):
        fv.collect_results(joined)
    with pytest.raises(TableError, match=r"\(4, 8\)"):
        fv.collect_results(first, d_index=(0, 12))
    second = fv.run_distributed(EpsilonPlus(), 4, 8, **QUIET)
    saved = fv.collect_results({key: joined[key] + second[key] for key in joined}, (0, 12))
    assert len(saved["r_max"]) == 2
    assert_same(results(fv), results(mined(tmp_path / "whole")))


def test_a_checkpoint_of_another_table_or_a_damaged_one_is_refused(tmp_path):
    fv = make_fv(tmp_path)
    checkpoints = fv.run_distributed(EpsilonPlus(), 0, 12, **QUIET)
    with pytest.raises(TableError, match=r"0-9-deadbeef.*not in the table"):
        fv.collect_results({"r_max": ["elsewhere/0-9-deadbeef.safetensors"]})
    (shard,) = (fv.path / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(TableError, match=r"the table at .* is damaged"):
        fv.collect_results(checkpoints)


@pytest.mark.parametrize("what", ["model", "composite", "dataset", "preprocess", "single_targets"])
def test_another_run_into_the_same_folder_is_refused(tmp_path, what):
    mined(tmp_path)
    keywords: dict[str, Any] = {}
    if what == "model":
        keywords["net"] = make_net(1)
    elif what == "preprocess":
        keywords["preprocess_fn"] = torch.sigmoid
    elif what == "single_targets":
        keywords["cls"] = type("Twice", (FeatureVisualization,), {"multitarget_to_single": lambda self, t: [t, 2]})
    other = make_fv(tmp_path, Images(11) if what == "dataset" else None, **keywords)
    composite = None if what == "composite" else EpsilonPlus()
    with pytest.raises(ValueError, match=what):
        other.run(composite, 0, 11, **QUIET)
    other.run(composite, 0, 11, overwrite=True, progress=False)
    fresh = make_fv(tmp_path / "fresh", other.dataset, **keywords)
    fresh.run(composite, 0, 11, **QUIET)
    assert_same(results(other), results(fresh))


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dataset", "model", "target", "override"])
def test_S12_L4_an_exception_leaves_the_model_untouched(tmp_path, untouched, kind):
    net = nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(1, 4, 3), bn=nn.BatchNorm2d(4), relu=nn.ReLU(), flat=nn.Flatten(), out=nn.Linear(64, 3)
        )
    )
    net = net.double().eval()
    composite = EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])
    dataset, cls = Images(), FeatureVisualization
    if kind == "dataset":
        dataset.broken[7] = RuntimeError("broken on purpose")
    elif kind == "target":
        dataset.labels[7] = 99
    elif kind == "override":
        cls = _fails_on(7)
    fv = make_fv(tmp_path, dataset, cls, net=net, layers=["first"])
    if kind == "model":
        fv.layer_map = {"first": _Breaking()}
    with untouched(net), pytest.raises(Exception, match=r"broken on purpose|99"):
        fv.run(composite, 0, 12, batch_size=3, progress=False)
    healthy = Images()
    again = mined_with(tmp_path / "again", healthy, net, composite)
    whole = mined_with(tmp_path / "whole", healthy, net, composite)
    assert_same(results(again), results(whole))


class _Breaking(ChannelConcept):
    def scores(self, relevance: Tensor, layer_name: str | None = None) -> Any:
        raise RuntimeError("broken on purpose")


def _fails_on(index: int, error: type[Exception] = RuntimeError) -> type[FeatureVisualization]:
    class Fails(FeatureVisualization):
        calls = 0

        def multitarget_to_single(self, multi_target: Any) -> Any:
            type(self).calls += 1
            if self.calls > index:
                raise error("broken on purpose")
            return [multi_target]

    return Fails


def mined_with(path: Any, dataset: Images, net: nn.Module, composite: Any) -> FeatureVisualization:
    fv = make_fv(path, dataset, net=net, layers=["first"])
    fv.run(composite, 0, 12, batch_size=3, progress=False)
    return fv


@pytest.mark.parametrize("error", [NotImplementedError, KeyError, ZeroDivisionError])
def test_S22_an_exception_in_an_override_is_the_users(tmp_path, error):
    fv = make_fv(tmp_path, cls=_fails_on(5, error))
    with pytest.raises(error, match="broken on purpose") as caught:
        fv.run(EpsilonPlus(), 0, 12, batch_size=4, checkpoint=1, progress=False)
    assert "sample 5" in str(caught.value.__cause__)


def test_S16_samples_that_are_not_finite_never_rank(tmp_path):
    dataset = Images()
    dataset.data[4, 0, 0, 0] = torch.nan
    fv = make_fv(tmp_path, dataset)
    with pytest.warns(UserWarning, match="1 sample was skipped"):
        fv.run(EpsilonPlus(), 0, 12, **QUIET)
    for array in results(fv)[0::3]:
        assert 4 not in array
    assert list(Table.open(fv.path).coverage(0, 12).skipped) == [4]
    assert all(np.isfinite(array).all() for array in results(fv))


def test_samples_that_cannot_be_read_may_be_skipped(tmp_path):
    dataset = Images(broken={4: OSError("cannot identify image file"), 6: torch.zeros(1, 5, 5).double()})
    fv = make_fv(tmp_path, dataset)
    with pytest.warns(UserWarning, match="2 samples were skipped"):
        fv.run(EpsilonPlus(), 0, 12, on_error="skip", progress=False)
    assert list(Table.open(fv.path).coverage(0, 12).skipped) == [4, 6]
    assert set(load_maximization(fv.RelMax.PATH, "first")[0][:, 0]) == set(range(12)) - {4, 6}


def test_samples_of_another_shape_are_named(tmp_path):
    fv = make_fv(tmp_path, Images(broken={4: torch.zeros(1, 5, 5).double()}))
    with pytest.raises(Exception, match=r"sample 4: .*\(1, 5, 5\)"):
        fv.run(EpsilonPlus(), 0, 12, **QUIET)
    with pytest.raises(ValueError, match=r"dataset\[4\] has shape \(1, 5, 5\), but dataset\[3\] has \(1, 6, 6\)"):
        fv.get_data_concurrently([3, 4])


ODD = {
    "three values": (torch.zeros(1, 6, 6).double(), 0, 0),
    "a dict": {"image": torch.zeros(1, 6, 6).double(), "label": 0},
    "a Image": (Image.new("L", (6, 6)), 0),
    "a ndarray": (np.zeros((1, 6, 6)), 0),
    "int64": (torch.zeros(1, 6, 6, dtype=torch.int64), 0),
}


@pytest.mark.parametrize("kind", ODD)
def test_C10_odd_datasets_get_a_hint(tmp_path, kind):
    class Odd(Images):
        def __getitem__(self, index: int) -> Any:
            return ODD[kind]

    fv = make_fv(tmp_path, Odd())
    with pytest.raises(TypeError, match=r"sample 2: .*(get_data_sample|floating-point)"):
        fv.get_data_sample(2)
    with pytest.raises(Exception, match=r"dataset|sample|float"):
        fv.run(EpsilonPlus(), 0, 12, **QUIET)
    assert not Table.exists(fv.path) or Table.open(fv.path).n_rows == 0


def test_C10_labels_that_are_no_class_get_a_hint(tmp_path):
    fv = make_fv(tmp_path, Images(labels=["cat"] * 12))
    with pytest.raises(Exception, match=r"'cat' is no integer class.*multitarget_to_single"):
        fv.run(EpsilonPlus(), 0, 12, **QUIET)


# --- reading samples --------------------------------------------------------------------------------------------------


def test_data_samples(tmp_path):
    fv = make_fv(tmp_path, preprocess_fn=lambda x: x * 2)
    data, target = fv.get_data_sample(4)
    assert data.shape == (1, 1, 6, 6) and data.requires_grad and data.is_leaf and target == 1
    assert torch.equal(data[0], fv.dataset.data[4] * 2)
    assert torch.equal(fv.get_data_sample(4, False)[0][0], fv.dataset.data[4])
    assert not fv.dataset.data.requires_grad
    batch, labels = fv.get_data_concurrently(np.array([5, 1]))
    assert torch.equal(batch, fv.dataset.data[[5, 1]]) and labels == [2, 1]
    batch, label = fv.get_data_concurrently(torch.tensor([5]), preprocessing=True)
    assert torch.equal(batch[0], fv.dataset.data[5] * 2) and label == 2


def test_integers_may_be_converted_by_preprocessing(tmp_path):
    dataset = Images()
    dataset.data = (dataset.data * 50).clamp(-127, 127).to(torch.int8)
    fv = mined(tmp_path, dataset, preprocess_fn=lambda x: x.double() / 255)
    assert fv.get_data_sample(3)[0].requires_grad and not fv.get_data_sample(3, False)[0].requires_grad
    samples, heatmaps = fv.get_max_reference(1, "first", composite=EpsilonPlus(), plot_fn=None)[1]
    assert samples.dtype == torch.int8 and heatmaps.dtype == torch.float64


def test_no_indices_are_refused(tmp_path):
    with pytest.raises(ValueError, match="indices is empty"):
        make_fv(tmp_path).get_data_concurrently([])


def test_S13_a_dataset_with_state_is_read_by_one_thread(tmp_path):
    class Stateful(Images):
        def __getitem__(self, index: int) -> Any:
            threads.add(threading.get_ident())
            self.current = index
            time.sleep(0.001)
            return self.data[self.current], self.labels[self.current]

    threads: set[int] = set()
    fv = mined(tmp_path, Stateful())
    batch, labels = fv.get_data_concurrently(list(range(12)))
    assert torch.equal(batch, fv.dataset.data) and labels == fv.dataset.labels
    assert threads == {threading.get_ident()}
    assert_same(results(fv), results(mined(tmp_path / "plain")))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_samples_may_be_loaded_by_worker_processes(tmp_path):
    fv = make_fv(tmp_path)
    fv.run(EpsilonPlus(), 0, 12, batch_size=5, num_workers=2, progress=False)
    assert 2 not in fv.dataset.reads  # here, only samples for the fingerprint were read
    assert_same(results(fv), results(mined(tmp_path / "plain")))


class Records(Images):
    """Gives dicts, as many datasets do."""

    def __getitem__(self, index: int) -> Any:
        data, label = super().__getitem__(index)
        return {"pixels": data, "label": label}


class RecordVisualization(FeatureVisualization):
    def get_data_sample(self, index, preprocessing=True):
        record = self.dataset[index]
        data = record["pixels"].to(self.device)[None]
        return (self.preprocess_data(data) if preprocessing else data).requires_grad_(), record["label"]


def test_get_data_sample_may_be_overridden(tmp_path):
    fv = mined(tmp_path, Records(), RecordVisualization, preprocess_fn=lambda x: x / 2)
    plain = mined(tmp_path / "plain", preprocess_fn=lambda x: x / 2)
    assert_same(results(fv), results(plain))
    heatmaps = [f.get_max_reference(1, "first", composite=EpsilonPlus(), plot_fn=None)[1][1] for f in (fv, plain)]
    torch.testing.assert_close(*heatmaps)
    with pytest.raises(ValueError, match=r"RecordVisualization.get_data_sample does not run"):
        fv.run(EpsilonPlus(), 0, 12, num_workers=1)


# --- several classes per sample ---------------------------------------------------------------------------------------


class MultiHot(FeatureVisualization):
    def multitarget_to_single(self, multi_target):
        return np.argwhere(np.array(multi_target).astype(int) == 1).reshape(-1)


class Listed(FeatureVisualization):
    def multitarget_to_single(self, multi_target):
        return multi_target


def test_S15_every_class_of_a_sample_has_statistics(tmp_path):
    fv = mined(tmp_path, Images(labels=[[1, 0, 1]] * 12), MultiHot)
    for path in (fv.RelStats.PATH, fv.ActStats.PATH):
        np.testing.assert_array_equal(load_stat_targets(path), [0, 2])
    of_0, of_2 = (load_statistics(fv.ActStats.PATH, "first", t) for t in (0, 2))
    for a, b in zip(of_0, of_2, strict=True):
        np.testing.assert_array_equal(a, b)
    # activation once per sample, relevance once per class
    assert sorted(load_maximization(fv.ActMax.PATH, "first")[0][:, 0]) == list(range(12))
    assert sorted(load_maximization(fv.RelMax.PATH, "first")[0][:, 0]) == sorted(list(range(12)) * 2)
    single = mined(tmp_path / "single", Images(labels=[2] * 12))
    assert_same(
        list(load_statistics(fv.RelStats.PATH, "first", 2)), list(load_statistics(single.RelStats.PATH, "first", 2))
    )


def test_C16_C9_labels_may_be_ragged_and_empty(tmp_path):
    labels = [[0], [0, 2], [1], [], [2, 1, 0], [1], [0], [2], [2, 0], [1], [], []]
    fv = mined(tmp_path, Images(labels=labels), Listed)
    for target in range(3):
        expected = [i for i, label in enumerate(labels) if target in label]
        assert sorted(load_statistics(fv.RelStats.PATH, "first", target)[0][:, 0]) == expected
    table = Table.open(fv.path)
    assert table.n_rows == sum(map(len, labels)) and not table.coverage(0, 12).missing


def test_the_base_class_takes_a_label_as_one_class(tmp_path):
    assert list(make_fv(tmp_path).multitarget_to_single(3)) == [3]
    for i, labels in enumerate((np.array([0, 1, 2] * 4), list(torch.tensor([0, 1, 2] * 4)))):
        fv = mined(tmp_path / str(i), Images(labels=labels))
        np.testing.assert_array_equal(load_stat_targets(fv.RelStats.PATH), [0, 1, 2])


# --- names, ties, files -----------------------------------------------------------------------------------------------


@plain_sums
def test_S14_C8_awkward_layer_names_stay_apart(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ["enc_1_2_a", "enc_1_2_b", "blocks/0", "\\up", "CON"]
            self.layers = nn.ModuleDict({name: nn.Conv2d(1, 4, 3, padding=1) for name in names})
            self.out = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(sum(layer(x) for layer in self.layers.values()))

    net = Net().double().eval()
    names = [f"layers.{name}" for name in net.layers]
    fv = mined(tmp_path, net=net, layers=names)
    seen = []
    for name in names:
        scores = expected_scores(fv, name, "activation", fv.dataset.labels)
        sample, value, _ = load_maximization(fv.ActMax.PATH, name)
        np.testing.assert_array_equal(sample, scores.argsort(dim=0, descending=True, stable=True))
        seen.append(value)
        assert len(fv.get_max_reference([0, 1], name, composite=EpsilonPlus(), plot_fn=None)) == 2
    assert len({value.tobytes() for value in seen}) == len(names)
    assert [p.name for p in tmp_path.iterdir()] == ["fv"]


def test_S17_ties_go_to_the_smaller_sample_whatever_the_batches(tmp_path):
    net = make_net()
    with torch.no_grad():
        net.first.weight[1] = 0
        net.first.bias[1] = 0
    for batch_size in (5, 12, 1):
        fv = make_fv(tmp_path / str(batch_size), net=net)
        fv.run(EpsilonPlus(), 0, 12, batch_size, progress=False)
        for folder in (fv.RelMax.PATH, fv.ActMax.PATH):
            assert load_maximization(folder, "first")[0][:, 1].tolist() == list(range(12))


def test_S25_activations_rank_by_share_or_by_value(tmp_path):
    shares = mined(tmp_path)
    values = make_fv(tmp_path, abs_norm=False)
    for fv, normed in ((shares, True), (values, False)):
        scores = expected_scores(fv, "first", "activation", fv.dataset.labels, normed=normed)
        order = scores.argsort(dim=0, descending=True, stable=True)
        np.testing.assert_array_equal(load_maximization(fv.ActMax.PATH, "first")[0], order)
        raw = fv.get_max_reference(0, "first", "activation", (0, 12))[0]
        assert torch.equal(raw, fv.dataset.data[order[:, 0]])
    assert not np.array_equal(*(load_maximization(fv.ActMax.PATH, "first")[0] for fv in (shares, values)))


def test_L8_the_number_of_files_does_not_depend_on_classes(tmp_path):
    few, many = mined(tmp_path / "few", Images(labels=[0] * 12)), mined(tmp_path / "many")
    files = [[p for p in fv.path.rglob("*") if p.is_file()] for fv in (few, many)]
    assert len(files[0]) == len(files[1]) <= 3


# --- in memory --------------------------------------------------------------------------------------------------------


def test_hooks_may_analyze_in_memory(tmp_path):
    fv = make_fv(tmp_path)
    inputs: dict[str, Any] = {}
    hooks = [([name], FeatVisHook(fv, concept, name, inputs)) for name, concept in fv.layer_map.items()]
    with NameMapComposite(hooks).context(fv.attribution.model) as model:
        for start in range(0, 12, 4):
            inputs |= {"sample_indices": np.arange(start, start + 4), "targets": np.arange(start, start + 4) % 3}
            output = model(fv.dataset.data[start : start + 4].requires_grad_())
            (output[range(4), inputs["targets"]] ** 2 / 2).sum().backward()
    table = make_fv(tmp_path / "table")
    table.run(None, 0, 12, **QUIET)
    for ours, folder in ((fv.RelMax, table.RelMax.PATH), (fv.ActMax, table.ActMax.PATH)):
        for layer in LAYERS:
            expected = load_maximization(folder, layer)
            for tensor, array in zip((ours.d_c_sorted, ours.rel_c_sorted, ours.rf_c_sorted), expected, strict=True):
                np.testing.assert_allclose(tensor[layer], array, rtol=1e-9)
    for ours, folder in ((fv.RelStats, table.RelStats.PATH), (fv.ActStats, table.ActStats.PATH)):
        for target in range(3):
            np.testing.assert_array_equal(ours.d_c_sorted[target]["first"], load_statistics(folder, "first", target)[0])


def test_S15_activations_in_memory_count_once_per_sample_and_for_every_class(tmp_path):
    fv = make_fv(tmp_path)
    act = torch.randn(4, 3, 2, 2).double()[[0, 0, 1, 2]]
    fv.analyze_activation(act, "a", ChannelConcept(), np.array([5, 5, 6, 7]), np.array([0, 3, 0, 3]))
    assert sorted(fv.ActMax.d_c_sorted["a"][:, 0].tolist()) == [5, 6, 7]
    assert {t: sorted(d["a"][:, 0].tolist()) for t, d in fv.ActStats.d_c_sorted.items()} == {0: [5, 6], 3: [5, 7]}


# --- a subclass as semanticlens writes it -----------------------------------------------------------------------------


class ComponentVisualizer(FeatureVisualization):
    """Own constructor, own results, own signatures; lists its folder and reads it with `load_maximization`."""

    def __init__(
        self,
        attribution,
        dataset,
        layer_names,
        preprocess_fn,
        composite=None,
        aggregation_fn="sum",
        storage_dir="FeatureVisualization",
        device=None,
        num_samples=100,
    ):
        super().__init__(
            attribution,
            dataset,
            layer_map={name: ChannelConcept() for name in layer_names},
            preprocess_fn=preprocess_fn,
            max_target=aggregation_fn,
            abs_norm=True,
            path=storage_dir,
            device=device,
            cache=None,
        )
        self.composite, self.num_samples = composite, num_samples
        self.ActMax = Maximization(mode="activation", max_target=aggregation_fn, abs_norm=False, path=storage_dir)
        self.ActStats = Statistics(mode="activation", max_target=aggregation_fn, abs_norm=False, path=storage_dir)
        self.ActMax.SAMPLE_SIZE = num_samples
        self.listed = list(self.ActMax.PATH.iterdir())

    def preprocess_data(self, data):
        return super().preprocess_data(data) * 0.5

    def multitarget_to_single(self, multi_target):
        return [int(t) for t in np.asarray(multi_target) if t >= 0]

    def run(self, composite=None, data_start=0, data_end=None, batch_size=32, checkpoint=500, on_device=None):
        end = len(self.dataset) if data_end is None else data_end
        return super().run(composite or self.composite, data_start, end, batch_size, checkpoint, on_device)

    @torch.enable_grad()
    def get_max_reference(self, concept_ids, layer_name, n_ref, batch_size=32):
        return super().get_max_reference(
            concept_ids, layer_name, "activation", (0, n_ref), self.composite, True, self.plot, batch_size
        )

    def plot(self, data_batch, heatmaps, rf):
        return list(zip(data_batch, heatmaps, strict=True))

    def sample_ids(self, layer_name):
        return torch.tensor(load_maximization(path_folder=self.ActMax.PATH, layer_name=layer_name)[0]).T


def test_a_subclass_as_semanticlens_writes_it(tmp_path):
    dataset = Images(labels=[[i % 3, -1] for i in range(12)])
    fv = ComponentVisualizer(
        CondAttribution(make_net()), dataset, LAYERS, None, EpsilonPlus(), "max", str(tmp_path / "x")
    )
    assert fv.listed == []
    fv.run()
    fv.run()
    with torch.no_grad():
        activation = fv.attribution.model.first(dataset.data * 0.5).flatten(2).max(-1).values
    assert torch.equal(fv.sample_ids("first"), activation.argsort(dim=0, descending=True, stable=True).T)
    _, relevance, _ = load_maximization(fv.RelMax.PATH, "first")
    assert relevance.shape == (12, 4)
    references = fv.get_max_reference([1, 2], "first", n_ref=50)
    assert {k: len(v) for k, v in references.items()} == {1: 12, 2: 12}
    assert torch.equal(references[1][0][0], dataset.data[fv.sample_ids("first")[1, 0]])
