from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attribution_cases import plain_sums
from feature_net import LAYERS, Images, expected_scores, make_fv, make_net, mined
from PIL import Image
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept, Concept, ConceptScores
from crp.errors import InputTypeError
from crp.helper import export, load_maximization, load_statistics
from crp.maximization import Maximization
from crp.visualization import FeatureVisualization
from crp.visualization.cache import ImageCache

COMPOSITE = EpsilonPlus()


def tensors(fv: FeatureVisualization, ids: Any, layer: str = "first", **keywords: Any) -> dict[Any, Any]:
    keywords.setdefault("composite", COMPOSITE)
    return fv.get_max_reference(ids, layer, plot_fn=None, **keywords)


def reference_heatmap(fv: FeatureVisualization, sample: int, layer: str, ids: Any, **keywords: Any) -> Tensor:
    keywords = {"start_layer": layer, "exclude_parallel": False, **keywords}
    condition = {**keywords.pop("more", {}), layer: ids}
    return fv.attribution(fv.dataset.data[sample][None], [condition], COMPOSITE, **keywords).heatmap[0]


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "keys"),
    [
        (2, [2]),
        ([1, 3], [1, 3]),
        ((3, 1), [3, 1]),
        (range(2), [0, 1]),
        (np.int64(2), [2]),
        (np.array([[2, 0]]), [2, 0]),
        (torch.tensor(3), [3]),
        (torch.tensor([[3, 0, 2, 1]])[:5], [3, 0, 2, 1]),
        ([torch.tensor(1), np.int32(0)], [1, 0]),
        (-1, [-1]),
        ([], []),
    ],
)
def test_C3_concept_ids_may_be_anything_with_integers(tmp_path, ids, keys):
    fv = mined(tmp_path)
    result = fv.get_max_reference(ids, "first")
    assert list(result) == keys and all(type(key) is int for key in result)
    order = load_maximization(fv.RelMax.PATH, "first")[0]
    for key, samples in result.items():
        assert torch.equal(samples, fv.dataset.data[order[:8, key]])


def test_C3_the_readme_of_zennit_crp(tmp_path):
    fv = mined(tmp_path)
    relevance = fv.attribution(fv.dataset.data[:1], [{"y": [0]}], COMPOSITE, record_layer=["first"]).relevances["first"]
    concept_ids = torch.argsort(ChannelConcept().attribute(relevance, abs_norm=True), descending=True)
    result = tensors(fv, concept_ids[:5])
    assert list(result) == concept_ids[0].tolist()


@pytest.mark.parametrize("ids", [4, [0, 4], -5])
def test_an_unknown_concept_is_named(tmp_path, ids):
    with pytest.raises(IndexError, match=r"layer 'first' has 4 concepts, 0 to 3; there is no concept (4|-5)"):
        mined(tmp_path).get_max_reference(ids, "first")


def test_it_says_what_it_is(tmp_path):
    found = repr(make_fv(tmp_path / "table"))
    assert found.startswith("FeatureVisualization(CondAttribution(") and " layers, path=" in found and "table" in found


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="device is 'nope', which is no device"):
        make_fv(tmp_path, device="nope")


@pytest.mark.parametrize("ids", [1.5, "1", [None], torch.tensor([0.5]), ["a"]])
def test_ids_that_are_no_integers_are_refused(tmp_path, ids):
    with pytest.raises(TypeError):
        mined(tmp_path).get_max_reference(ids, "first")


def test_an_unknown_layer_is_named(tmp_path):
    with pytest.raises(KeyError, match=r"<layers> 'frist' not found"):
        mined(tmp_path).in_call_order(["second", "frist"], 0)
    with pytest.raises(KeyError, match=r"<layer_name> \['first'\] not found"):
        mined(tmp_path).get_max_reference([0], ["first"])
    with pytest.raises(KeyError, match=r"<layer_name> 'frist' not found.*'first'"):
        mined(tmp_path).get_max_reference(0, "frist")


def test_a_layer_of_the_model_that_layer_map_lacks_is_not_told_as_one_that_the_model_lacks(tmp_path):
    with pytest.raises(KeyError, match=r"<layer_name> 'second' not found in layer_map; .*there are 'first'"):
        mined(tmp_path, layers=["first"]).get_max_reference(0, "second")


def test_a_layer_that_was_not_mined_is_named(tmp_path):
    mined(tmp_path, layers=["first"])
    with pytest.raises(KeyError, match="second"):
        make_fv(tmp_path).get_max_reference(0, "second")


