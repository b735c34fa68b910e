"""Mining as a pipeline: one copy each way for a batch, shards written in the background, nothing lost or reordered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import LAYERS, Data, files_of, make_net, run, same_rows
from torch import Tensor
from torchvision.transforms import Normalize

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept, Concept
from crp.engine.kernel_calls import CallRecorder
from crp.engine.replayed import Replayed
from crp.engine.settings import Settings
from crp.types import AttributionResults
from crp.visualization.mining import batches, rows, writing
from crp.visualization.mining.preparation import Preparation
from crp.visualization.mining.run import SampleError
from crp.visualization.mining.transfers import Transfers, pack
from crp.visualization.mining.writing import ShardWriter
from crp.visualization.table import shards
from crp.visualization.table.manifest import ShardRecord
from crp.visualization.table.store import Table

# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[Transfers]:
    """All that mining makes."""
    made: list[Transfers] = []

    class Kept(Transfers):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr(batches, "Transfers", Kept)
    return made


@pytest.mark.parametrize("layers", [LAYERS[:1], LAYERS], ids=len)
@pytest.mark.parametrize("preprocess", [None, Normalize([0.5], [2.0])], ids=["plain", "normalized"])
def test_a_batch_is_copied_once_each_way(
    tmp_path: Path, transfers: list[Transfers], layers: tuple[str, ...], preprocess: Any
) -> None:
    layer_map = dict.fromkeys(layers, ChannelConcept())
    run(tmp_path, Data(21), batch_size=4, layer_map=layer_map, preprocess=preprocess)
    (made,) = transfers
    assert (made.to_device, made.to_host, made.waits) == (6, 6, 6)


def test_what_is_fetched_is_what_was_sent() -> None:
    transfers = Transfers(torch.device("cpu"))
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "floats": torch.randn(2, 3).t(),
        "doubles": torch.randn(3, 2, dtype=torch.float64),
        "ints": torch.arange(5, dtype=torch.int32),
        "nothing": torch.empty(0, 4),
        "longs": torch.tensor(7),
        "one of a row": torch.arange(6).reshape(2, 3)[:1, 0],
        "column": torch.arange(6.0).reshape(2, 3)[:, 1],
    }
    found = transfers.fetch(pack(tensors)).arrays()
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.numpy().dtype
        assert found[key].flags.aligned
        np.testing.assert_array_equal(found[key], tensor.numpy())


# --- the same table ---------------------------------------------------------------------------------------------------


class Ahead(Transfers):
    """Has three batches computed before it waits for the first, as on a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.batches_ahead = 3


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "Transfers", Ahead)


def with_gaps() -> Data:
    """Data of which some samples are skipped: one is not finite, one cannot be read, one has another shape."""
    data = Data(21)
    data.images[6, 0, 2, 2] = torch.inf
    data.special = {9: OSError("no file"), 13: (torch.zeros(1, 7, 7, dtype=torch.float64), 0)}
    return data


def kept(table: Table) -> dict[int, str]:
    return dict(table.coverage(0, 21).skipped)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*samples? (was|were) skipped")
def test_batches_ahead_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    settings: dict[str, Any] = {"shard_size": 8, "on_error": "skip"}
    plain = run(tmp_path / "plain", with_gaps(), **settings)
    assert sorted(kept(plain)) == [6, 9, 13]
    monkeypatch.setattr(batches, "Transfers", Ahead)
    table = run(tmp_path / "ahead", with_gaps(), **settings, num_workers=workers)
    assert files_of(table.path) == files_of(plain.path)


@pytest.mark.filterwarnings("ignore:.*samples? (was|were) skipped")
def test_data_that_is_not_finite_does_not_touch_the_other_rows(tmp_path: Path) -> None:
    data, clean = Data(21), Data(21)
    data.images[[1, 6, 7]] = torch.nan
    table = run(tmp_path / "gaps", data, shard_size=4, batch_size=4, fingerprints={"dataset": "one"})
    assert kept(table) == dict.fromkeys((1, 6, 7), "its data is not finite")
    reference = run(tmp_path / "clean", clean, shard_size=4, batch_size=4, fingerprints={"dataset": "one"})
    for layer in LAYERS:
        one, other = (made.column(layer, 0, "relevance") for made in (table, reference))
        chosen = ~np.isin(other.sample, [1, 6, 7])
        np.testing.assert_array_equal(one.sample, other.sample[chosen])
        np.testing.assert_allclose(one.value, other.value[chosen], rtol=1e-12)


