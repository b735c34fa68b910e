from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_net import LAYERS, Images, expected_scores, mined

from crp.concepts import ChannelConcept
from crp.errors import CRPError
from crp.helper import (
    abs_norm,
    export,
    find_files,
    get_layer_names,
    load_maximization,
    load_receptive_field,
    load_stat_targets,
    load_statistics,
    max_norm,
)
from crp.maximization import Maximization
from crp.statistics import Statistics

# --- norms ------------------------------------------------------------------------------------------------------------


def test_abs_norm_divides_by_the_absolute_sum():
    torch.testing.assert_close(abs_norm(torch.tensor([3.0, -1.0, 0.0])), torch.tensor([0.75, -0.25, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [abs_norm, max_norm])
def test_S27_zeros_stay_zeros_in_every_dtype(norm, dtype):
    assert torch.equal(norm(torch.zeros(3, dtype=dtype)), torch.zeros(3, dtype=dtype))


def test_S23_max_norm_never_changes_a_sign():
    torch.testing.assert_close(max_norm(torch.tensor([2.0, -1.0])), torch.tensor([1.0, -0.5]))
    torch.testing.assert_close(max_norm(torch.tensor([-4.0, -1.0])), torch.tensor([-1.0, -0.25]))
    torch.testing.assert_close(max_norm(torch.tensor([-4.0, 0.0])), torch.tensor([-1.0, 0.0]))


def test_layer_names_come_from_their_own_module():
    assert get_layer_names(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), [torch.nn.Linear]) == ["0"]


# --- folders that zennit-crp wrote ------------------------------------------------------------------------------------


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    """As zennit-crp 0.6 leaves it: int64, float32, and targets as strings."""
    generator = np.random.default_rng(0)
    for name in ("RelMax_sum_normed", "ActMax_sum_normed", "RelStats_sum_normed/conv", "ReField_x"):
        (tmp_path / name).mkdir(parents=True)
    for prefix in ("RelMax_sum_normed/conv", "RelStats_sum_normed/conv/10", "RelStats_sum_normed/conv/2"):
        np.save(tmp_path / f"{prefix}_data.npy", generator.integers(0, 9, (40, 3)))
        np.save(tmp_path / f"{prefix}_rel.npy", generator.random((40, 3), dtype=np.float32))
        np.save(tmp_path / f"{prefix}_rf.npy", generator.integers(0, 9, (40, 3)))
    np.save(tmp_path / "RelStats_sum_normed/targets.npy", np.array(["10", "2"]))
    np.save(tmp_path / "ReField_x/conv.npy", np.eye(3))
    return tmp_path


def test_reads_folders_of_zennit_crp(old_folder):
    folder = old_folder / "RelMax_sum_normed"
    data, rel, rf = load_maximization(folder, "conv")
    assert data.shape == rel.shape == rf.shape == (40, 3)
    assert (data.dtype, rel.dtype, rf.dtype) == (np.int64, np.float32, np.int64)
    np.testing.assert_array_equal(data, np.load(folder / "conv_data.npy"))
    np.testing.assert_array_equal(rel, np.load(folder / "conv_rel.npy"))
    np.testing.assert_array_equal(rf, np.load(folder / "conv_rf.npy"))
    stats = old_folder / "RelStats_sum_normed"
    np.testing.assert_array_equal(load_stat_targets(str(stats)), [10, 2])
    for target in (2, "2", np.int64(2)):
        np.testing.assert_array_equal(load_statistics(stats, "conv", target)[1], np.load(stats / "conv/2_rel.npy"))
    np.testing.assert_array_equal(load_receptive_field(old_folder / "ReField_x", "conv"), np.eye(3))


def test_finds_folders(old_folder, monkeypatch):
    expected = [["RelMax_sum_normed"], ["ActMax_sum_normed"], ["RelStats_sum_normed"], [], ["ReField_x"]]
    assert [[Path(p).name for p in paths] for paths in find_files(old_folder)] == expected
    monkeypatch.chdir(old_folder)
    assert [[Path(p).name for p in paths] for paths in find_files()] == expected


def test_missing_results_say_what_was_looked_for(tmp_path):
    for read in (
        lambda: load_maximization(tmp_path / "RelMax_sum_normed", "conv"),
        lambda: load_stat_targets(tmp_path),
    ):
        with pytest.raises(
            FileNotFoundError, match=r"neither a table nor zennit-crp's files.*FeatureVisualization.run"
        ):
            read()


def test_a_pickle_in_a_result_folder_is_not_executed(old_folder):
    for file in ("RelMax_sum_normed/conv_rel.npy", "RelStats_sum_normed/targets.npy"):
        np.save(old_folder / file, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        load_maximization(old_folder / "RelMax_sum_normed", "conv")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_stat_targets(old_folder / "RelStats_sum_normed")


def test_a_header_that_claims_more_than_the_file_holds_is_refused(old_folder):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    (old_folder / "RelMax_sum_normed/conv_rel.npy").write_bytes(header.getvalue())
    with pytest.raises(ValueError, match="mmap length"):
        load_maximization(old_folder / "RelMax_sum_normed", "conv")


@pytest.mark.parametrize("layer", ["../secret", "/etc/passwd", "a/../../b", "..", "C:\\x"])
def test_no_layer_name_reads_outside_the_folder(old_folder, layer):
    (old_folder / "RelMax_sum_normed" / "inner").mkdir()
    with pytest.raises(FileNotFoundError):
        load_maximization(old_folder / "RelMax_sum_normed" / "inner", layer)


# --- our table under the same names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["relevance", "activation"])
@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize("normed", [True, False])
def test_reads_our_table_by_the_name_of_a_folder(tmp_path, mode, kind, normed):
    fv = mined(tmp_path)
    name = f"{'Rel' if mode == 'relevance' else 'Act'}Max_{kind}_{'normed' if normed else 'unnormed'}"
    labels = fv.dataset.labels
    for layer in LAYERS:
        scores = expected_scores(fv, layer, mode, labels, kind, normed).numpy()
        sample, value, position = load_maximization(fv.path / name, layer)
        assert sample.shape == value.shape == position.shape == scores.shape
        np.testing.assert_array_equal(sample, np.argsort(-scores, axis=0, kind="stable"))
        np.testing.assert_allclose(value, -np.sort(-scores, axis=0), rtol=1e-9)
        stats = fv.path / name.replace("Max_", "Stats_")
        np.testing.assert_array_equal(load_stat_targets(stats), [0, 1, 2])
        of_class = np.flatnonzero(np.array(labels) == 1)
        sample, value, _ = load_statistics(stats, layer, 1)
        np.testing.assert_array_equal(sample, of_class[np.argsort(-scores[of_class], axis=0, kind="stable")])
    assert sorted(p.name for p in fv.path.iterdir() if p.is_dir()) == ["derived", "shards"]


def test_virtual_folders_are_found(tmp_path):
    fv = mined(tmp_path)
    r_max, a_max, r_stats, a_stats, rf = find_files(fv.path)
    assert str(fv.RelMax.PATH) in r_max and str(fv.ActMax.PATH) in a_max and len(r_max) == 4
    assert str(fv.RelStats.PATH) in r_stats and str(fv.ActStats.PATH) in a_stats and not rf
    for folder in r_max + a_max:
        assert load_maximization(folder, "first")[0].shape == (12, 4)


def test_reading_40_by_default_as_zennit_crp_keeps(tmp_path):
    fv = mined(tmp_path, Images(45))
    assert load_maximization(fv.RelMax.PATH, "first")[0].shape == (40, 4)
    assert load_maximization(fv.RelMax.PATH, "first", sample_size=100)[0].shape == (45, 4)


def test_unknown_layers_and_classes_of_a_table_are_named(tmp_path):
    fv = mined(tmp_path)
    with pytest.raises(KeyError, match=r"'frist'.*'first'"):
        load_maximization(fv.RelMax.PATH, "frist")
    with pytest.raises(KeyError, match="9"):
        load_statistics(fv.RelStats.PATH, "first", 9)


@pytest.mark.parametrize("files", [False, True], ids=["table", "files"])
def test_numbers_that_are_none_are_named(tmp_path, files):
    fv = mined(tmp_path)
    path = fv.path
    if files:
        path = tmp_path / "files"
        export(fv.path, path)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"^sample_size must be a whole number of at least 1"):
            load_maximization(path / "RelMax_sum_normed", "first", size)
    for target in (1.7, True, None):
        with pytest.raises(CRPError, match=r"^target must be "):
            load_statistics(path / "RelStats_sum_normed", "first", target)
    for target in ("1", torch.tensor(1)):
        assert len(load_statistics(path / "RelStats_sum_normed", "first", target)[0])


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_round_trip(tmp_path):
    fv = mined(tmp_path)
    for max_target, abs_norm_ in (("sum", True), ("max", False)):
        written = export(fv.path, tmp_path / "old", max_target, abs_norm_)
        for folder in written:
            ours = fv.path / folder.name
            for layer in LAYERS:
                if "Max_" in folder.name:
                    pairs = [(load_maximization(folder, layer), load_maximization(ours, layer))]
                else:
                    np.testing.assert_array_equal(load_stat_targets(folder), load_stat_targets(ours))
                    assert np.load(folder / "targets.npy").dtype.kind == "U"
                    pairs = [
                        (load_statistics(folder, layer, t), load_statistics(ours, layer, t))
                        for t in load_stat_targets(ours)
                    ]
                for exported, original in pairs:
                    for a, b in zip(exported, original, strict=True):
                        np.testing.assert_array_equal(a, b)
    names = {p.name for p in (tmp_path / "old").iterdir()}
    assert names == {
        f"{m}{k}_{n}" for m in ("Rel", "Act") for k in ("Max", "Stats") for n in ("sum_normed", "max_unnormed")
    }


def test_export_keeps_as_many_samples_as_asked_for(tmp_path):
    fv = mined(tmp_path, Images(45))
    for size in (3, 44):
        export(fv.path, tmp_path / str(size), sample_size=size)
        assert load_maximization(tmp_path / str(size) / "RelMax_sum_normed", "first")[0].shape == (size, 4)
        of_class = load_statistics(tmp_path / str(size) / "ActStats_sum_normed", "first", 1)[0]
        assert of_class.shape == (min(size, 15), 4)


def test_layers_whose_files_may_be_one_are_not_exported(tmp_path):
    net = torch.nn.Sequential(OrderedDict(a=torch.nn.Conv2d(1, 2, 3), A=torch.nn.Conv2d(2, 2, 3)))
    net.extend([torch.nn.Flatten(), torch.nn.Linear(8, 3)])
    fv = mined(tmp_path, net=net.double().eval(), layers=["a", "A"])
    with pytest.raises(ValueError, match="layers 'a' and 'A' differ in case only"):
        export(fv.path, tmp_path / "old")
    assert not (tmp_path / "old").exists()


def test_export_of_a_table_of_several_shards(tmp_path):
    fv = mined(tmp_path, Images(13))
    split = mined(tmp_path / "split", Images(13))
    for start in (0, 4, 8):
        split.run(None, start, start + 4, batch_size=2, checkpoint=1, progress=False, overwrite=start == 0)
    whole = mined(tmp_path / "whole", Images(13))
    whole.run(None, 0, 12, batch_size=4, progress=False, overwrite=True)
    for f, name in ((split, "a"), (whole, "b")):
        export(f.path, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.npy"))
    assert len(files) == 2 * (2 * 3 + 2 * 3 * 3 + 1)
    for file in files:
        a, b = np.load(tmp_path / "a" / file), np.load(tmp_path / "b" / file)
        np.testing.assert_allclose(a, b, rtol=1e-9) if a.dtype.kind == "f" else np.testing.assert_array_equal(a, b)
    assert fv.path != split.path


# --- accumulators -----------------------------------------------------------------------------------------------------


def _analyze(results: Maximization, relevance: torch.Tensor, layer: str = "enc_1_2_.a", start: int = 0):
    indices = np.arange(start, start + len(relevance))
    return results.analyze_layer(relevance, ChannelConcept(), layer, indices, indices % 2)


def test_accumulators_keep_the_best_whatever_the_batches(tmp_path):
    relevance = torch.randn(30, 3, 2, 2, dtype=torch.float64).round(decimals=0)
    best: list[Maximization] = []
    for size in (30, 7, 1):
        results, stats = Maximization(path=tmp_path), Statistics(path=tmp_path)
        results.SAMPLE_SIZE = stats.SAMPLE_SIZE = 5
        for start in range(0, 30, size):
            stats.analyze_layer(*_analyze(results, relevance[start : start + size], start=start), "enc_1_2_.a")
        best.append(results)
        for target in (0, 1):
            value = relevance[target::2].sum((2, 3))
            order = value.argsort(dim=0, descending=True, stable=True)[:5]
            assert torch.equal(stats.d_c_sorted[target]["enc_1_2_.a"], order * 2 + target)
            assert torch.equal(stats.rel_c_sorted[target]["enc_1_2_.a"], value.gather(0, order))
    order = relevance.sum((2, 3)).argsort(dim=0, descending=True, stable=True)[:5]
    for results in best:
        assert torch.equal(results.d_c_sorted["enc_1_2_.a"], order)
        assert torch.equal(results.rf_c_sorted["enc_1_2_.a"], best[0].rf_c_sorted["enc_1_2_.a"])


def test_S16_accumulators_leave_out_what_is_not_finite(tmp_path):
    relevance = torch.ones(3, 2, 2, 2)
    relevance[1, 0, 0, 0] = torch.nan
    results = Maximization(path=tmp_path)
    _analyze(results, relevance)
    assert results.d_c_sorted["enc_1_2_.a"].tolist() == [[0, 0], [2, 2]]


def test_a_batch_of_which_nothing_is_finite_adds_nothing(tmp_path):
    largest, statistics = Maximization(path=tmp_path), Statistics(path=tmp_path)
    for rel in (torch.full((2, 3, 2), torch.nan), torch.ones(2, 3, 2)):
        statistics.analyze_layer(*largest.analyze_layer(rel, ChannelConcept(), "conv", [4, 5], [0, 1]), "conv")
    assert largest.d_c_sorted["conv"].tolist() == [[4] * 3, [5] * 3]
    assert statistics.d_c_sorted[1]["conv"].tolist() == [[5] * 3]


def test_S21_large_targets_are_exact(tmp_path):
    results = Maximization(path=tmp_path)
    targets = results.analyze_layer(torch.ones(1, 2), ChannelConcept(), "a", [0], [16777217])[3]
    assert targets.tolist() == [[16777217, 16777217]]


def test_paths_that_were_written_on_windows_are_collected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results, stats = Maximization(path="r"), Statistics(path="r")
    stats.analyze_layer(*_analyze(results, torch.ones(4, 2), "conv", 0), "conv")
    saved, saved_stats = ([path.replace("/", "\\") for path in one._save_results((0, 4))] for one in (results, stats))
    results.collect_results(saved)
    stats.collect_results(saved_stats)
    assert load_maximization(results.PATH, "conv")[1].shape == (4, 2)
    assert load_statistics(stats.PATH, "conv", 1)[1].shape[1] == 2


def test_S14_C8_partial_files_of_awkward_layer_names_stay_apart(tmp_path):
    layers = ["enc_1_2_.a", "enc_1_2_.b", "enc", "blocks/0", "../up", "/abs", "a%b"]
    results, stats = Maximization(path=tmp_path / "r"), Statistics(path=tmp_path / "r")
    saved, saved_stats = [], []
    for start in (0, 4):
        for i, layer in enumerate(layers):
            ranked = _analyze(results, torch.full((4, 2), float(i + start)), layer, start)
            stats.analyze_layer(*ranked, layer)
        saved += results._save_results((start, start + 4))
        saved_stats += stats._save_results((start, start + 4))
    final = results.collect_results(saved)
    stats.collect_results(saved_stats)
    assert len(final) == len(layers)
    for i, layer in enumerate(layers):
        assert load_maximization(results.PATH, layer)[1][0, 0] == i + 4
        assert load_statistics(stats.PATH, layer, 1)[1][0, 0] == i + 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]
    assert len(list(results.PATH.iterdir())) == 3 * len(layers)
    np.testing.assert_array_equal(load_stat_targets(stats.PATH), [0, 1])


def test_partial_results_are_deleted_after_the_whole_is_written(tmp_path, monkeypatch):
    from crp.compat import folders

    results = Maximization(path=tmp_path)
    _analyze(results, torch.ones(2, 2))
    saved = results._save_results((0, 2))
    before = sorted(results.PATH.iterdir())

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        results.collect_results(saved)
    assert sorted(results.PATH.iterdir()) == before


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"mode must be .*not 'rel'"):
        Maximization("rel", path=tmp_path)
    with pytest.raises(ValueError, match=r"max_target must be .*not 'mean'"):
        Statistics(max_target="mean", path=tmp_path)
    with pytest.raises(ValueError, match="no partial result"):
        Maximization(path=tmp_path).collect_results([str(tmp_path / "conv_")])
