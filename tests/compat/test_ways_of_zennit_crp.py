"""What users of zennit-crp override, and what they set: it works, or a warning names what is not called."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_net import LAYERS, Images, make_fv, mined
from zennit.composites import EpsilonPlus, NameMapComposite

from crp.concepts import ChannelConcept
from crp.helper import find_files, load_maximization, load_stat_targets, load_statistics
from crp.hooks import FeatVisHook
from crp.maximization import Maximization
from crp.visualization import FeatureVisualization, Table
from crp.visualization.table.store import TableError

COMPOSITE = EpsilonPlus()


class OwnRun(FeatureVisualization):
    """Mines as zennit-crp does: hooks rank batches in memory, and files are written every other batch."""

    def run_distributed(
        self, composite, data_start=0, data_end=None, batch_size=16, checkpoint=500, on_device=None, **options
    ):
        self.saved_checkpoints = {"r_max": [], "a_max": [], "r_stats": [], "a_stats": []}
        inputs: dict[str, Any] = {}
        hooks = [([name], FeatVisHook(self, concept, name, inputs)) for name, concept in self.layer_map.items()]
        last, model = data_start, self.attribution.model
        with composite.context(model), NameMapComposite(hooks).context(model):
            for start in range(data_start, data_end, batch_size):
                indices = np.arange(start, min(start + batch_size, data_end))
                data, labels = self.get_data_concurrently(indices, preprocessing=True)
                inputs |= {"sample_indices": indices, "targets": np.atleast_1d(labels)}
                output = model(data)
                chosen = torch.zeros_like(output)
                chosen[range(len(indices)), inputs["targets"]] = output[range(len(indices)), inputs["targets"]].detach()
                output.backward(chosen)
                if (start // batch_size) % 2:
                    self._save_results((last, int(indices[-1]) + 1))
                    last = int(indices[-1]) + 1
        self._save_results((last, data_end))
        return self.saved_checkpoints


def test_G4_a_run_of_ones_own_is_collected_and_asked(tmp_path):
    own, table = make_fv(tmp_path / "own", cls=OwnRun), mined(tmp_path / "table")
    saved = own.run(COMPOSITE, 0, 12, batch_size=3)
    assert sorted(Path(name).name for name in saved["r_max"]) == sorted(f"{layer}_" for layer in LAYERS)
    assert not Table.exists(own.path)
    for name in ("RelMax", "ActMax"):
        for layer in LAYERS:
            for ours, theirs in zip(
                load_maximization(getattr(own, name).PATH, layer),
                load_maximization(getattr(table, name).PATH, layer),
                strict=True,
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    np.testing.assert_array_equal(load_stat_targets(own.RelStats.PATH), [0, 1, 2])
    for target in range(3):
        pair = (load_statistics(fv.ActStats.PATH, "second", target) for fv in (own, table))
        for ours, theirs in zip(*pair, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    for ids in (0, [1, 2]):
        one, other = (fv.get_max_reference(ids, "first", composite=COMPOSITE, plot_fn=None) for fv in (own, table))
        for key in one:
            for ours, theirs in zip(one[key], other[key], strict=True):
                torch.testing.assert_close(ours, theirs)
    assert own.compute_stats(1, "first")[0].tolist() == table.compute_stats(1, "first")[0].tolist()


def test_G4_ranges_of_runs_of_ones_own_are_joined(tmp_path):
    fv, whole = make_fv(tmp_path, cls=OwnRun), mined(tmp_path / "whole")
    first = fv.run_distributed(COMPOSITE, 0, 7, batch_size=3)
    second = fv.run_distributed(COMPOSITE, 7, 12, batch_size=3)
    fv.collect_results({key: first[key] + second[key] for key in first})
    for ours, theirs in zip(
        load_maximization(fv.RelMax.PATH, "first"), load_maximization(whole.RelMax.PATH, "first"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_G4_results_of_ones_own_beside_a_table_are_refused(tmp_path):
    mined(tmp_path)
    fv = make_fv(tmp_path, cls=OwnRun)
    with pytest.raises(TableError, match=r"holds a table, which would answer in place of these results"):
        fv.run(COMPOSITE, 0, 12)


class OwnAnalysis(FeatureVisualization):
    def analyze_relevance(self, *args: Any) -> None:
        raise AssertionError

    def get_data_concurrently(self, indices: Any, preprocessing: bool = False) -> Any:
        return super().get_data_concurrently(indices, preprocessing)


class OwnMaximization(Maximization):
    def analyze_layer(self, *args: Any) -> Any:
        raise AssertionError


def test_G5_one_warning_names_what_is_not_called(tmp_path):
    fv = make_fv(tmp_path, cls=OwnAnalysis)
    fv.RelMax = OwnMaximization("relevance", path=fv.path)
    fv.analyze_activation = lambda *args: None  # type: ignore[method-assign]
    with pytest.warns(UserWarning) as caught:
        fv.run(COMPOSITE, 0, 12, progress=False)
    (warning,) = caught
    assert warning.filename == __file__
    assert (
        "does not call OwnAnalysis.analyze_relevance, OwnAnalysis.analyze_activation, "
        "OwnAnalysis.get_data_concurrently, RelMax.analyze_layer. To have them called, override run_distributed"
    ) in str(warning.message)


def test_G5_what_mining_calls_is_not_warned_of(tmp_path):
    class Own(FeatureVisualization):
        def multitarget_to_single(self, multi_target: Any) -> Any:
            return [multi_target]

        def get_data_sample(self, index: int, preprocessing: bool = True) -> Any:
            return super().get_data_sample(index, preprocessing)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mined(tmp_path, cls=Own)


def test_G6_the_sample_size_holds_for_what_is_read(tmp_path):
    fv = make_fv(tmp_path, Images(45))
    fv.RelMax.SAMPLE_SIZE, fv.ActStats.SAMPLE_SIZE = 12, 43
    fv.run(COMPOSITE, 0, 45, progress=False)
    assert load_maximization(fv.RelMax.PATH, "first")[0].shape == (12, 4)
    assert load_maximization(str(fv.RelMax.PATH), "first", sample_size=20)[0].shape == (20, 4)
    assert load_maximization(fv.ActMax.PATH, "first")[0].shape == (40, 4)
    assert load_statistics(fv.ActStats.PATH, "first", 1)[0].shape == (15, 4)
    again = make_fv(tmp_path, Images(45))
    again.run(COMPOSITE, 0, 45, progress=False)
    assert load_maximization(fv.RelMax.PATH, "first")[0].shape == (40, 4)


class Directions(ChannelConcept):
    """Concepts that have a matrix of their own."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix


