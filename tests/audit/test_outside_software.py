"""Software of others that builds on concepts, unmodified: semanticlens, CoRelAy and ViRelAy, where installed."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from feature_net import Images, mined
from torch import nn

from crp.attribution import CondAttribution
from crp.audit import clarity, clusters, export_corelay, polysemanticity, redundancy
from crp.composites import EpsilonPlus
from crp.visualization.table.store import Table

pytestmark = pytest.mark.peer


class Pictures:
    """Twelve seeded pictures of 32 x 32 and their classes."""

    def __init__(self) -> None:
        self.data = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.data[index], index % 3


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(845, 3)
    ).eval()


@pytest.mark.filterwarnings("ignore")
def test_the_relevance_visualizer_of_semanticlens(tmp_path):
    """With what its base classes leave abstract; as it is, it cannot be made, whatever it is built on."""
    pytest.importorskip("semanticlens")
    from semanticlens import Lens, scores
    from semanticlens.component_visualization.relevance_based import RelevanceComponentVisualizer

    class Filled(RelevanceComponentVisualizer):
        device = storage_dir = None
        caching = False

        @property
        def layer_names(self):
            return self._layer_names

        def _compute_concept_db(self, fm, **kwargs):
            found = {}
            for layer in self.layer_names:
                ids = self.get_act_max_sample_ids(layer)
                vectors = fm.encode_image(torch.stack([self.dataset[i][0] for i in ids.flatten().tolist()]))
                found[layer] = vectors.reshape(*ids.shape, -1)
            return found

    class Means:
        device = torch.device("cpu")

        def to(self, device):
            return self

        def encode_image(self, pictures):
            return nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1) - 0.4

    net, data = make_net(), Pictures()

    def make():
        return Filled(
            CondAttribution(net), data, ["0", "2"], lambda x: x, EpsilonPlus(), storage_dir=str(tmp_path / "fv"),
            num_samples=4,
        )  # fmt: skip

    visualizer = make()
    visualizer.run(batch_size=5)
    activations = net[:1](data.data).flatten(2).sum(2).detach()
    assert torch.equal(visualizer.get_act_max_sample_ids("0"), activations.argsort(0, descending=True)[:4].T)
    pictures = visualizer.get_max_reference([0, 3], "2", 2)
    assert sorted(pictures) == [0, 3] and all(len(shown) == 2 for shown in pictures.values())
    again = make()
    with mine_nothing(net):
        again.run(batch_size=5)
    assert again.get_act_max_sample_ids("2").shape == (5, 4)
    assert again.metadata["num_samples"] == 4
    vectors = Lens(Means(), device="cpu").compute_concept_db(again)["2"]
    assert vectors.shape == (5, 4, 12)
    assert clarity(vectors) == pytest.approx(scores.clarity_score(vectors).numpy(), abs=1e-5)
    assert redundancy(vectors).mean() == pytest.approx(scores.redundancy_score(vectors.mean(1)).item(), abs=1e-5)
    theirs = scores.polysemanticity_score(vectors, replace_empty_clusters=False).numpy()
    assert theirs.shape == polysemanticity(vectors).shape


@pytest.fixture
def exported(tmp_path):
    """Clusters of class 0, half of whose pictures are bright, and their heatmaps, in files."""
    pytest.importorskip("h5py")
    data = Images(90)
    data.data[::6] = torch.ones(1, 6, 6).double() + data.data[::6] * 0.01
    fv = mined(tmp_path, data)
    found = clusters(Table.open(fv.path), "second", 0, what="activation", n=2, n_neighbours=5)
    pictures = data.data[found.sample]
    result = fv.attribution(pictures, [{"y": 0}], EpsilonPlus())
    labels = np.zeros(len(found.sample), np.int64)
    export_corelay(tmp_path / "a.h5", found, result.heatmap, name="00000", predictions=result.prediction, labels=labels)
    return tmp_path, found, result, pictures


def same_parts(one, other):
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    return len(set(pairs)) == len(set(one.tolist())) == len(set(other.tolist()))


@contextmanager
def mine_nothing(net):
    """No batch is mined: what was mined is found. (One sample may be looked at.)"""

    def refuse(_module, inputs):
        assert len(inputs[0]) == 1, "a batch was mined"

    handle = net[0].register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore")
def test_pipelines_of_corelay_read_what_is_written(exported):
    pytest.importorskip("corelay")
    from corelay.io.storage import HDF5Storage
    from corelay.pipeline.spectral import SpectralClustering
    from corelay.processor.affinity import SparseKNN
    from corelay.processor.clustering import KMeans
    from corelay.processor.embedding import EigenDecomposition

    folder, found, result, _ = exported
    with HDF5Storage(folder / "a.attribution.h5") as storage:
        maps = storage["attribution"]
        labels = storage["label"]
    assert maps.shape == (30, 3, 6, 6) and labels.tolist() == [0] * 30
    assert np.allclose(maps.sum(1), result.heatmap.detach(), rtol=1e-6, atol=1e-9)
    pipeline = SpectralClustering(
        affinity=SparseKNN(n_neighbors=5, symmetric=True),
        embedding=EigenDecomposition(n_eigval=2, is_output=True),
        clustering=KMeans(n_clusters=2, is_output=True),
    )
    (values, _), theirs = pipeline(found.vectors)
    assert same_parts(theirs, found.label)
    # (they give the largest eigenvalues of the normalised adjacency, 1 less those of the Laplacian)
    assert np.allclose(np.sort(1 - values) if values.max() > 0.5 else np.sort(values), found.eigenvalues[:2], atol=0.05)
    flat = np.ascontiguousarray(maps.reshape(30, -1), np.float64)
    ours = clusters(flat, n=2, n_neighbours=5, normed=False)
    assert same_parts(pipeline(flat)[1], ours.label)


@pytest.mark.filterwarnings("ignore")
def test_virelay_opens_what_is_written(exported):
    pytest.importorskip("virelay")
    h5py = pytest.importorskip("h5py")
    from virelay.model import Project

    folder, found, result, pictures = exported
    with h5py.File(folder / "data.h5", "w") as file:
        file["data"] = (pictures * 255).clamp(0, 255).expand(-1, 3, -1, -1).numpy().astype(np.uint8)
        file["label"] = np.zeros(30, np.uint16)
    labels = [{"index": i, "word_net_id": f"n{i:08d}", "name": f"class {i}"} for i in range(3)]
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "project.yaml").write_text(
        """