@pytest.mark.usefixtures("ahead")
def test_shards_before_an_error_are_kept(tmp_path: Path) -> None:
    data = Data(21)
    data.special = {14: OSError("no file")}
    prints = {"dataset": "same"}
    with pytest.raises(SampleError, match="sample 14"):
        run(tmp_path / "run", data, shard_size=4, batch_size=4, fingerprints=prints)
    assert [(shard.start, shard.stop) for shard in Table.open(tmp_path / "run").shards] == [(0, 4), (4, 8), (8, 12)]
    table = run(tmp_path / "run", Data(21), shard_size=4, batch_size=4, fingerprints=prints)
    same_rows(table, run(tmp_path / "other", Data(21), shard_size=4, batch_size=4, fingerprints=prints))


# --- preparation ------------------------------------------------------------------------------------------------------


def halved(x: Tensor) -> Tensor:
    return x / 2


def by_maximum(x: Tensor) -> Tensor:
    return x / x.max()


def if_bright(x: Tensor) -> Tensor:
    return x / 255 if x.max() > 1 else x


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def first_only(x: Tensor) -> Tensor:
    return x[:1]


def same_maximum() -> Tensor:
    """Images whose maximum is 1, so that a function of it is the same for each of them and for all."""
    images = torch.rand(4, 1, 3, 3)
    images[:, 0, 0, 0] = 1.0
    return images


@pytest.mark.parametrize("function", [halved, Normalize([0.5], [2.0])], ids=["halved", "Normalize"])
def test_functions_of_each_sample_get_batches(function: Any) -> None:
    shapes = []

    def counted(x: Tensor) -> Tensor:
        shapes.append(len(x))
        found: Tensor = function(x)
        return found

    preparation, images = Preparation(counted), same_maximum()
    for batch in (images, images * 3, images[:1]):
        prepared = preparation.batch(batch)
        if len(batch) > 1:
            assert prepared is not None
            torch.testing.assert_close(prepared, torch.cat([function(x[None]) for x in batch]), rtol=0, atol=0)
    assert prepared is None  # (of one sample)
    assert shapes == [1] * 4 + [4, 4] + [1] * 4 + [4]


@pytest.mark.parametrize("function", [by_maximum, noisy], ids=["by_maximum", "noisy"])
def test_a_function_of_the_whole_batch_is_warned_of(function: Any) -> None:
    preparation, images = Preparation(function), same_maximum()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=f"preprocess '{function.__name__}' gives other numbers for a batch"):
        first = preparation.batch(images)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert first is not None
    torch.testing.assert_close(first, torch.cat([function(x[None]) for x in images]), rtol=0, atol=0)
    assert torch.equal(after, torch.rand(1))  # (the check takes no random numbers)
    assert preparation.batch(images) is None


@pytest.mark.parametrize("function", [if_bright, by_numpy, first_only], ids=["if_bright", "by_numpy", "first_only"])
def test_a_function_that_reads_values_gets_one_sample_at_a_time(function: Any) -> None:
    preparation, images = Preparation(function), same_maximum()
    first = preparation.batch(images)
    assert first is not None
    assert torch.equal(first, torch.cat([function(x[None]) for x in images]))
    assert preparation.batch(images) is None


def test_an_error_is_left_to_the_sample_that_causes_it() -> None:
    def refusing(x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            raise ValueError("not a number")
        return x

    images = same_maximum()
    images[2] = torch.nan
    assert Preparation(refusing).batch(images) is None


# --- the writer -------------------------------------------------------------------------------------------------------


def record_of(number: int) -> ShardRecord:
    return ShardRecord(f"{number}", "", number, number + 1, 0, {}, {})


def test_records_come_in_order_and_memory_is_bounded() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def slow(number: int) -> ShardRecord:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (5 - number % 5))
        with lock:
            running -= 1
        return record_of(number)

    found = []
    with ShardWriter() as writer:
        for number in range(20):
            found += writer.put(lambda number=number: slow(number))
            assert number + 1 - len(found) <= writing.THREADS
            found += writer.written()
        found += writer.written(wait=True)
    assert [record.start for record in found] == list(range(20))
    assert most == writing.THREADS


def test_an_error_surfaces_at_once_and_leaves_no_thread() -> None:
    def fails() -> ShardRecord:
        raise OSError("disk full")

    before, slow = threading.active_count(), threading.Event()
    with pytest.raises(OSError, match="disk full"), ShardWriter() as writer:
        list(writer.put(lambda: slow.wait(5) and record_of(0)))
        list(writer.put(fails))
        while not writer._writing[1].done():
            time.sleep(0.001)
        try:
            list(writer.written())  # (although the first one is not on disk yet)
        finally:
            slow.set()
    assert threading.active_count() == before


