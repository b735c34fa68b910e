from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_net import Images, make_fv, make_net, mined
from PIL import Image
from torch import Tensor
from zennit.composites import EpsilonPlus, NameMapComposite
from zennit.rules import Epsilon, ZPlus

from crp.cache import Cache, ImageCache
from crp.concepts import ChannelConcept
from crp.visualization import FeatureVisualization
from crp.visualization.cache import safe_name

calls: list[int] = []


def pictures(samples: Tensor, heatmaps: Tensor, rf: bool, shade: int = 0) -> list[Image.Image]:
    """One grey picture per heatmap; its size is that of the heatmap, its shade a digest of its values."""
    return [Image.new("L", tuple(h.shape), (int(h.abs().sum() * 1e6) + shade) % 256) for h in heatmaps]


def pairs(samples: Tensor, heatmaps: Tensor, rf: bool) -> tuple[list[Image.Image], list[Image.Image]]:
    first = pictures(samples, heatmaps, rf)
    return first, [Image.new("RGB", (3, 2), (int(s.sum() * 99) % 256, 7, 9)) for s in samples]


@pytest.fixture(autouse=True)
def _count_heatmaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """``calls`` lists how many heatmaps were computed at once. (A plot function that counted would change by it.)"""
    original = FeatureVisualization._attribution_on_reference

    def counting(self: FeatureVisualization, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(data))
        return original(self, data, *args, **kwargs)

    calls.clear()
    monkeypatch.setattr(FeatureVisualization, "_attribution_on_reference", counting)


def content(images: list[Image.Image]) -> list[Any]:
    return [(image.mode, image.size, image.tobytes()) for image in images]


def ask(
    fv: FeatureVisualization, ids: Any = (0, 2), composite: Any = None, plot_fn: Any = pictures, **keywords: Any
) -> Any:
    keywords.setdefault("r_range", (0, 3))
    return fv.get_max_reference(ids, "first", composite=composite or EpsilonPlus(), plot_fn=plot_fn, **keywords)


def with_cache(tmp_path: Path, **keywords: Any) -> FeatureVisualization:
    return mined(tmp_path, cache=ImageCache(tmp_path / "cache"), **keywords)


# --- what is cached ---------------------------------------------------------------------------------------------------


def test_second_call_is_served_from_the_cache(tmp_path):
    fv = with_cache(tmp_path)
    first = ask(fv)
    assert calls == [3, 3]
    second = ask(fv)
    assert calls == [3, 3] and list(second) == [0, 2]
    assert {k: content(v) for k, v in first.items()} == {k: content(v) for k, v in second.items()}
    assert {k: content(v) for k, v in first.items()} == {
        k: content(v) for k, v in ask(mined(tmp_path / "no_cache")).items()
    }


def test_only_missing_ranks_and_concepts_are_computed(tmp_path):
    fv = with_cache(tmp_path)
    ask(fv, [0], r_range=(0, 2))
    calls.clear()
    result = ask(fv, [1, 0], r_range=(0, 5))
    assert sorted(calls) == [3, 5] and list(result) == [1, 0]
    expected = ask(mined(tmp_path / "no_cache"), [1, 0], r_range=(0, 5))
    assert {k: content(v) for k, v in result.items()} == {k: content(v) for k, v in expected.items()}


def test_pairs_of_lists(tmp_path):
    fv = with_cache(tmp_path)
    first = ask(fv, 1, plot_fn=pairs, r_range=(0, 2))
    second = ask(fv, 1, plot_fn=pairs)
    assert calls == [2, 1]
    assert isinstance(second[1], tuple) and [len(images) for images in second[1]] == [3, 3]
    for a, b in zip(first[1], second[1], strict=True):
        assert content(a) == content(b[:2])


def test_C4_ids_may_be_single_numbers(tmp_path):
    fv = with_cache(tmp_path)
    for id_ in (1, torch.tensor(1), [1], torch.tensor([[1]])):
        assert list(ask(fv, id_)) == [1]
    assert calls == [3]
    for targets in (2, [2], "2", torch.tensor(2)):
        result = fv.get_stats_reference(1, "first", targets, "relevance", (0, 3), EpsilonPlus(), plot_fn=pictures)
        assert list(result) == ["1:2"]
    assert calls == [3, 3]


