"""What PCX and L-CRP, which build on zennit-crp, override and call: it works as it is written there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv
from sklearn.mixture import GaussianMixture
from torch import nn
from zennit.composites import EpsilonPlus, NameMapComposite, SpecialFirstLayerMapComposite, layer_map_base
from zennit.rules import Epsilon, Flat, ZPlus
from zennit.types import Convolution, Linear

from crp.attribution import CondAttribution
from crp.audit import prototypes
from crp.concepts import ChannelConcept
from crp.helper import get_layer_names, load_maximization, load_statistics
from crp.hooks import FeatVisHook
from crp.maximization import Maximization
from crp.outputs import Pixels
from crp.statistics import Statistics
from crp.visualization import FeatureVisualization, Table

COMPOSITE = EpsilonPlus()


class PlusFlat(SpecialFirstLayerMapComposite):
    """Both have composites of this kind."""

    def __init__(self, canonizers: Any = None) -> None:
        layer_map = [*layer_map_base(), (Convolution, ZPlus()), (nn.Linear, Epsilon())]
        super().__init__(layer_map, [(Linear, Flat())], canonizers=canonizers)


# --- L-CRP: where relevance starts


class Segmentation(CondAttribution):
    """Starts from the positive logits of a class where it is the largest, so that they add up to 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.mask: Any = 1

    def relevance_init(self, prediction: Any, target_list: Any, init_rel: Any) -> Any:
        if target_list:
            start = torch.zeros_like(prediction).to(self.device)
            for i, target in enumerate(target_list):
                (one,) = target if isinstance(target, list) else (target,)
                largest = (prediction.softmax(1).argmax(1) == one)[i]
                start[i, one] = prediction[i, one].clamp(min=0) * largest
                start = start * self.mask
            init_rel = start / (start.sum() + 1e-12)
        else:
            prediction = prediction.clamp(min=0)
        return CondAttribution.relevance_init(self, prediction, None, init_rel)


class Localization(CondAttribution):
    """Starts with 1 at the box with the highest score of a class, where that is more than a quarter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.take_prediction = 0

    def relevance_init(self, prediction: Any, target_list: Any, init_rel: Any) -> Any:
        start = torch.zeros_like(prediction).to(self.device)
        for i, target in enumerate(target_list):
            k = min(self.take_prediction + 1, len(prediction[i]))
            box = torch.topk(prediction[i], k, dim=0).indices[k - 1, target].item()
            start[i, box, target] = torch.ones_like(start[i, box, target]) * (prediction[i, box, target] > 0.25)
        return CondAttribution.relevance_init(self, prediction, None, start / (start.sum() + 1e-12))


def make_dense() -> nn.Sequential:
    """Scores of 3 classes at 6 x 6 pixels."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).double().eval()
    with torch.no_grad():
        net[2].weight.abs_()
        net[2].bias.fill_(0.1)
    return net


@pytest.fixture
def data():
    return Images(4).data.clone().requires_grad_()


@pytest.mark.parametrize("composite", [COMPOSITE, PlusFlat()], ids=["epsilon_plus", "own"])
def test_segmentation_starts_from_its_own_pixels(data, composite):
    net = make_dense()
    attribution = Segmentation(net)
    for target in (0, 1, 2):
        found = attribution(data, [{"y": target}] * 4, composite, record_layer=["0"], init_rel=1)
        output = net(data.detach())
        start = output[:, target].clamp(min=0) * (output.argmax(1) == target)
        weights = torch.zeros_like(output)
        weights[:, target] = start / (start.sum() + 1e-12)
        plain = CondAttribution(net)(data, [{}] * 4, composite, record_layer=["0"], init_rel=weights)
        torch.testing.assert_close(found.heatmap, plain.heatmap)
        torch.testing.assert_close(found.relevances["0"], plain.relevances["0"])


