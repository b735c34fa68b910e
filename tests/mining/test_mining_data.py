"""Datasets of all kinds, the classes whose relevance is recorded, samples of different sizes, and little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import LAYERS, Data, files_of, make_net, rows_of, run, same_rows
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.engine import backward as engine
from crp.engine.forward import ForwardPass
from crp.errors import InputError
from crp.layers import tracing
from crp.visualization import FeatureVisualization, Pairs
from crp.visualization.mining import loading
from crp.visualization.mining.datasets import Problem, Sample
from crp.visualization.mining.loading import as_batch, read_batches
from crp.visualization.mining.run import SampleError
from crp.visualization.mining.selection import select_layers
from crp.visualization.mining.targets import choose_targets, parse_targets
from crp.visualization.mining.text_batches import Asked
from crp.visualization.table.ranking import class_means, class_statistics


class Items:
    """Dataset whose items are made of those of `Data`."""

    def __init__(self, make: Any, n: int = 21) -> None:
        self.data, self.make = Data(n), make

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.make(*self.data[index])


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda x, y: {"pixels": x, "label": y, "id": "a"}, {"data": "pixels", "label": "label"}),
        (lambda x, y: ("id", x, y, 3), {"data": 1, "label": 2}),
        (lambda x, y: [y, x], {"data": -1, "label": 0}),
        (lambda x, y: (x.numpy(), y), {}),
        (lambda x, y: (x * 2, y), {"transform": lambda x: x / 2}),
        (lambda x, y: (x, y, "more"), {}),
    ],
    ids=["dict", "four", "reversed list", "array", "transform", "three"],
)
def test_items_of_all_kinds_are_mined_alike(tmp_path: Path, make: Any, fields: dict[str, Any]) -> None:
    same_rows(run(tmp_path / "a", Pairs(Items(make), **fields)), run(tmp_path / "b", Data()))


@pytest.mark.parametrize(("mode", "shape"), [("L", (1, 4, 5)), ("RGB", (3, 4, 5))])
def test_pictures_become_tensors(mode: str, shape: tuple[int, ...]) -> None:
    pixels = np.arange(20 * shape[0], dtype=np.uint8).reshape(4, 5, shape[0])
    picture = Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels, mode)
    data, label = Pairs([picture], None, None)[0]
    assert label is None
    assert torch.equal(data, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    assert data.shape == shape


@pytest.mark.parametrize(
    ("item", "fields", "match"),
    [
        ({"x": 1}, ("image", "y"), "has no data at 'image'; it has the keys 'x'"),
        ((torch.zeros(1),), (0, 1), "has no label at 1; it has 1 entries"),
        (3, (0, 1), "has no data at 0; it has an int without fields"),
        (torch.zeros(2, 4), (0, 1), "has no data at 0; it has a Tensor of shape .* without fields, which data=None"),
        (("text", 1), (0, 1), "the data is a str; a transform must make it a tensor"),
        ((Image.new("P", (2, 2)), 1), (0, 1), "an image of mode 'P' needs a transform"),
    ],
)
def test_items_that_are_no_pairs_are_told(item: Any, fields: tuple[Any, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        Pairs([item], *fields)[0]
    with pytest.raises(TypeError, match="int lacks one"):
        Pairs(3)


def test_a_dataloader_is_its_dataset(tmp_path: Path) -> None:
    table = run(tmp_path / "a", DataLoader(Data(), batch_size=3, shuffle=True))  # type: ignore[arg-type]
    assert files_of(table.path) == files_of(run(tmp_path / "b", Data()).path)
    with pytest.raises(TypeError, match="collate_fn"):
        run(tmp_path / "c", DataLoader(Data(), collate_fn=list))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": SubsetRandomSampler([1, 2])}, "SubsetRandomSampler"),
        ({"sampler": RandomSampler(range(21), num_samples=4)}, "RandomSampler"),
        ({"sampler": RandomSampler(range(21), replacement=True)}, "RandomSampler"),
        ({"sampler": [3, 4]}, "list"),
        ({"batch_sampler": [[3, 4], [5]]}, "list"),
    ],
    ids=["subset", "some", "again", "indices", "batches"],
)
def test_a_dataloader_that_chooses_samples_is_refused(tmp_path: Path, options: Any, named: str) -> None:
    with pytest.raises(
        TypeError, match=rf"chooses samples by a {named}, .* torch.utils.data.Subset\(dataset, indices\)"
    ):
        run(tmp_path, DataLoader(Data(), **options))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_preparation_that_works_in_place_reaches_no_sample_of_the_dataset(tmp_path: Path) -> None:
    def halved(data: Any) -> Any:
        return data.mul_(0.5)

    data, before = Data(), Data().images
    table = run(tmp_path / "a", data, preprocess=halved)
    assert torch.equal(data.images, before)
    expected = run(tmp_path / "b", Data(), preprocess=lambda data: data * 0.5)
    assert torch.equal(torch.tensor(table.column("fc", 0).value), torch.tensor(expected.column("fc", 0).value))


class Stream(IterableDataset[Any]):
    """It has a length, and inherits an index that does not work."""

    def __iter__(self) -> Any:
        raise AssertionError("no sample may be read")

    def __len__(self) -> int:
        return 21


class Reused(Data):
    """A dataset that gives the same memory for every sample."""

    def __getitem__(self, index: int) -> Any:
        data, label = super().__getitem__(index)
        if not hasattr(self, "memory"):
            self.memory = torch.empty_like(data)
        return self.memory.copy_(data), label


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_gives_the_same_memory_again(tmp_path: Path, workers: int) -> None:
    same_rows(run(tmp_path / "a", Reused(21), num_workers=workers), run(tmp_path / "b", Data()))


def test_samples_of_a_batch_lie_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {3: torch.zeros(3), 4: torch.zeros(2, 3, dtype=torch.float64), 5: torch.zeros(2, 3).to_sparse()}

    class Some:
        def __getitem__(self, index: int) -> Any:
            if index == 1:
                raise OSError("unreadable")
            return odd.get(index, torch.full((3, 2), float(index)).T), index

    (read,) = read_batches(Some(), [range(8)], 0)
    assert [sample.problem is None for sample in read] == [index != 1 for index in range(8)]
    assert all(torch.equal(read[index].data.to_dense(), odd[index].to_dense()) for index in odd)
    alike = [read[index].data for index in (0, 2, 6, 7)]
    batch = as_batch(alike)
    assert batch.data_ptr() == alike[0].data_ptr() and batch[:, 0, 0].tolist() == [0, 2, 6, 7]
    # (a first sample that is large says nothing of the others)
    monkeypatch.setattr(loading, "_MOST_BESIDE", 8 * 6 * 4 - 1)
    (apart,) = read_batches(Some(), [range(8)], 0)
    assert all(torch.equal(one.data.to_dense(), other.data.to_dense()) for one, other in zip(apart, read, strict=True))
    assert apart[0].data._base is None
    for others in (alike[::-1], alike[1:], [alike[0], alike[0]], [torch.ones(1), torch.zeros(1)]):
        assert torch.equal(as_batch(others), torch.stack(others))


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (Stream(), r"Stream is a stream, .* map-style dataset, with __len__ and __getitem__"),
        (DataLoader(Stream()), "Stream is a stream"),
        (iter(()), "iterator is a stream"),
        ({"train": [], "test": []}, r"a dict of 'train', 'test'; give one of them \(split="),
    ],
    ids=["stream", "loader of a stream", "generator", "splits"],
)
def test_streams_and_splits_are_refused_before_any_work(tmp_path: Path, dataset: Any, match: str) -> None:
    for refuse in (lambda data: run(tmp_path / "a", data), Pairs):
        with pytest.raises(TypeError, match=match):
            refuse(dataset)
    if "split" not in match and not hasattr(dataset, "__next__"):
        with pytest.raises(TypeError, match=match):
            FeatureVisualization(CondAttribution(make_net()), dataset, {})
    assert not (tmp_path / "a").exists()


def test_an_error_without_words_is_told_by_its_kind() -> None:
    assert [Problem.of(error).reason for error in (InputError(""), InputError("\n"), ValueError())] == [
        "InputError:", "InputError:", "ValueError:"
    ]  # fmt: skip


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("prediction", lambda out: [[int(row.argmax())] for row in out]),
        ("top-2", lambda out: [sorted(row.argsort(descending=True)[:2].tolist()) for row in out]),
        ("all", lambda out: [[0, 1, 2]] * len(out)),
        ([2, 0], lambda out: [[0, 2]] * len(out)),
        (np.array([2, 0]), lambda out: [[0, 2]] * len(out)),
        (torch.tensor([2, 0]), lambda out: [[0, 2]] * len(out)),
    ],
)
def test_targets_that_are_not_the_labels(tmp_path: Path, targets: Any, chosen: Any) -> None:
    expected = chosen(make_net()(Data().images))
    unlabelled = Data(21, [None] * 21)
    table = run(tmp_path / "a", unlabelled, targets=targets)
    assert rows_of(table) == [(i, t) for i, row in enumerate(expected) for t in row]
    same_rows(table, run(tmp_path / "b", Data(21, expected), single_targets=list))
    with pytest.raises(ValueError, match="other targets"):
        run(tmp_path / "a", unlabelled, targets=[1])


class Repeating(CondAttribution):
    """A ``__call__`` of its own: mining asks it for one target of each sample at a time."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