def test_C5_plot_functions_may_be_partials_lambdas_and_objects(tmp_path):
    class Plot:
        def __init__(self, shade: int) -> None:
            self.shade = shade

        def __call__(self, samples: Tensor, heatmaps: Tensor, rf: bool) -> list[Image.Image]:
            return pictures(samples, heatmaps, rf, self.shade)

    fv = with_cache(tmp_path)
    functions = [functools.partial(pictures, shade=1), functools.partial(pictures, shade=2), Plot(3), Plot(4)]
    functions += [lambda s, h, rf: pictures(s, h, rf, 5), lambda s, h, rf: pictures(s, h, rf, 6)]
    results = [content(ask(fv, 0, plot_fn=f)[0]) for f in functions]
    assert len(calls) == 6 and len(set(map(str, results))) == 6
    again = [
        functools.partial(pictures, shade=1),
        functools.partial(pictures, shade=2),
        Plot(3),
        Plot(4),
        *functions[4:],
    ]
    assert [content(ask(fv, 0, plot_fn=f)[0]) for f in again] == results
    assert len(calls) == 6


# --- keyed by content -------------------------------------------------------------------------------------------------


def test_S18_another_composite_of_the_same_class_is_computed(tmp_path):
    fv = with_cache(tmp_path)

    def composite(rule: Any) -> NameMapComposite:
        return NameMapComposite([(["first", "second", "hidden", "out"], rule)])

    rules = [Epsilon(), ZPlus(), Epsilon(epsilon=0.5)]
    results = [content(ask(fv, 0, composite(rule))[0]) for rule in rules]
    assert len(calls) == 3 and len(set(map(str, results))) == 3
    assert [content(ask(fv, 0, composite(rule))[0]) for rule in (Epsilon(), ZPlus(), Epsilon(epsilon=0.5))] == results
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:the table in .* covers 6 of 12 samples")
@pytest.mark.parametrize("change", ["model", "weights", "data", "preprocess", "table", "concept"])
def test_S18_pictures_of_something_else_are_not_served(tmp_path, change):
    cache = ImageCache(tmp_path / "cache")
    net = make_net()
    fv = mined(tmp_path, cache=cache, net=net)
    ask(fv, 0)
    keywords: dict[str, Any] = {"net": net}
    dataset = Images()
    if change == "model":
        keywords["net"] = make_net(seed=1)
    elif change == "weights":
        net.first.weight.data *= 1.5
    elif change == "data":
        dataset.data += 1
    elif change == "preprocess":
        keywords["preprocess_fn"] = torch.sigmoid
    elif change == "concept":
        keywords["layers"] = {"first": type("Other", (ChannelConcept,), {})()}
    other = make_fv(tmp_path, dataset, cache=cache, **keywords)
    other.run(EpsilonPlus(), 0, 6 if change == "table" else 12, progress=False, overwrite=True)
    ask(other, 0)
    assert calls == [3, 3]


OTHER_READERS: dict[str, dict[str, Any]] = {
    "model": {"net": make_net(1), "check": False},
    "preprocess": {"preprocess_fn": torch.sigmoid, "check": False},
    "concept": {"layers": {"first": type("Other", (ChannelConcept,), {})()}, "check": False},
    "max_target": {"max_target": "max"},
    "abs_norm": {"abs_norm": False},
}


@pytest.mark.parametrize("change", OTHER_READERS)
def test_S18_one_table_read_in_other_ways_gives_other_pictures(tmp_path, change):
    fv = with_cache(tmp_path)
    ask(fv, 0)
    ask(make_fv(tmp_path, cache=fv.Cache, **OTHER_READERS[change]), 0)
    assert calls == [3, 3]


@pytest.mark.filterwarnings("ignore:the relevance of .* is negative everywhere")
def test_other_questions_are_other_pictures(tmp_path):
    fv = with_cache(tmp_path)
    settings: list[dict[str, Any]] = [{}, {"rf": True}, {"mode": "activation"}, {"init": "relevance"}]
    settings += [{"init": "relevance", "targets": t} for t in (0, 1, [0, 1])]
    for setting in settings:
        ask(fv, 0, **setting)
    assert len(calls) == len(settings)
    fv.get_stats_reference(0, "first", 0, "relevance", (0, 3), EpsilonPlus(), plot_fn=pictures)
    fv.get_max_reference(0, "second", composite=EpsilonPlus(), plot_fn=pictures, r_range=(0, 3))
    assert len(calls) == len(settings) + 2
    for setting in settings:
        ask(fv, 0, **setting, batch_size=2)
    assert len(calls) == len(settings) + 2


def test_overwrite_computes_again(tmp_path):
    fv = with_cache(tmp_path)
    before = ask(fv, [0, 1])
    after = ask(fv, [0, 1], overwrite=True)
    assert calls == [3] * 4
    assert {k: content(v) for k, v in before.items()} == {k: content(v) for k, v in after.items()}


def test_tensors_are_not_cached(tmp_path):
    fv = with_cache(tmp_path)
    assert isinstance(ask(fv, 0, plot_fn=None)[0][1], Tensor)
    assert isinstance(fv.get_max_reference(0, "first", r_range=(0, 3))[0], Tensor)
    assert not (tmp_path / "cache").exists()