def test_a_mask_of_pixels_is_what_pixels_are(data):
    """A class, a mask, and the concepts of a layer: ours and theirs differ by their factor alone."""
    net = make_dense()
    theirs = Segmentation(net)
    output = net(data.detach())[0]
    target = int(output.argmax(0).flatten().mode().values)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[:3] = True
    theirs.mask = inside
    found = theirs(data[:1], [{"y": target, "0": [1, 2]}], COMPOSITE)
    chosen = inside & (output.argmax(0) == target)
    ours = CondAttribution(net)(data[:1], [{"y": Pixels(target, chosen), "0": [1, 2]}], COMPOSITE)
    factor = output[target][chosen].clamp(min=0).sum()
    torch.testing.assert_close(found.heatmap * factor, ours.heatmap, rtol=1e-6, atol=1e-9)


class Boxes(nn.Module):
    """Scores of 3 classes for each of 36 boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("number", [0, 2])
def test_localization_starts_from_one_box(data, number):
    model = Boxes().eval()
    attribution = Localization(model)
    attribution.take_prediction = number
    found = attribution(data[:2], [{"y": 1}, {"y": 2}], COMPOSITE, ["net.0"], init_rel=1)
    output = model(data.detach()[:2])
    start = torch.zeros_like(output)
    for i, target in enumerate((1, 2)):
        box = output[i, :, target].argsort(descending=True)[number]
        start[i, box, target] = (output[i, box, target] > 0.25).double()
    assert start.sum() == 2
    plain = CondAttribution(model)(data[:2], [{}] * 2, COMPOSITE, ["net.0"], init_rel=start / 2)
    torch.testing.assert_close(found.heatmap, plain.heatmap)
    conditions = [{"y": 1, "net.0": c} for c in np.arange(4)]
    parts = attribution(data[:1], conditions, COMPOSITE, exclude_parallel=True).heatmap
    whole = attribution(data[:1], [{"y": 1}], COMPOSITE).heatmap
    torch.testing.assert_close(parts.sum(0) * 4, whole[0])  # (the four share what is at the start)


# --- L-CRP: mining with several classes a sample


class Scenes:
    """Pictures with a map of classes; 255 is none."""

    def __init__(self, n: int = 8) -> None:
        self.pictures = Images(n).data
        generator = torch.Generator().manual_seed(3)
        self.maps = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (n, 2, 2), generator=generator)]
        self.class_names = ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.pictures[index], self.maps[index]


class OfScenes(FeatureVisualization):
    """Reads samples, turns labels into classes, mines and shows references in its own way."""

    def get_data_sample(self, index: int, preprocessing: bool = True) -> Any:
        data, target = self.dataset[index]
        there = [int(t) for t in torch.unique(target) if t != 255]
        there = [there[i] for i in torch.randperm(len(there))]
        targets = [1 if i in there else 0 for i in range(len(self.dataset.class_names))]
        return data.unsqueeze(0).to(self.device).requires_grad_(), np.array(targets).flatten().astype(int)

    def multitarget_to_single(self, multi_target: Any) -> Any:
        return np.argwhere(np.array(multi_target).astype(int) == 1).reshape(-1)


class OwnRunOfScenes(OfScenes):
    def run_distributed(
        self, composite: Any, data_start: Any, data_end: Any, batch_size: Any = 16, checkpoint: Any = 500,
        on_device: Any = None,
    ) -> Any:  # fmt: skip
        self.saved_checkpoints = {"r_max": [], "a_max": [], "r_stats": [], "a_stats": []}
        hooks, inputs = [], dict[str, Any]()
        for name, concept in self.layer_map.items():
            hooks.append(([name], FeatVisHook(self, concept, name, inputs, on_device)))
        ranking = NameMapComposite(hooks)
        composite.register(self.attribution.model)
        ranking.register(self.attribution.model)
        last = 0
        for begin in range(data_start, data_end, batch_size):
            indices = np.arange(begin, min(begin + batch_size, data_end))
            batch, labels = self.get_data_concurrently(indices, preprocessing=True)
            rows = [(i, int(t)) for i, label in enumerate(labels) for t in self.multitarget_to_single(label)]
            if not rows:
                continue
            inputs["sample_indices"] = indices[[i for i, _ in rows]]
            inputs["targets"] = np.array([t for _, t in rows])
            conditions = [{self.attribution.MODEL_OUTPUT_NAME: [t]} for _, t in rows]
            broadcast = torch.stack([batch[i] for i, _ in rows])
            self.attribution(broadcast, conditions, None, exclude_parallel=False)
            self._save_results((last, int(indices[-1]) + 1))
            last = int(indices[-1]) + 1
        composite.remove()
        ranking.remove()
        return self.saved_checkpoints


def make_scenes(path: Any, cls: type) -> Any:
    fv = make_fv(path, Scenes(), cls, max_target="max")
    fv.RelMax = Maximization("relevance", "sum", True, fv.path)
    fv.RelStats = Statistics("relevance", "sum", True, fv.path)
    return fv


@pytest.fixture(scope="module")
def mined_both(tmp_path_factory):
    """By a run of one's own, and by ours."""
    found = []
    for cls in (OwnRunOfScenes, OfScenes):
        fv = make_scenes(tmp_path_factory.mktemp(cls.__name__), cls)
        fv.run(COMPOSITE, 0, 8, 4, 100)
        found.append(fv)
    return found