RAGGED = [[0, 1, 2], [1], [0, 2], [], [2, 1], [0], [1, 2, 0]]


@pytest.mark.parametrize("composite", [EpsilonPlus(), ZennitEpsilonPlus(), None], ids=["ours", "zennit", "gradient"])
@pytest.mark.parametrize(
    ("settings", "chosen_from"),
    [
        ({"targets": "all"}, 3),  # one sample of each of three batches tells how many there are
        ({"targets": "top-2"}, 11),
        ({"targets": [0, 2]}, 1),  # as many are compared with them
        ({"single_targets": list}, 0),
    ],
    ids=["all", "top-2", "list", "ragged labels"],
)
def test_targets_of_a_sample_share_its_forward_pass(
    tmp_path: Path, composite: Any, settings: dict[str, Any], chosen_from: int
) -> None:
    ragged = (RAGGED * 2)[:11]
    data, net = Data(11, ragged), make_net()
    counted: list[int] = []
    # (composites trace a model once)
    handle = net.conv.register_forward_hook(lambda module, args, output: counted.append(len(output) * (not tracing())))
    table = run(tmp_path / "a", data, attribution=CondAttribution(net), composite=composite, **settings)
    handle.remove()
    with_rows = sum(map(bool, ragged)) if "single_targets" in settings else 11
    assert sum(counted) == with_rows + chosen_from
    repeated = run(tmp_path / "b", data, attribution=Repeating(make_net()), composite=composite, **settings)
    assert table.n_rows > len(data)
    same_rows(table, repeated)