@pytest.mark.parametrize("call", ["get_max_reference", "get_stats_reference", "compute_stats"])
def test_an_unknown_mode_is_named(tmp_path, call):
    fv = mined(tmp_path)
    arguments = (0, "first", 1) if call == "get_stats_reference" else (0, "first")
    with pytest.raises(ValueError, match="mode must be one of 'relevance', 'activation', not 'rel'"):
        getattr(fv, call)(*arguments, mode="rel")


def test_before_a_run_there_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"FeatureVisualization.run"):
        make_fv(tmp_path).get_max_reference(0, "first")


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["relevance", "activation"])
def test_ranks(tmp_path, mode):
    fv = mined(tmp_path)
    order = expected_scores(fv, "second", mode, fv.dataset.labels).argsort(dim=0, descending=True, stable=True)
    for start, stop in ((0, 8), (3, 5), (0, 1), (11, 12)):
        assert torch.equal(
            fv.get_max_reference(1, "second", mode, (start, stop))[1], fv.dataset.data[order[start:stop, 1]]
        )


def test_C6_ranks_beyond_the_last_are_left_out_or_refused(tmp_path):
    fv = mined(tmp_path, Images(45))
    assert len(fv.get_max_reference(1, "first", r_range=(30, 80))[1]) == 15
    with pytest.raises(
        ValueError, match=r"r_range \(50, 58\) begins after the last reference: there are 45 for layer 'first'"
    ):
        fv.get_max_reference(1, "first", r_range=(50, 58))
    with pytest.raises(ValueError, match=r"there are 15 for layer 'first' and class 1"):
        fv.get_stats_reference(1, "first", 1, r_range=(15, 17))


@pytest.mark.parametrize("ranks", [(3, 3), (5, 2), (-1, 4)])
def test_ranks_that_are_no_range_are_refused(tmp_path, ranks):
    with pytest.raises(ValueError, match="r_range must be"):
        mined(tmp_path).get_max_reference(1, "first", r_range=ranks)


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_by_composite_and_plot_function(tmp_path):
    fv = mined(tmp_path, preprocess_fn=lambda x: x * 2)
    seen: list[Any] = []

    def plot(samples: Tensor, heatmaps: Tensor, rf: bool) -> str:
        seen.append((samples, heatmaps, rf))
        return "value"

    raw = fv.get_max_reference(1, "first", plot_fn=plot)[1]
    assert isinstance(raw, Tensor) and not raw.requires_grad and not seen
    samples, heatmaps = tensors(fv, 1)[1]
    assert torch.equal(samples, raw) and heatmaps.shape == (8, 6, 6) and not heatmaps.requires_grad
    assert fv.get_max_reference([1], "first", composite=COMPOSITE, plot_fn=plot, rf=True) == {1: "value"}
    assert torch.equal(seen[0][0], raw) and seen[0][1].shape == (8, 6, 6) and seen[0][2] is True


def test_the_default_plot_function_draws_images_and_heatmaps(tmp_path):
    fv = mined(tmp_path)
    images, heatmaps = fv.get_max_reference(1, "first", composite=COMPOSITE, r_range=(0, 3))[1]
    assert all(isinstance(image, Image.Image) for image in [*images, *heatmaps]) and len(images) == len(heatmaps) == 3


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch_size", [32, 3, 1])
def test_heatmaps_start_from_the_activation_of_the_concept(tmp_path, layer, batch_size):
    fv = mined(tmp_path)
    _, heatmaps = tensors(fv, 2, layer, batch_size=batch_size)[2]
    for sample, heatmap in zip(load_maximization(fv.RelMax.PATH, layer)[0][:8, 2], heatmaps, strict=True):
        torch.testing.assert_close(heatmap, reference_heatmap(fv, sample, layer, [2]))


@pytest.mark.parametrize("mode", ["relevance", "activation"])
@pytest.mark.parametrize("batch_size", [32, 3, 1])
def test_rf_heatmaps_start_from_the_strongest_position(tmp_path, mode, batch_size):
    fv = mined(tmp_path)
    _, heatmaps = tensors(fv, 2, mode=mode, rf=True, batch_size=batch_size)[2]
    folder = fv.RelMax.PATH if mode == "relevance" else fv.ActMax.PATH
    sample, _, position = load_maximization(folder, "first")
    for rank, heatmap in enumerate(heatmaps):
        mask = ChannelConcept.mask_rf
        expected = reference_heatmap(fv, sample[rank, 2], "first", {2: int(position[rank, 2])}, mask_map=mask)
        torch.testing.assert_close(heatmap, expected)
        assert (heatmap != 0).sum() <= 9