def test_several_classes_a_sample_are_mined_by_either_way(mined_both):
    own, ours = mined_both
    assert not Table.exists(own.path) and Table.exists(ours.path)
    for name in ("RelMax", "ActMax"):
        one, other = (load_maximization(getattr(fv, name).PATH, "second") for fv in mined_both)
        np.testing.assert_allclose(one[1], other[1][: len(one[1])], rtol=1e-9)
    n_rows = sum(len(ours.multitarget_to_single(ours.get_data_sample(i)[1])) for i in range(8))
    assert Table.open(ours.path).n_rows == n_rows


def get_max_reference(fv: Any, ids: Any, layer: str, n: int, composite: Any) -> Any:
    """As L-CRP asks for references: with the class for which each is the best, from the statistics of every class."""
    samples, values, positions = load_maximization(fv.RelMax.PATH, layer)
    found = {}
    for concept in ids:
        indices, best = samples[:n, concept], values[:n, concept]
        data, labels = fv.get_data_concurrently(indices, preprocessing=True)
        assert all(len(fv.multitarget_to_single(label)) for label in labels)
        targets = np.zeros(n).astype(int)
        for t in np.arange(len(fv.dataset.class_names)):
            try:
                of_class = load_statistics(fv.RelStats.PATH, layer, t)
            except FileNotFoundError:
                continue
            known = list(of_class[0][:, concept])
            targets[[x in known and of_class[1][known.index(x), concept] == r
                     for x, r in zip(indices, best, strict=True)]] = int(t)  # fmt: skip
        conditions = [{layer: {concept: p}, "y": t} for p, t in zip(positions[:n, concept], targets, strict=True)]
        heatmaps = fv.attribution(
            data.detach().requires_grad_(), conditions, composite, mask_map=ChannelConcept.mask_rf,
            start_layer=None, on_device=fv.device, exclude_parallel=True,
        ).heatmap  # fmt: skip
        again = fv._attribution_on_reference(
            data, concept, layer, composite, True, positions[:n, concept], 32, targets=targets
        )
        torch.testing.assert_close(heatmaps, again)
        found[concept] = data.detach(), heatmaps
    return found


def test_references_of_scenes(mined_both):
    one, other = (get_max_reference(fv, [0, 3], "second", 3, COMPOSITE) for fv in mined_both)
    for concept in (0, 3):
        for a, b in zip(one[concept], other[concept], strict=True):
            torch.testing.assert_close(a, b)
    samples, _, positions = load_maximization(mined_both[1].ActMax.PATH, "second")
    shown = [
        fv._load_ref_and_attribution(
            samples[:2, 1], 1, positions[:2, 1], "second", COMPOSITE, True, lambda d, h, rf: (d, h), 32
        )
        for fv in mined_both
    ]
    for a, b in zip(*shown, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_may_be_a_list_of_names(tmp_path):
    """L-CRP hands the names alone where a table is only asked: they are channels."""
    fv = make_fv(tmp_path)
    fv.run(COMPOSITE, 0, 12, progress=False)
    names = get_layer_names(fv.attribution.model, [nn.Conv2d])
    again = FeatureVisualization(fv.attribution, fv.dataset, names, path=fv.path)
    assert names == ["first", "second"] and list(again.layer_map) == names
    one, other = (each.get_max_reference([1], "second", composite=COMPOSITE, plot_fn=None) for each in (fv, again))
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="nope"):
        FeatureVisualization(fv.attribution, fv.dataset, ["nope"], path=fv.path)