def test_of_equal_outputs_the_smaller_class_is_predicted() -> None:
    attribution = CondAttribution(nn.Sequential(nn.Linear(1, 5, bias=False)).eval())
    with torch.no_grad():
        attribution.model[0].weight[:, 0] = torch.tensor([0.0, 2, 1, 2, 2])
    data = torch.ones(1, 1)
    assert choose_targets("prediction", attribution, Asked.of(data, None)) == [[1]]
    assert choose_targets("top-2", attribution, Asked.of(data, None)) == [[1, 3]]
    assert choose_targets("top-9", attribution, Asked.of(data, None)) == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"output of shape \(2, classes\), not \(2, 3, 5\)"):
        choose_targets("prediction", attribution, Asked.of(torch.ones(2, 3, 1), None))


@pytest.mark.parametrize(
    "targets", ["top-0", "top", "labels", [], [-1], [1.0], [True], None, 3, np.array([-1]), np.ones(2)]
)
def test_targets_that_are_none(tmp_path: Path, targets: Any) -> None:
    with pytest.raises(ValueError, match="targets must be 'label', 'prediction', 'top-5', 'all', or a list"):
        parse_targets(targets)


def test_labels_of_two_classes_may_be_of_numpy(tmp_path: Path) -> None:
    flags = [i % 2 == 0 for i in range(6)]
    wanted = run(tmp_path / "a", Data(6, flags))
    found = run(tmp_path / "b", Data(6, [np.bool_(flag) for flag in flags]))
    same_rows(found, wanted)
    assert found.samples().label == wanted.samples().label == [1, 0, 1, 0, 1, 0]


def test_single_targets_are_for_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="single_targets is about labels"):
        run(tmp_path, Data(), targets="all", single_targets=list)


def test_a_target_beyond_the_outputs_is_told_of_the_first_sample(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="3"):
        run(tmp_path, Data(), targets=[3])