def test_rf_heatmaps_need_a_position_for_each_sample(tmp_path):
    fv = make_fv(tmp_path)
    with pytest.raises(ValueError, match="length of 'neuron_ids' must be equal to the length of 'data': 1 and 3"):
        fv._attribution_on_reference(fv.dataset.data[:3], 2, "first", COMPOSITE, True, [5])


def test_rf_without_a_composite_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="rf=True restricts heatmaps, and without a composite there are none"):
        mined(tmp_path).get_max_reference(1, "first", rf=True)


def test_S17_a_dead_concept_is_pointed_out(tmp_path):
    net = make_net()
    with torch.no_grad():
        net.first.weight[1] = 0
        net.first.bias[1] = 0
    fv = mined(tmp_path, net=net)
    with pytest.warns(
        UserWarning, match=r"the activation of 1 of 2 concepts \(1\) of layer 'first' is 0 on their references"
    ):
        assert torch.equal(fv.get_max_reference([1, 2], "first", "activation")[1], fv.dataset.data[:8])


@pytest.mark.filterwarnings("always")
def test_a_table_that_lacks_samples_says_so_once(tmp_path, recwarn):
    fv = make_fv(tmp_path)
    for stop, told in ((4, "4 of 12"), (8, "8 of 12"), (12, None)):
        fv.run(COMPOSITE, 0, stop, progress=False)
        recwarn.clear()
        for _ in range(2):
            tensors(fv, 1, mode="activation", composite=None)
            fv.compute_stats(1, "first")
        messages = [str(one.message) for one in recwarn]
        assert len(messages) == (told is not None)
        assert told is None or f"covers {told} samples, and so do answers" in messages[0]


# --- heatmaps of relevance --------------------------------------------------------------------------------------------


def test_heatmaps_may_show_relevance_of_the_references_class(tmp_path):
    fv = mined(tmp_path)
    _, heatmaps = tensors(fv, 2, init="relevance")[2]
    for sample, heatmap in zip(load_maximization(fv.RelMax.PATH, "first")[0][:8, 2], heatmaps, strict=True):
        expected = reference_heatmap(
            fv, sample, "first", [2], more={"y": sample % 3}, start_layer=None, exclude_parallel=True
        )
        torch.testing.assert_close(heatmap, expected)


def test_relevance_heatmaps_of_all_concepts_add_up_to_the_heatmap_of_the_class(tmp_path):
    fv = mined(tmp_path)
    every = {k: tensors(fv, k, init="relevance", targets=1, r_range=(0, 12)) for k in range(4)}
    total = {}
    for concept, result in every.items():
        order = load_maximization(fv.RelMax.PATH, "first")[0][:, concept]
        for sample, heatmap in zip(order, result[concept][1], strict=True):
            total[sample] = total.get(sample, 0) + heatmap
    for sample, heatmap in total.items():
        torch.testing.assert_close(
            heatmap, fv.attribution(fv.dataset.data[sample][None], [{"y": 1}], COMPOSITE).heatmap[0]
        )


def test_relevance_may_start_from_several_classes(tmp_path):
    fv = mined(tmp_path)
    both, first, second = (tensors(fv, 2, init="relevance", targets=t)[2][1] for t in ([0, 1], 0, 1))
    torch.testing.assert_close(both, first + second)