OTHER_VALUES: dict[str, Any] = {
    "boxes": lambda samples, heatmaps, rf: [tuple(h.shape) for h in heatmaps],
    "tensors": lambda samples, heatmaps, rf: heatmaps,
    "pairs": lambda samples, heatmaps, rf: (samples, heatmaps),
    "numbers": lambda samples, heatmaps, rf: float(heatmaps.sum()),
}


@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_what_a_cache_cannot_keep_is_computed_each_time(tmp_path, kind):
    fv = with_cache(tmp_path)
    for _ in range(2):
        found = ask(fv, plot_fn=OTHER_VALUES[kind])
        assert list(found) == [0, 2]
    assert calls == [3] * 4 and not (tmp_path / "cache").exists()
    samples, heatmaps = ask(fv, plot_fn=None)[2]
    torch.testing.assert_close(found[2], OTHER_VALUES[kind](samples, heatmaps, False))
    with pytest.raises(TypeError, match="ImageCache saves PIL images"):
        fv.precompute_ref({"first": [0]}, EpsilonPlus(), rf=False, plot_list=[OTHER_VALUES["boxes"]])


@pytest.mark.filterwarnings("ignore:the relevance of .* is negative everywhere")
def test_precomputed_pictures_are_found(tmp_path):
    fv = with_cache(tmp_path)
    settings = {"stats": True, "top_N": 2, "mean_N": 3, "r_range": (0, 20), "plot_list": [pictures, pairs]}
    fv.precompute_ref({"first": [0, 1], "second": torch.tensor([2])}, EpsilonPlus(), **settings)
    assert len(calls) == 3 * (1 + 2)
    calls.clear()
    for plot_fn in (pictures, pairs):
        ask(fv, [0, 1], plot_fn=plot_fn, rf=True, r_range=(0, 20))
        targets, _ = fv.compute_stats(2, "second", top_N=2, mean_N=3)
        fv.get_stats_reference(2, "second", targets, "relevance", (0, 2), EpsilonPlus(), True, plot_fn)
    assert calls == []


def test_precomputing_tells_of_all_concepts_of_a_layer_at_once(tmp_path):
    settings = {"stats": True, "top_N": 9, "plot_list": [pictures], "r_range": (0, 1)}
    with pytest.warns(UserWarning, match="negative everywhere") as told:
        with_cache(tmp_path).precompute_ref({"first": range(3)}, EpsilonPlus(), **settings)
    (message,) = {str(one.message) for one in told}
    assert len(told) == 1 and re.match(r"the relevance of [2-9] of \d+ concepts \(.* of layer 'first' is", message)


def test_precomputing_leaves_classes_out_unless_asked_for(tmp_path):
    fv = with_cache(tmp_path)
    fv.precompute_ref({"first": [0, 1]}, EpsilonPlus(), plot_list=[pictures])
    assert calls == [8, 8]


def test_precomputing_needs_a_cache_and_a_composite(tmp_path):
    with pytest.raises(ValueError, match="cache=ImageCache"):
        mined(tmp_path).precompute_ref({"first": [0]}, EpsilonPlus())
    with pytest.raises(ValueError, match="composite"):
        with_cache(tmp_path / "b").precompute_ref({"first": [0]}, None)


# --- files ------------------------------------------------------------------------------------------------------------