def test_labels_beyond_the_outputs_are_told_with_their_sample(tmp_path: Path) -> None:
    data = Data()
    data.special = {index: (data[index][0], 9) for index in range(3, len(data))}
    with pytest.raises(SampleError, match=r"^sample 3: target 9: .* the model has outputs 0 to 2"):
        run(tmp_path, data, start=0)
    with pytest.raises(IndexError, match=r"^sample 4, and each other of its batch: target 9: .* outputs 0 to 2"):
        run(tmp_path / "of all", data, start=4)


def test_a_sample_that_cannot_be_predicted_is_skipped(tmp_path: Path) -> None:
    data = Data()
    data.special = {5: OSError("gone"), 9: (torch.zeros(1, 5, 5).double(), None)}
    with pytest.raises(SampleError, match="sample 5: OSError: gone"):
        run(tmp_path, data, targets="prediction")
    with pytest.warns(UserWarning, match="2 samples were skipped"):
        table = run(tmp_path, data, targets="prediction", on_error="skip")
    assert list(table.coverage().skipped) == [5, 9]
    assert len(rows_of(table)) == 19


# --- shapes ---------------------------------------------------------------------------------------------------------


def make_pooled() -> nn.Module:
    torch.manual_seed(1)
    parts = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*parts).double().eval()