@plain_sums
def test_relevance_heatmaps_do_not_pass_by_the_concept(tmp_path):
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
            self.out = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.first(x) + self.second(x))

    net = Shortcut().double().eval()
    with torch.no_grad():
        net.first.weight[2] = 0
    fv = mined(tmp_path, net=net)
    _, heatmaps = tensors(fv, 2, init="relevance")[2]
    assert torch.equal(heatmaps, torch.zeros_like(heatmaps))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"init": "gradient"}, "init must be 'activation' or 'relevance', not 'gradient'"),
        ({"targets": 1}, "have no targets=1; add init='relevance'"),
    ],
)
def test_bad_starts_are_refused(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        tensors(mined(tmp_path), 1, **keywords)


def test_references_without_a_class_need_one_to_start_from(tmp_path):
    fv = make_fv(tmp_path, Images(labels=[None] * 12))
    fv.run(COMPOSITE, 0, 12, modes=["activation"], progress=False)
    with pytest.raises(ValueError, match="mined without classes; say from which to start: targets="):
        tensors(fv, 1, mode="activation", init="relevance")
    assert tensors(fv, 1, mode="activation", init="relevance", targets=2)[1][1].shape == (8, 6, 6)


# --- concepts of one's own --------------------------------------------------------------------------------------------


class Halves(Concept):
    """Top and bottom half of every channel; a concept is (channel, half)."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.masked: list[str] = []

    def column(self, concept_id, layer_name=None):
        channel, half = concept_id
        return 2 * channel + half

    def scores(self, relevance, layer_name=None):
        n = relevance.shape[2] // 2
        halves = torch.stack([relevance[:, :, :n], relevance[:, :, n:]], 2).flatten(3).flatten(1, 2)
        return ConceptScores(halves.sum(-1), *halves.max(-1))

    def mask(self, batch_id, concept_ids, layer_name=None):
        def mask_fn(grad):
            self.masked.append("mask")
            keep = torch.zeros_like(grad[batch_id])
            for channel, half in concept_ids:
                n = keep.shape[1] // 2
                keep[channel, half * n : (half + 1) * n] = 1
            grad[batch_id] *= keep
            return grad

        return mask_fn

    def mask_rf(self, batch_id, neuron_ids, layer_name=None):
        def mask_fn(grad):
            self.masked.append("mask_rf")
            keep = torch.zeros_like(grad[batch_id])
            for (channel, half), position in neuron_ids.items():
                keep[channel].view(2, -1)[half, position] = 1
            grad[batch_id] *= keep
            return grad

        return mask_fn


@pytest.mark.parametrize("rf", [False, True])
@pytest.mark.parametrize("init", ["activation", "relevance"])
def test_S19_a_concept_of_ones_own_masks_and_may_have_tuples_as_ids(tmp_path, rf, init):
    concept = Halves(4)
    fv = mined(tmp_path, layers={"first": concept})
    result = tensors(fv, [(1, 0), (3, 1)], rf=rf, mode="activation", init=init)
    assert list(result) == [(1, 0), (3, 1)]
    assert set(concept.masked) == {"mask_rf" if rf else "mask"}
    order = load_maximization(fv.ActMax.PATH, "first")[0][:, 7]
    samples, heatmaps = result[3, 1]
    assert torch.equal(samples, fv.dataset.data[order[:8]])
    assert (heatmaps[:, :2] == 0).all() and (heatmaps != 0).any()
    values, _ = fv.compute_stats((3, 1), "first", mode="activation")
    assert len(values) == 3


def test_tuples_need_a_concept_that_knows_them(tmp_path):
    with pytest.raises(TypeError, match=r"\(0, 1\) is a tuple; ChannelConcept needs a method column"):
        mined(tmp_path).get_max_reference([(0, 1)], "first")


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["relevance", "activation"])
def test_references_of_classes(tmp_path, mode):
    fv = mined(tmp_path)
    folder = fv.RelStats.PATH if mode == "relevance" else fv.ActStats.PATH
    for targets in (1, [1, 2], np.array([2, 0]), torch.tensor([0])):
        result = fv.get_stats_reference(torch.tensor(3), "first", targets, mode, (1, 3))
        assert list(result) == [f"3:{t}" for t in np.atleast_1d(targets)]
        for key, samples in result.items():
            order = load_statistics(folder, "first", int(key[2:]))[0]
            assert torch.equal(samples, fv.dataset.data[order[1:3, 3]])


def test_relevance_heatmaps_of_classes(tmp_path):
    fv = mined(tmp_path)
    _, heatmaps = fv.get_stats_reference(2, "first", 1, "activation", (0, 4), COMPOSITE, False, None, init="relevance")[
        "2:1"
    ]
    for sample, heatmap in zip(load_statistics(fv.ActStats.PATH, "first", 1)[0][:4, 2], heatmaps, strict=True):
        expected = reference_heatmap(fv, sample, "first", [2], more={"y": 1}, start_layer=None, exclude_parallel=True)
        torch.testing.assert_close(heatmap, expected)


def test_an_unknown_class_is_named(tmp_path):
    with pytest.raises(KeyError, match="7"):
        mined(tmp_path).get_stats_reference(2, "first", 7)


@pytest.mark.parametrize("wrong", [1.5, "dog", [0, None], torch.tensor([0.5]), [True]])
@pytest.mark.parametrize("cached", [False, True])
def test_a_wrong_target_is_named_as_a_target(tmp_path, wrong, cached):
    """G11: a concept id is another thing."""
    fv = mined(tmp_path)
    fv.Cache = ImageCache(tmp_path / "cache") if cached else None
    with pytest.raises(TypeError, match=r"^targets must be integers, not "):
        fv.get_stats_reference(2, "first", wrong, composite=COMPOSITE)
    with pytest.raises(TypeError, match=r"^targets must be integers, not "):
        fv.get_max_reference(2, "first", composite=COMPOSITE, init="relevance", targets=wrong)
    assert list(fv.get_stats_reference(2, "first", ["1", 0])) == ["2:1", "2:0"]


@pytest.mark.parametrize("mode", ["relevance", "activation"])
@pytest.mark.parametrize("mean_N", [2, 10])
def test_statistics_of_classes(tmp_path, mode, mean_N):
    fv = mined(tmp_path)
    scores = expected_scores(fv, "second", mode, fv.dataset.labels)
    means = torch.stack([scores[t::3].sort(dim=0, descending=True).values[:mean_N].mean(0) for t in range(3)])
    for concept in range(5):
        targets, values = fv.compute_stats(concept, "second", mode, top_N=2, mean_N=mean_N)
        order = means[:, concept].argsort(descending=True)[:2]
        assert isinstance(targets, np.ndarray) and targets.dtype == np.int64 and isinstance(values, Tensor)
        np.testing.assert_array_equal(targets, order)
        torch.testing.assert_close(values, means[order, concept])
        _, normed = fv.compute_stats(concept, "second", mode, 2, mean_N, norm=True)
        torch.testing.assert_close(normed, values / values[0].abs())


@pytest.mark.parametrize("wrong", [{"top_N": -1}, {"top_N": 0}, {"top_N": True}, {"top_N": 1.5}, {"mean_N": 0}])
def test_numbers_of_classes_and_samples_that_are_none_are_named(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1, not"):
        mined(tmp_path).compute_stats(1, "first", **wrong)


def test_statistics_lead_to_references(tmp_path):
    fv = mined(tmp_path)
    targets, _ = fv.compute_stats(1, "first", top_N=5)
    assert list(fv.get_stats_reference(1, "first", targets)) == [f"1:{t}" for t in targets]


# --- other tables -----------------------------------------------------------------------------------------------------


SOMETHING_ELSE: dict[str, dict[str, Any]] = {
    "model": {"net": make_net(1)},
    "dataset": {"dataset": [(image + 1, label) for image, label in (Images(12)[i] for i in range(12))]},
    "preprocess": {"preprocess_fn": torch.sigmoid},
}


@pytest.mark.parametrize("what", SOMETHING_ELSE)
def test_a_table_of_something_else_is_refused_unless_asked_for(tmp_path, what):
    mined(tmp_path)
    keywords = SOMETHING_ELSE[what]
    with pytest.raises(ValueError, match=what):
        make_fv(tmp_path, **keywords).get_max_reference(0, "first")
    with pytest.raises(ValueError, match=what):
        make_fv(tmp_path, **keywords).compute_stats(0, "first")
    assert len(make_fv(tmp_path, check=False, **keywords).get_max_reference(0, "first")[0]) == 8


def test_statistics_are_read_without_a_dataset_where_it_is_not_compared(tmp_path):
    known = mined(tmp_path).compute_stats(1, "first", top_N=1)
    fv = FeatureVisualization(CondAttribution(make_net()), None, LAYERS, path=tmp_path / "fv")
    with pytest.raises(InputTypeError, match=r"the dataset is None: .* or check=False to read statistics"):
        fv.compute_stats(1, "first")
    fv = FeatureVisualization(CondAttribution(make_net()), None, LAYERS, path=tmp_path / "fv", check=False)
    targets, values = fv.compute_stats(1, "first", top_N=1)
    assert targets.shape == values.shape == (1,) and (targets, values) == known
    with pytest.raises(InputTypeError, match="the dataset is None: it has samples to show"):
        fv.get_max_reference(1, "first")


def test_weights_that_change_in_place_are_noticed(tmp_path):
    fv = mined(tmp_path)
    fv.get_max_reference(0, "first")
    fv.attribution.model.first.weight.data *= 2
    with pytest.raises(ValueError, match="model"):
        fv.get_max_reference(0, "first")


def test_folders_of_zennit_crp_are_read_as_well(tmp_path):
    fv = mined(tmp_path)
    export(fv.path, tmp_path / "old" / "fv", sample_size=10)
    old = make_fv(tmp_path / "old")
    for mode in ("relevance", "activation"):
        assert torch.equal(old.get_max_reference(1, "first", mode)[1], fv.get_max_reference(1, "first", mode)[1])
        a, b = (f.get_stats_reference(1, "first", [0, 2], mode, (0, 3), COMPOSITE, True, None) for f in (old, fv))
        for key in a:
            for x, y in zip(a[key], b[key], strict=True):
                assert torch.equal(x, y)
        for x, y in zip(old.compute_stats(1, "first", mode), fv.compute_stats(1, "first", mode), strict=True):
            np.testing.assert_allclose(x, y)
    assert len(old.get_max_reference(1, "first", r_range=(0, 80))[1]) == 10
    assert load_maximization(old.RelMax.PATH, "first", sample_size=3)[0].shape == (3, 4)
    assert load_statistics(tmp_path / "old/fv/RelStats_sum_normed", "first", 1, sample_size=3)[0].shape == (3, 4)


def test_S25_results_may_be_replaced(tmp_path):
    fv = mined(tmp_path)
    fv.ActMax = Maximization("activation", "max", False, fv.path)
    scores = expected_scores(fv, "first", "activation", fv.dataset.labels, "max", False)
    order = scores.argsort(dim=0, descending=True, stable=True)
    assert torch.equal(fv.get_max_reference(0, "first", "activation")[0], fv.dataset.data[order[:8, 0]])


def test_methods_of_a_subclass_need_not_know_of_targets(tmp_path):
    class Old(FeatureVisualization):
        def _load_ref_and_attribution(self, d_indices, c_id, n_indices, layer_name, composite, rf, plot_fn, batch_size):
            return [int(i) for i in d_indices]

        def _attribution_on_reference(
            self, data, concept_id, layer_name, composite, rf=False, neuron_ids=(), batch_size=32
        ):
            raise AssertionError

    fv = mined(tmp_path, cls=Old)
    assert fv.get_max_reference(1, "first") == {1: load_maximization(fv.RelMax.PATH, "first")[0][:8, 1].tolist()}


def test_the_model_is_untouched(tmp_path, untouched):
    fv = mined(tmp_path)
    with untouched(fv.attribution.model):
        tensors(fv, [0, 1], rf=True)
        tensors(fv, [0, 1], init="relevance")
        with pytest.raises(RuntimeError, match="on purpose"):
            fv.get_max_reference(0, "first", composite=COMPOSITE, plot_fn=_raise)


def _raise(*args: Any) -> None:
    raise RuntimeError("on purpose")


# --- which samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r_range", [(0, 8), (2, 5), (0, 12)])
def test_a_sample_of_several_targets_is_one_reference(tmp_path, r_range):
    class Several(FeatureVisualization):
        def multitarget_to_single(self, multi_target):
            return multi_target

    images = Images(12, [[0, 1, 2]] * 12)
    layers = {layer: ChannelConcept() for layer in LAYERS}
    fv = Several(make_fv(tmp_path).attribution, images, layers, path=tmp_path)
    fv.run(COMPOSITE, 0, 12, progress=False)
    values = [fv.dataset.data[i] for i in range(12)]
    found = tensors(fv, range(4), r_range=r_range, composite=None)
    for samples in found.values():
        which = [next(i for i, one in enumerate(values) if torch.equal(one, sample)) for sample in samples]
        assert len(which) == r_range[1] - r_range[0] == len(set(which))


def test_a_concept_that_only_speaks_against_is_told_of(tmp_path):
    net = make_net()
    with torch.no_grad():
        net.hidden.weight.abs_().neg_()
        net.hidden.bias.fill_(1000.0)
        net.out.weight.fill_(1.0)
        net.second.bias.fill_(10.0)
    fv = make_fv(tmp_path, net=net, layers=["relu2"])
    fv.run(None, 0, 12, progress=False)
    with pytest.warns(UserWarning, match="negative everywhere") as told:
        tensors(fv, range(4), "relu2", composite=None)
    (one,) = told
    assert str(one.message).startswith("the relevance of 4 of 4 concepts (0, 1, 2, 3) of layer 'relu2' is negative")
    tensors(fv, 1, "relu2", composite=None, mode="activation")