OTHER_CONCEPTS: dict[str, Any] = {
    "kind": {"first": ChannelConcept(), "second": ChannelConcept()},
    "directions": {"first": Directions(torch.ones(2, 2)), "second": ChannelConcept()},
    "layers": {"first": ChannelConcept(), "second": Directions(torch.eye(2))},
}


@pytest.mark.parametrize("change", OTHER_CONCEPTS)
def test_G7_a_table_of_other_concepts_is_refused(tmp_path, change):
    mined(tmp_path, layers={"first": Directions(torch.eye(2)), "second": ChannelConcept()})
    other = make_fv(tmp_path, layers=OTHER_CONCEPTS[change])
    for ask in (other.get_max_reference, other.compute_stats):
        with pytest.raises(ValueError, match="mined with other layers"):
            ask(0, "first")
    same = make_fv(tmp_path, layers={"second": ChannelConcept(), "first": Directions(torch.eye(2))})
    assert len(same.get_max_reference(0, "first")[0]) == 8
    same.layer_map["first"].matrix[0, 1] = 1.0
    with pytest.raises(ValueError, match="mined with other layers"):
        same.get_max_reference(0, "first")


def test_G7_concepts_that_cannot_be_compared_are_pointed_out(tmp_path):
    mined(tmp_path)
    with pytest.warns(UserWarning, match="layer_map lacks 'second', which were mined, too") as caught:
        assert len(make_fv(tmp_path, layers=["first"]).get_max_reference(0, "first")[0]) == 8
    assert len(caught) == 1


def test_G8_a_script_that_lists_the_index_mines_once(tmp_path):
    """PURE and PCX mine where ``os.listdir(fv.RelMax.PATH)`` is empty, before and after, and once interrupted."""
    for stop, listed in ((0, False), (7, False), (12, True)):
        if stop:
            make_fv(tmp_path).run(COMPOSITE, 0, stop, progress=False)
        for name in ("RelMax", "ActMax", "RelStats", "ActStats"):
            assert any(getattr(make_fv(tmp_path), name).PATH.iterdir()) == listed
    assert load_maximization(make_fv(tmp_path).RelMax.PATH, "first")[0].shape == (12, 4)


def test_G8_a_folder_that_cannot_be_made_is_named_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    folder = Maximization(path=tmp_path / "file").PATH
    assert (folder.parent, folder.name) == (tmp_path / "file", "RelMax_sum_unnormed")


def test_G8_analysis_in_memory_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fv = make_fv(tmp_path)
    fv.analyze_activation(torch.ones(3, 4, 6, 6), "first", ChannelConcept(), [0, 1, 2], [0, 1, 2])
    assert not list(tmp_path.iterdir())


def test_G9_a_device_may_be_set_by_its_name(tmp_path):
    fv = mined(tmp_path)
    fv.device = "cpu"
    assert len(fv.get_max_reference(0, "first", composite=COMPOSITE, plot_fn=None)[0][0]) == 8
    fv.run(COMPOSITE, 0, 12, progress=False)


def test_G10_targets_may_be_arrays_in_a_list(tmp_path):
    fv = mined(tmp_path)
    best, _ = fv.compute_stats(1, "first", top_N=1)
    assert list(fv.get_stats_reference(1, "first", [best])) == [f"1:{best[0]}"]
    assert list(fv.get_stats_reference(1, "first", (torch.tensor(2), np.int64(0), "1"))) == ["1:2", "1:0", "1:1"]


@pytest.mark.parametrize("settings", [("sum", True), ("max", False)])
def test_G11_what_was_mined_is_found_first(tmp_path, settings):
    fv = mined(tmp_path, max_target=settings[0], abs_norm=settings[1])
    listed = [getattr(fv, name).PATH for name in ("RelMax", "ActMax", "RelStats", "ActStats")]
    assert [Path(found[0]) for found in find_files(fv.path)[:4]] == listed
