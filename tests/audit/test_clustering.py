"""Clusters of explanations: two blobs, the spectrum in closed form, tables, and the file for ViRelAy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv

from crp.audit import clusters, export_corelay, keep_heatmaps, kept_heatmaps, save_clusters
from crp.composites import EpsilonPlus
from crp.errors import InputError
from crp.visualization.table.manifest import TableNotFoundError
from crp.visualization.table.store import Table


def blobs(*sizes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around the unit vectors, and where each belongs."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return np.eye(6)[which] + rng.normal(size=(len(which), 6)) * 0.05, which


@pytest.mark.parametrize("sizes", [(60, 20), (40, 40, 40), (50, 30, 25, 20)], ids=str)
def test_blobs_are_found(sizes):
    """The gap after as many eigenvalues of 0 as there are parts says how many clusters there are."""
    points, which = blobs(*sizes)
    found = clusters(points)
    assert np.abs(found.eigenvalues[: len(sizes)]).max() < 1e-9
    assert found.eigenvalues[len(sizes)] > 0.01
    assert found.sizes == sorted(sizes, reverse=True)
    for i in range(len(sizes)):
        (part,) = {int(w) for w in which[found.label == i]}
        assert found.strongest(i, 1)[0][0] == part
        assert set(found.members(i)) == set(np.flatnonzero(which == part))
    assert found.separation > 0.99
    assert repr(found) == f"Clusters(sizes={found.sizes}, separation=1.00, vectors=({sum(sizes)}, 6))"


@pytest.mark.parametrize(("parts", "how"), [(9, {}), (20, {}), (3, {"largest": 2}), (4, {"n": 3})])
def test_more_parts_than_clusters_are_not_divided_by_chance(parts, how):
    """Eigenvectors of several eigenvalues of 0 are any basis, of which the first few tell no part from another."""
    points = np.eye(parts).repeat(12, 0) + np.random.default_rng(0).normal(size=(12 * parts, parts)) * 0.01
    with pytest.raises(InputError, match=f"fall into {parts} parts, .*more n_neighbours"):
        clusters(points, **how)
    assert clusters(points, largest=parts).sizes == clusters(points, n=parts).sizes == [12] * parts
    assert clusters(points, n=1).sizes == clusters(points, largest=1).sizes == [12 * parts]


@pytest.mark.parametrize("seed", range(4))
def test_one_blob_is_one_cluster(seed):
    found = clusters(np.random.default_rng(seed).normal(size=(100, 3)) * 0.1 + [1, 0, 0], normed=False)
    assert found.sizes == [100] and found.separation == 0
    assert found.strongest(0, 1)[0] == (0, pytest.approx(found.vectors.mean(0)[0]))
    assert clusters(blobs(50, 50)[0], n=3).sizes[0] <= 50


@pytest.mark.parametrize("sizes", [(60,), (40, 30)], ids=str)
def test_members_are_those_nearest_to_the_mean(sizes):
    """Separated clusters are a point each in the embedding, and one cluster is what all have in common."""
    points, _ = blobs(*sizes)
    found = clusters(points, normed=False)
    for i in range(len(sizes)):
        members = found.members(i)
        distance = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
        assert len(members) == sizes[i] and np.allclose(distance, np.sort(distance), atol=1e-8)


def test_spectrum_of_a_ring():
    """Points on a circle, each joined with its two neighbours: eigenvalues 1 - cos(2πk/n)."""
    angle = 2 * np.pi * np.arange(12) / 12
    found = clusters(np.stack([np.cos(angle), np.sin(angle)], 1), n=2, n_neighbours=2)
    wanted = np.sort(1 - np.cos(2 * np.pi * np.arange(12) / 12))[:9]
    assert np.allclose(found.eigenvalues, wanted, atol=1e-12)


def test_heatmaps_of_any_shape():
    points, _ = blobs(40, 30)
    maps = torch.from_numpy(points).reshape(70, 2, 3) * 5.0
    found = clusters(maps)
    assert found.sizes == [40, 30]
    assert np.array_equal(clusters(maps * torch.rand(70, 1, 1).add(0.1)).label, found.label)  # (lengths do not count)
    assert np.array_equal(found.sample, np.arange(70))


def test_a_mined_class(tmp_path):
    data = Images(90)
    data.data[::6] = torch.ones(1, 6, 6).double() + data.data[::6] * 0.01  # half of class 0
    fv = make_fv(tmp_path, data)
    fv.run(EpsilonPlus(), 0, 90, batch_size=30, progress=False)
    table = Table.open(fv.path)
    assert clusters(table, "second", 0, n_neighbours=5).sample.tolist() == list(range(0, 90, 3))
    found = clusters(table, "second", 0, what="activation", n_neighbours=5)
    assert len(found.sizes) == 2
    assert set(range(0, 90, 6)) <= set(found.members(int(found.label[0])))


def test_files_for_virelay(tmp_path):
    h5py = pytest.importorskip("h5py")
    points, which = blobs(40, 30)
    found = clusters(points)
    maps, outputs = torch.from_numpy(points).reshape(70, 2, 3), torch.rand(70, 4)
    export_corelay(tmp_path / "a.h5", found, maps, predictions=outputs, labels=which)
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file) == ["spectral"], "each entry is a category"
        assert np.array_equal(file["spectral/cluster/spectral"], found.label)
        assert file["spectral/cluster/spectral"].attrs["embedding"] == "spectral"
        assert file["spectral/cluster/spectral"].attrs["index"].tolist() == [0, 1]
        assert file["spectral/embedding/spectral"].shape == (70, 2)
        assert np.array_equal(file["spectral/index"], np.arange(70))
    with h5py.File(tmp_path / "a.attribution.h5") as file:
        assert file["attribution"].shape == (70, 3, 2, 3)
        assert np.allclose(file["attribution"][:].sum(1), maps, atol=1e-6)
        assert np.array_equal(file["index"], found.sample) and np.array_equal(file["label"], which)
        assert np.allclose(file["prediction"], outputs)
    export_corelay(
        tmp_path / "b.h5", found, maps[:, None].expand(-1, 2, -1, -1), predictions=outputs, labels=np.eye(2)[which] > 0
    )
    with h5py.File(tmp_path / "b.attribution.h5") as file:
        assert file["attribution"].shape == (70, 2, 2, 3) and file["label"].dtype == bool


def test_files_for_virelay_are_whole_or_not_written(tmp_path):
    pytest.importorskip("h5py")
    points, which = blobs(40, 30)
    found = clusters(points)
    with pytest.raises(ValueError, match="given together; label and prediction are missing"):
        export_corelay(tmp_path / "a.h5", found, points)
    with pytest.raises(ValueError, match="the clusters are of 70 samples; labels are of 69"):
        export_corelay(tmp_path / "a.h5", found, points, predictions=points, labels=which[1:])
    for labels in (which - 1, which + 2**16, which / 2, which[:, None]):
        with pytest.raises(InputError, match="labels must be classes from 0 to 65535, one for each sample, or boolean"):
            export_corelay(tmp_path / "a.h5", found, points, predictions=points, labels=labels)
    with pytest.raises(InputError, match="predictions must be finite"):
        export_corelay(tmp_path / "a.h5", found, points, predictions=points * np.inf, labels=which)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.attribution.h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.attribution\.h5 is there already"):
        export_corelay(tmp_path / "a.h5", found, points, predictions=points, labels=which)
    export_corelay(tmp_path / "a.h5", found)
    with pytest.raises(InputError, match=r"a\.h5 is there already"):
        export_corelay(tmp_path / "a.h5", found)


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"8 samples have not 10 neighbours each; .* n_neighbours \(--neighbours\)"):
        clusters(np.ones((8, 2)))
    with pytest.raises(ValueError, match="explanations must be finite, without NaN"):
        clusters(np.full((20, 2), np.nan))
    fv = make_fv(tmp_path)
    fv.run(EpsilonPlus(), 0, 12, progress=False)
    with pytest.raises(ValueError, match="clusters of a table need layer= and of_class="):
        clusters(Table.open(fv.path), "second")


@pytest.mark.parametrize(("size", "shape"), [(3, (3, 3)), (16, (6, 6))], ids=["smaller", "as they are"])
def test_heatmaps_beside_the_table(tmp_path, size, shape):
    """Averages over cells, in float16; their clusters are those of the heatmaps themselves."""
    data = Images(60)
    fv = make_fv(tmp_path, data)
    fv.run(EpsilonPlus(), 0, 60, batch_size=20, progress=False)
    table = Table.open(fv.path)
    with pytest.raises(TableNotFoundError, match=r"no heatmaps of class 1 .*; crp\.audit\.keep_heatmaps\(fv"):
        clusters(table, of_class=1, what="heatmap")
    path = keep_heatmaps(fv, EpsilonPlus(), 1, size=size, batch_size=7)
    samples, heatmaps = kept_heatmaps(table, 1)
    assert samples.tolist() == list(range(1, 60, 3)) and heatmaps.shape[1:] == shape
    whole = fv.attribution(data.data[1::3], [{"y": 1}], EpsilonPlus()).heatmap.numpy()
    step = 6 // shape[0]
    wanted = whole.reshape(20, shape[0], step, shape[1], step).mean((2, 4))
    assert (
        np.abs(heatmaps - wanted) <= np.abs(wanted) / 2048 + np.abs(wanted).max((1, 2), keepdims=True) * 2**-28
    ).all()
    found, direct = clusters(table, of_class=1, what="heatmap"), clusters(heatmaps)
    assert np.array_equal(found.sample, samples) and np.array_equal(found.label, direct.label)
    save_clusters(table, found, "second", 1, what="heatmap")
    assert path.stat().st_size < 4096 + 20 * 2 * 36
    with pytest.raises(ValueError, match="those of its heatmaps of_class= alone"):
        clusters(table, what="heatmap")
    with pytest.raises(ValueError, match="has no rows of"):
        keep_heatmaps(fv, EpsilonPlus(), 7)


def test_heatmaps_that_cannot_be_kept(tmp_path):
    fv = make_fv(tmp_path, Images(12))
    fv.run(EpsilonPlus(), 0, 12, progress=False)
    fv.attribution.heatmap_modifier = lambda data, on_device=None: data.grad.detach()
    with pytest.raises(ValueError, match=r"heatmaps have shape \(1, 6, 6\); only those of pictures are made small"):
        keep_heatmaps(fv, EpsilonPlus(), 1)