def test_samples_of_different_sizes(tmp_path: Path) -> None:
    attribution, data = CondAttribution(make_pooled()), Data(12)
    for i in (1, 4, 5, 10):
        image = torch.randn(1, 7 + i % 2, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        data.special[i] = (image, i % 3)
    data.special[7] = (torch.zeros(1, 2, 2).double(), 0)  # smaller than the kernel
    settings: dict[str, Any] = {"attribution": attribution, "layer_map": dict.fromkeys(["0", "1"], _concept())}
    with pytest.raises(SampleError, match=r"sample 1: its shape is \(1, 8, 8\)"):
        run(tmp_path / "same", data, **settings)
    with pytest.warns(UserWarning, match=r"sample 7: target 0: RuntimeError: .*[Kk]ernel size"):
        table = run(tmp_path / "mixed", data, mixed_shapes=True, on_error="skip", **settings)
    assert rows_of(table) == [(i, i % 3) for i in range(12) if i != 7]
    found = table.column("1", 2, "relevance", "max")
    for i, value, position in zip(found.sample, found.value, found.position, strict=True):
        image, label = data[int(i)]
        relevance = attribution(image[None], [{"y": label}], EpsilonPlus(), record_layer=["1"]).relevances["1"]
        np.testing.assert_allclose(value, relevance[0, 2].max(), rtol=1e-12, atol=1e-15)
        assert position == relevance[0, 2].flatten().argmax()
    with pytest.raises(ValueError, match="shapes"):
        run(tmp_path / "mixed", data, **settings)


def _concept() -> Any:
    from crp.concepts import ChannelConcept

    return ChannelConcept()


@pytest.mark.parametrize("cache", [False, True])
def test_a_table_without_labels_has_statistics_of_no_class(tmp_path: Path, cache: bool) -> None:
    table = run(tmp_path, Data(12, [None] * 12), modes=["activation"])
    of_concept = class_statistics(table, "conv", 1, "activation", cache=cache)
    assert [len(column) for column in of_concept] == [0, 0]
    means = class_means(table, "conv", "activation", cache=cache)
    assert means.value.shape == (0, table.n_concepts("conv")) and not len(means.targets) and not len(means.rows)


# --- memory ---------------------------------------------------------------------------------------------------------


class Small(CondAttribution):
    """Machine on which three rows are too many."""

    calls: tuple[int, ...] = ()

    def __call__(self, data: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += (len(data),)
        if len(data) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(data, *args, **kwargs)


def test_a_batch_that_does_not_fit_is_halved_once_for_all(tmp_path: Path) -> None:
    attribution = Small(make_net())
    with pytest.warns(UserWarning, match=r"8 rows at once failed \(OutOfMemoryError: CUDA out of memory\)") as caught:
        table = run(tmp_path / "small", Data(), attribution=attribution, batch_size=8)
    assert attribution.calls == (8, 4, 2, 2, 4, 2, 2, *[2] * 4, 2, 2, 1)
    assert len(caught) == 1
    same_rows(table, run(tmp_path / "all", Data(), batch_size=8))


@pytest.mark.parametrize(
    ("composite", "first", "learnt", "n_forward"),
    [
        (ZennitEpsilonPlus(), [(3, 1), (1, 1), (2, 1)], [(2, 1), (1, 1)] * 4, 8),
        (EpsilonPlus(), [(1, 4), *[(1, 2)] * 6], [(1, 2)] * 6, 2),
    ],
    ids=["zennit", "ours"],
)
def test_targets_go_in_parts_where_memory_does_not_suffice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    composite: Any,
    first: list[tuple[int, int]],
    learnt: list[tuple[int, int]],
    n_forward: int,
) -> None:
    """Memory for two rows. It holds all targets under zennit's composites, and under ours one after the other."""
    settings = {"composite": composite, "targets": "all", "shard_size": 4}
    whole = run(tmp_path / "all", Data(8), **settings)
    sent: list[tuple[int, ...]] = []  # (targets, samples) of each backward pass
    flow, forward = engine.flow, ForwardPass.run

    def limited(root: Tensor, cotangent: Tensor, *rest: Any) -> Any:
        sent.append(tuple(cotangent.shape[:2]))
        if cotangent.shape[0] * cotangent.shape[1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return flow(root, cotangent, *rest)

    forwards: list[int] = []
    monkeypatch.setattr(engine, "flow", limited)
    monkeypatch.setattr(ForwardPass, "run", lambda *given: forwards.append(len(sent)) or forward(*given))
    with pytest.warns(UserWarning, match=r"rows at once failed \(OutOfMemoryError: CUDA out of memory\)") as caught:
        table = run(tmp_path / "small", Data(8), **settings)
    assert len(caught) == 1
    assert sent[: len(first)] == first
    # What the first batch of four samples taught holds for the second one.
    assert sorted(sent[-len(learnt) :]) == sorted(learnt)
    assert len([place for place in forwards if place >= len(sent) - len(learnt)]) == n_forward
    same_rows(table, whole)


KINDS = {
    "alike": ([torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)], True),
    "of other lengths": ([torch.arange(3), torch.empty(0, dtype=torch.int64), torch.arange(5)], True),
    "of other shapes": ([torch.randn(2, 3), torch.randn(4), torch.tensor(7.0), torch.randn(3, 2).t()], True),
    "of other dtypes": ([torch.randn(2), torch.arange(2)], False),
    "sparse": ([torch.eye(3).to_sparse(), torch.eye(2).to_sparse()], False),
    "none": ([], False),
}


@pytest.mark.parametrize(("tensors", "together"), KINDS.values(), ids=KINDS)
def test_samples_come_from_a_worker_in_one_piece(tensors: list[Tensor], together: bool) -> None:
    samples = [Sample(i, one, i % 2, None, 11 + i, 12) for i, one in enumerate(tensors)]
    samples.insert(1, Sample(9, torch.empty(0), None, Problem("it cannot be read")))
    packed = loading._pack(samples)
    assert (packed[1] is not None) == together
    found = loading._unpack(packed)
    assert [one._replace(data=samples[0].data) for one in found] == [
        one._replace(data=samples[0].data) for one in samples
    ]
    for one, sample in zip(found, samples, strict=True):
        assert one.data.dtype == sample.data.dtype and torch.equal(one.data.to_dense(), sample.data.to_dense())


# --- layers ---------------------------------------------------------------------------------------------------------


def test_layers_are_chosen_by_name_pattern_and_type() -> None:
    net = nn.Sequential()
    net.add_module("layer1", nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    net.add_module("layer10", nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten()))
    net.add_module("fc", nn.Linear(2, 2))
    assert select_layers(net, ["fc", "layer1"]) == ["layer1", "fc"]
    assert select_layers(net, ["layer1.*"]) == ["layer1.0", "layer1.1"]
    assert (
        select_layers(net, ["Conv2d", nn.Linear])
        == select_layers(net, ["fc", "*.0"])
        == ["layer1.0", "layer10.0", "fc"]
    )
    assert select_layers(net, ["_ConvNd"]) == ["layer1.0", "layer10.0"]
    net.add_module("ReLU", nn.Linear(2, 2))
    assert select_layers(net, ["ReLU"]) == ["ReLU"]  # a name, before all else
    for unknown in ("layer2.*", "Conv1d", nn.GELU, "Module"):
        with pytest.raises(KeyError, match="not found in model"):
            select_layers(net, [unknown])


def test_all_names_of_the_net() -> None:
    assert select_layers(make_net(), LAYERS) == list(LAYERS)