project:
  name: test
  model: net
  label_map: labels.json
  dataset: {name: data, type: hdf5, path: data.h5, input_width: 6, input_height: 6,
            down_sampling_method: none, up_sampling_method: none}
  attributions: {attribution_method: LRP, attribution_strategy: true_label, sources: [a.attribution.h5]}
  analyses:
    - {analysis_method: spectral, sources: [a.h5]}
"""
    )
    project = Project(os.fspath(folder / "project.yaml"))
    try:
        assert [one.name for one in project.get_analysis_categories("spectral")] == ["00000"]
        analysis = project.get_analysis("spectral", "00000", "spectral", "spectral")
        assert analysis.clustering.tolist() == found.label.tolist()
        assert np.allclose(analysis.eigenvalues, found.eigenvalues[:2], atol=1e-6)
        assert analysis.attribution_indices.tolist() == found.sample.tolist()
        attribution = project.get_attribution(int(found.sample[3]))
        assert np.allclose(attribution.data.sum(-1), result.heatmap[3].detach(), rtol=1e-6, atol=1e-9)
        assert np.allclose(attribution.prediction, result.prediction[3].detach(), atol=1e-6)
        assert attribution.labels[0].name == "class 0"
        for colours in ("blue-white-red", "black-fire-red", "gray-red", "jet"):
            assert attribution.render_heatmap(colours).shape == (6, 6, 3)
    finally:
        project.close()