# --- PCX


class Clamped(Maximization):
    """Ranks positive activations alone."""

    def __init__(self, mode: str = "relevance", max_target: str = "sum", abs_norm: bool = False, path: Any = None):
        super().__init__(mode, max_target, abs_norm, path)
        self.mode = mode

    def analyze_layer(self, rel: Any, concept: Any, layer_name: str, data_indices: Any, targets: Any) -> Any:
        rel = rel.clamp(min=0) if "act" in self.mode else rel
        return super().analyze_layer(rel, concept, layer_name, data_indices, targets)


def make_pcx(path: Any, data: Any, layer: str) -> Any:
    fv = make_fv(path, data, layers=[layer])
    fv.RelMax, fv.ActMax = Clamped("relevance", "sum", True, fv.path), Clamped("activation", "sum", False, fv.path)
    fv.ActStats = Statistics("activation", "sum", False, fv.path)
    return fv


def test_pcx_ranks_behind_a_relu_as_it_would(tmp_path):
    fv = make_pcx(tmp_path, Images(12), "relu2")
    with pytest.warns(UserWarning, match=r"does not call RelMax\.analyze_layer, ActMax\.analyze_layer"):
        fv.run(COMPOSITE, 0, 12, 5, 100)
    batch = torch.stack([fv.dataset[i][0] for i in range(12)])
    own = Clamped("activation", "sum", False, tmp_path / "own")
    result = fv.attribution(batch, [{"y": i % 3} for i in range(12)], COMPOSITE, ["relu2"])
    own.analyze_layer(result.activations["relu2"], ChannelConcept(), "relu2", np.arange(12), np.arange(12) % 3)
    own._save_results()
    one, other = (load_maximization(each.PATH, "relu2") for each in (own, fv.ActMax))
    np.testing.assert_allclose(one[1], other[1], rtol=1e-9)


def test_pcx_prototypes_by_hand_are_ours(tmp_path):
    """Relevance of channels of each class, a mixture, the sample nearest to each mean, and what deviates."""
    data = Images(60)
    data.data[::6] += 2
    fv = make_fv(tmp_path, data)
    fv.run(COMPOSITE, 0, 60, 20, 100)
    concept, vectors = ChannelConcept(), []
    for i in range(0, 60, 3):
        result = fv.attribution(data[i][0][None], [{"y": 0}], COMPOSITE, record_layer=["second"])
        vectors.append(concept.attribute(result.relevances["second"], abs_norm=True))
    attributions = torch.cat(vectors).detach().numpy()
    added = 1e-2 * attributions.var(0).mean()
    gmm = GaussianMixture(2, reg_covar=added, random_state=0).fit(attributions)
    found = prototypes(Table.open(fv.path), "second", 2, classes=[0], covariance="full")
    mixture = found.classes[0]
    np.testing.assert_allclose(mixture.means, gmm.means_, atol=1e-6)
    belongs = gmm.predict(attributions)
    for i, mean in enumerate(gmm.means_):
        distances = np.where(belongs == i, np.linalg.norm(attributions - mean, axis=1), np.inf)
        assert mixture.sample[i] == 3 * distances.argmin()
    np.testing.assert_allclose(found.score(attributions, 0), gmm.score_samples(attributions), rtol=1e-4)
    np.testing.assert_allclose(found.deviation(attributions, 0), attributions - gmm.means_[belongs], atol=1e-6)