def test_a_slow_disk_loses_and_reorders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(tmp_path / "fast", Data(21), shard_size=4)
    write, order = rows.write_shard, iter((0.03, 0.0, 0.02, 0.0, 0.01, 0.0))

    def slow(*args: Any) -> ShardRecord:
        time.sleep(next(order))
        return write(*args)

    monkeypatch.setattr(rows, "write_shard", slow)
    table = run(tmp_path / "slow", Data(21), shard_size=4)
    assert [shard.start for shard in table.shards] == [0, 4, 8, 12, 16, 20]
    assert files_of(table.path) == files_of(reference.path)


def test_what_was_just_written_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = run(tmp_path, Data(21), shard_size=4)
    monkeypatch.setattr(shards, "hash_of", lambda path: pytest.fail(f"{path} is read again"))
    assert Table.open(table.path).damaged() == []
    damaged = table.path / "shards" / table.shards[0].file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    monkeypatch.undo()
    assert len(Table.open(table.path).verify()) == 1


# --- replays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("label", [3, 6]), ("all", [15, 18])],
    ids=["one target of a sample", "several targets of a sample"],
)
def test_a_later_run_replays_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str, expected: list[int]
) -> None:
    """What is scored is recorded with the attribution, and nothing else leaves a replay."""
    monkeypatch.setattr(CallRecorder, "runs_ahead", True)  # (else several targets share a forward pass)
    attribution, rules, layer_map = CondAttribution(make_net()), EpsilonPlus(), dict.fromkeys(LAYERS, ChannelConcept())
    attribution._replayed = Replayed(CallRecorder(2, cost=0))
    options: dict[str, Any] = {"attribution": attribution, "composite": rules, "layer_map": layer_map}
    replayed = []
    for name in ("first", "second"):
        table = run(tmp_path / name, Data(24), targets=targets, **options)
        replayed.append(attribution._replayed.replays.replayed - sum(replayed))
        reference = run(tmp_path / "reference", Data(24), targets=targets, overwrite=True)
        assert files_of(table.path) == files_of(reference.path)
    # (one batch, or one target of it, shows the shapes; two are computed before one is recorded)
    assert replayed == expected


class Turned(Concept):
    """Channels, counted from one of them, which may change."""

    first = 0

    def code(self, activation: Tensor) -> Tensor:
        return activation.roll(-self.first, 1)

    def relevance(self, activation: Tensor, multiplier: Tensor) -> Tensor:
        return self.code(activation * multiplier)

    def mask(self, batch_id: int, concept_ids: Any, layer_name: str | None = None) -> Any:
        return ChannelConcept.mask(batch_id, [(i + self.first) % 4 for i in concept_ids], layer_name)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("change", ["modes", "concept"])
def test_what_scores_otherwise_is_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, ahead: bool
) -> None:
    """Two runs of one attribution and one composite differ only in how concepts are scored."""
    monkeypatch.setattr(CallRecorder, "runs_ahead", ahead)
    concept: Any = Turned() if change == "concept" else ChannelConcept()
    attribution = CondAttribution(make_net())
    attribution._replayed = Replayed(CallRecorder(2, cost=0))
    options: dict[str, Any] = {"composite": EpsilonPlus(), "layer_map": {"conv": concept}, "modes": ["relevance"]}
    for turn in ("first", "again", "changed"):
        if turn == "changed":
            concept.first = 1
            options["modes"] = ["relevance", "activation"] if change == "modes" else ["relevance"]
        table = run(tmp_path / turn, Data(24), attribution=attribution, **options)
        same_rows(table, run(tmp_path / f"{turn} reference", Data(24), **options))
    assert attribution._replayed.replays.replayed > 6


def test_what_is_read_is_all_that_a_replay_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CallRecorder, "runs_ahead", True)  # (on a CPU, scores are computed outside)
    net, rules = make_net(), EpsilonPlus()
    attribution = CondAttribution(net)
    attribution._replayed = Replayed(CallRecorder(2, cost=0))
    data = torch.stack([Data(4)[index][0] for index in range(4)])
    read: Callable[[AttributionResults], Tensor] = lambda result: result.relevances["conv"].sum((2, 3))  # noqa: E731
    settings = Settings(["conv"], ChannelConcept.mask, None, None, None, exclude_parallel=False, reading=read)
    for number in range(6):
        call = attribution.plan(data * (number + 1), [{"y": [number % 3]}], rules, settings)
        (part,) = call.parts()
        exact = CondAttribution(net)(data * (number + 1), [{"y": [number % 3]}], rules, ["conv"])
        if part[0].reading is None:
            assert number < 3 and torch.equal(part[0].relevances["conv"], exact.relevances["conv"])
            continue
        assert not part[0].relevances and not part[0].activations
        torch.testing.assert_close(part[0].reading, read(exact), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(part[0].heatmap, exact.heatmap, rtol=1e-12, atol=1e-14)
    assert attribution._replayed.replays.replayed == 3