NAMES = ["../up", "/abs", "a/b", "..", "CON", "a:b", "trailing.", "x" * 300, "A", "a", "", "ü", "C:\\x"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leaves_the_folder(tmp_path, name):
    cache = ImageCache(tmp_path / "inner" / "cache")
    key = (name, "relevance", (0, 1), EpsilonPlus(), False, name, name)
    cache.save({name: [Image.new("L", (2, 2), 3)]}, *key)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 1 and files[0].is_relative_to(cache.path)
    found, missing = cache.load([name], *key)
    assert content(found[name]) == [("L", (2, 2), b"\x03" * 4)] and not missing


def test_names_are_apart_on_every_file_system():
    names = [safe_name(name) for name in [*NAMES, "x" * 301]]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(len(name) < 80 and name[-1] not in ". " for name in names)
    assert not any(set(name) & set('<>:"/\\|?*') for name in names)


def test_a_broken_picture_is_computed_again(tmp_path):
    fv = with_cache(tmp_path)
    before = ask(fv, 0)
    for i, file in enumerate(sorted((tmp_path / "cache").rglob("*.png"))):
        file.write_bytes(file.read_bytes()[: 20 * i])
    assert {k: content(v) for k, v in ask(fv, 0).items()} == {k: content(v) for k, v in before.items()}
    assert calls == [3, 3]


def test_a_pair_cut_short_is_not_taken_for_a_list(tmp_path, monkeypatch):
    cache = ImageCache(tmp_path)
    key = ("layer", "relevance", (0, 2), EpsilonPlus(), False, "get_max_reference", "plot")
    images = [Image.new("L", (2, 2), i) for i in range(2)]
    saved = []

    def save(self: Image.Image, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        if len(saved) > 2:
            raise OSError(28, "No space left on device")
        original(self, *args, **kwargs)

    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space"):
        cache.save({3: (images, images)}, *key)
    assert cache.load([3], *key) == ({}, {3: (0, 2)})
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("value", [[torch.ones(2)], (["x"], [1]), ([Image.new("L", (1, 1))], []), [[1]]])
def test_what_is_no_picture_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match=r"ImageCache saves .*3"):
        ImageCache(tmp_path).save({3: value}, "layer", "relevance", (0, 1), EpsilonPlus(), False, "f", "plot")


@pytest.mark.parametrize("id_", [3, "3:1", (0, 1)])
def test_a_single_id_may_be_loaded(tmp_path, id_):
    cache = ImageCache(tmp_path)
    key = ("layer", "relevance", (0, 2), EpsilonPlus(), False, "get_max_reference", "plot")
    cache.save({id_: [Image.new("L", (2, 2), 9)]}, *key)
    found, missing = cache.load(id_, *key)
    assert list(found) == [id_] and missing == {id_: (1, 2)}


def test_extend_dict():
    cache = ImageCache("unused")
    joined = cache.extend_dict({1: [1], 2: ([1], [2])}, {1: [5], 2: ([6], [7]), 3: [8], 4: ([9], [0])})
    assert joined == {1: [1, 5], 2: ([1, 6], [2, 7]), 3: [8], 4: ([9], [0])}
    with pytest.raises(TypeError, match="1 cannot be joined: list and tuple"):
        cache.extend_dict({1: [1]}, {1: ([1], [2])})
    assert not Path("unused").exists()


# --- a cache of one's own ---------------------------------------------------------------------------------------------


class MemoryCache(Cache):
    """With the signatures of zennit-crp's ImageCache."""

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[Any, Any] = {}

    def save(self, ref_dict, layer_name, mode, r_range, composite, rf, func_name, plot_name):
        for id_, value in ref_dict.items():
            for rank, entry in zip(range(*r_range), value, strict=True):
                self.store[layer_name, mode, type(composite).__name__, rf, func_name, plot_name, id_, rank] = entry

    def load(self, indices, layer_name, mode, r_range, composite, rf, func_name, plot_name):
        key = layer_name, mode, type(composite).__name__, rf, func_name, plot_name
        found, missing = {}, {}
        for id_ in indices:
            ranks = [r for r in range(*r_range) if (*key, id_, r) in self.store]
            found[id_] = [self.store[(*key, id_, r)] for r in ranks]
            if len(ranks) < len(range(*r_range)):
                missing[id_] = (r_range[0] + len(ranks), r_range[1])
        return found, missing

    def extend_dict(self, ref_original, rf_addition):
        return {**ref_original, **{k: ref_original.get(k, []) + v for k, v in rf_addition.items()}}


def test_a_cache_written_for_zennit_crp_works_and_is_keyed_by_content(tmp_path):
    cache = MemoryCache()
    fv = mined(tmp_path, cache=cache)
    first = ask(fv, [0, 1], r_range=(0, 2))
    assert ask(fv, [0, 1], r_range=(0, 2)) == first and calls == [2, 2]
    ask(mined(tmp_path / "other", cache=cache, net=make_net(1)), 0, r_range=(0, 2))
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("method", ["save", "load", "extend_dict"])
def test_the_interface_says_what_is_missing(method):
    arguments = 2 if method == "extend_dict" else 8
    with pytest.raises(NotImplementedError, match=f"Cache does not implement Cache.{method}"):
        getattr(Cache(), method)(*[None] * arguments)


def test_cache_reference_decorates_methods_of_subclasses(tmp_path):
    class Mine(FeatureVisualization):
        @FeatureVisualization.cache_reference
        def get_max_reference(self, concept_ids, layer_name, mode="relevance", r_range=(0, 8), composite=None, rf=False,
                              plot_fn=pictures, batch_size=32, shade=0):  # fmt: skip
            asked.append(shade)
            found = super().get_max_reference(concept_ids, layer_name, mode, r_range, composite, rf, None, batch_size)
            return {concept_id: plot_fn(*tensors, rf, shade) for concept_id, tensors in found.items()}

    asked: list[int] = []
    fv = with_cache(tmp_path, cls=Mine)
    for shade in (7, 7, 8):
        assert len(fv.get_max_reference([0], "first", composite=EpsilonPlus(), shade=shade)[0]) == 8
    assert asked == [7, 8] and calls == [8, 8]
