from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import LAYERS, Data, files_of, make_net, rows_of, run, same_rows, shards_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon, ZPlus

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept, Concept
from crp.errors import InputError
from crp.visualization.mining import rows as shard_rows
from crp.visualization.mining import writing
from crp.visualization.mining.job import prepare
from crp.visualization.mining.run import SampleError, mine_shard
from crp.visualization.mining.targets import to_targets
from crp.visualization.table.lock import locked
from crp.visualization.table.ranking import class_means, list_targets, top_k
from crp.visualization.table.store import Table, TableLockedError, TableMismatchError

# --- what is recorded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", [EpsilonPlus(), ZennitEpsilonPlus(), None], ids=["ours", "zennit", "gradient"])
def test_a_row_is_the_scores_of_one_attribution(tmp_path: Path, composite: Any) -> None:
    data, attribution = Data(), CondAttribution(make_net())
    table = run(tmp_path, data, composite=composite)
    assert table.layers == LAYERS
    assert rows_of(table) == [(i, i % 3) for i in range(21)]
    for i in (0, 7, 20):
        result = attribution(data.images[i : i + 1], [{"y": [i % 3]}], composite, record_layer=LAYERS)
        for mode, recorded in (("relevance", result.relevances), ("activation", result.activations)):
            for layer in LAYERS:
                flat = recorded[layer].flatten(2) if recorded[layer].dim() > 2 else recorded[layer][..., None]
                columns = {kind: next(table.blocks(layer, mode, kind, samples=[i])) for kind in ("sum", "max")}
                np.testing.assert_allclose(columns["sum"].value[0], flat.sum(-1)[0], rtol=1e-12, atol=1e-14)
                np.testing.assert_allclose(columns["max"].value[0], flat.max(-1).values[0], rtol=1e-12, atol=1e-14)
                if mode == "activation":
                    assert columns["max"].position[0].tolist() == flat.argmax(-1)[0].tolist()
    assert table.column("conv", 0).value.dtype == np.float64


def test_ranks_are_those_of_reference_sampling_over_all_samples(tmp_path: Path) -> None:
    data = Data()
    table = run(tmp_path, data)
    conditions = [{"y": [label]} for label in data.labels]
    result = CondAttribution(make_net())(data.images, conditions, EpsilonPlus(), record_layer=LAYERS)
    for mode, recorded in (("relevance", result.relevances), ("activation", result.activations)):
        for kind in ("sum", "max"):
            for normed in (True, False):
                expected = ChannelConcept().reference_sampling(recorded["relu"], "relu", kind, normed)
                found = top_k(table, "relu", mode, kind, normed, k=10)
                np.testing.assert_allclose(found.value, expected[1][:10], rtol=1e-10, atol=1e-13)
                clear = (expected[1][:10] - expected[1][1:11]).abs().min(0).values > 1e-9  # no ties
                assert clear.any()
                assert found.sample[:, clear].tolist() == expected[0][:10, clear].tolist()


def test_results_do_not_depend_on_batches_and_shards(tmp_path: Path) -> None:
    reference = run(tmp_path / "reference", Data())
    for batch_size, shard_size in ((1, 21), (5, 5), (20, 20), (64, None)):
        table = run(tmp_path / f"{batch_size}", Data(), batch_size=batch_size, shard_size=shard_size)
        same_rows(table, reference)
    assert len(table.shards) == 1
    dead = make_net()
    with torch.no_grad():
        dead.conv.weight[2], dead.conv.bias[2], dead.bn.weight[2], dead.bn.bias[2] = 0, 0, 0, 0
    tops = [
        top_k(run(tmp_path / f"dead{size}", Data(), attribution=CondAttribution(dead), batch_size=size), "relu", k=5)
        for size in (5, 20)
    ]
    assert tops[0].sample[:, 2].tolist() == tops[1].sample[:, 2].tolist() == [0, 1, 2, 3, 4]


def test_two_ranges_make_one_table(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Data())
    run(tmp_path / "parts", Data(), start=9)
    assert Table.open(tmp_path / "parts").coverage().missing == [(0, 9)]
    parts = run(tmp_path / "parts", Data(), start=2, stop=12)
    assert parts.coverage().missing == [(0, 2)]
    same_rows(run(tmp_path / "parts", Data(), stop=2), whole)


@pytest.mark.parametrize("n", [1, 5, 9, 16, 17])
def test_a_last_batch_of_any_size(tmp_path: Path, n: int) -> None:
    assert rows_of(run(tmp_path, Data(n))) == [(i, i % 3) for i in range(n)]


def test_several_targets_and_none(tmp_path: Path) -> None:
    labels = [[0, 2], [], [1], [2, 0, 2], [np.int64(1)], [0, 1, 2], [torch.tensor(2)], [], []]
    table = run(tmp_path, Data(9, labels), single_targets=lambda label: label)
    assert rows_of(table) == [(0, 0), (0, 2), (2, 1), (3, 0), (3, 2), (4, 1), (5, 0), (5, 1), (5, 2), (6, 2)]
    assert list_targets(table).tolist() == [0, 1, 2]
    assert class_means(table, "fc", "activation").rows.tolist() == [3, 3, 4]
    assert table.coverage().skipped == {}
    assert sorted(top_k(table, "relu", "activation").sample[:, 0].tolist()) == [0, 2, 3, 4, 5, 6]
    single = run(tmp_path / "single", Data(9, [row[0] if row else 0 for row in labels]))
    column = single.column("relu", 1)
    first = table.column("relu", 1)
    np.testing.assert_allclose(first.value[[0, 2, 5]], column.value[[0, 2, 4]], rtol=1e-12)


def test_no_targets_at_all(tmp_path: Path) -> None:
    table = run(tmp_path, Data(9), single_targets=lambda _: [])
    assert table.n_rows == 0
    assert table.coverage() == ([(0, 9)], {}, [])
    with pytest.raises(ValueError, match="has no rows"):
        top_k(table, "relu")


def test_labels_may_be_missing_where_only_activations_are_asked(tmp_path: Path) -> None:
    labelled = run(tmp_path / "labelled", Data(9))
    table = run(tmp_path / "none", Data(9, [None] * 9), modes=["activation"], kinds=["sum"])
    assert (table.modes, table.kinds) == (("activation",), ("sum",))
    assert rows_of(table) == [(i, -1) for i in range(9)]
    np.testing.assert_allclose(
        table.column("conv", 1, "activation").value, labelled.column("conv", 1, "activation").value, rtol=1e-12
    )
    with pytest.raises(SampleError, match="sample 0: label None is no integer class"):
        run(tmp_path / "relevance", Data(9, [None] * 9))


@pytest.mark.parametrize(
    ("label", "expected"),
    [(3, [3]), (np.int32(3), [3]), (torch.tensor(3), [3]), (torch.tensor([3]), [3]), (16777217, [16777217])],
)
def test_labels(label: Any, expected: list[int]) -> None:
    assert to_targets(label, None, True) == expected


@pytest.mark.parametrize("label", [1.0, "3", torch.tensor([1, 2]), torch.tensor(1.5), np.array([0, 1]), [1], -1, 2**63])
def test_labels_that_are_no_class(label: Any) -> None:
    with pytest.raises(InputError, match="class"):
        to_targets(label, None, True)


def test_preprocess_that_needs_one_sample_at_a_time(tmp_path: Path) -> None:
    shapes = []

    def by_maximum(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x / x.abs().max()

    prepared = Data()
    prepared.images = prepared.images / prepared.images.abs().amax((1, 2, 3), keepdim=True)
    with pytest.warns(UserWarning, match="preprocess 'by_maximum' gives other numbers for a batch"):
        table = run(tmp_path / "a", Data(), preprocess=by_maximum, fingerprints={"preprocess": "by maximum"})
    assert table.fingerprints["preprocess"] == "by maximum"
    same_rows(table, run(tmp_path / "b", prepared))
    assert {shape[1:] for shape in shapes} == {(1, 6, 6)}
    assert sum(shape[0] > 1 for shape in shapes) == 2  # (one batch, and one of other scales, decided)


class Half(Concept):
    """Custom concept with only what zennit-crp asked for: the channels' halves."""

    def reference_sampling(self, relevance, layer_name=None, max_target="sum", abs_norm=True):
        flat = relevance.reshape(len(relevance), 2, -1)
        value = flat.sum(-1) if max_target == "sum" else flat.max(-1).values
        value, order = value.sort(0, descending=True)
        return order, value, flat.argmax(-1).gather(0, order)


def test_a_custom_concept_is_recorded(tmp_path: Path) -> None:
    data = Data()
    table = run(tmp_path, data, composite=None, layer_map={"conv": Half(), "fc": ChannelConcept()})
    activation = make_net().conv(data.images).detach().reshape(21, 2, -1)
    assert (table.n_concepts("conv"), table.n_concepts("fc")) == (2, 3)
    np.testing.assert_allclose(table.column("conv", 1, "activation").value, activation[:, 1].sum(-1), rtol=1e-12)
    assert table.column("conv", 0, "activation", "max").position.tolist() == activation[:, 0].argmax(-1).tolist()


def test_positions_beyond_16_bits(tmp_path: Path) -> None:
    class Last(ChannelConcept):
        def scores(self, relevance, layer_name=None):
            scores = super().scores(relevance, layer_name)
            return scores._replace(position=torch.full_like(scores.position, 70_000))

    table = run(tmp_path, Data(3), layer_map={"conv": Last()})
    assert table.column("conv", 0).position.tolist() == [70_000] * 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 on, where other threads live
def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    data = Data(9, [[0, 1]] * 9)
    data.special = {4: (torch.zeros(1, 5, 5).double(), [1]), 6: OSError("broken")}
    settings: dict[str, Any] = {"single_targets": list, "on_error": "skip"}
    tables = []
    for num_workers in (0, 2):
        with pytest.warns(UserWarning, match="2 samples were skipped"):
            tables.append(run(tmp_path / str(num_workers), data, num_workers=num_workers, **settings))
    assert files_of(tables[0].path) == files_of(tables[1].path)


def test_samples_are_read_one_after_the_other(tmp_path: Path) -> None:
    data = Data()
    reads: list[tuple[int, int]] = []

    class Stateful:
        def __len__(self) -> int:
            return 21

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.current = index
            image = data.images[self.current]
            reads.append((index, self.current))
            return image, self.current % 3

    attribution = CondAttribution(make_net())
    random_state = torch.get_rng_state()
    table = run(tmp_path / "stateful", Stateful(), attribution=attribution)
    assert [index for index, _ in reads[-21:]] == list(range(21))
    assert (torch.get_rng_state() == random_state).all()
    same_rows(table, run(tmp_path / "plain", data))


# --- samples with problems ----------------------------------------------------------------------------

BROKEN: dict[str, tuple[Any, str]] = {
    "raises": (OSError("truncated"), "OSError: truncated"),
    "other shape": ((torch.zeros(1, 5, 6).double(), 0), r"its shape is \(1, 5, 6\), torch.float64; .* \(1, 6, 6\)"),
    "other type": ((torch.zeros(1, 6, 6), 0), r"its shape is \(1, 6, 6\), torch.float32"),
    "no pair": ((torch.zeros(1, 6, 6).double(),), r"the dataset gives 1 entries, not a pair \(tensor, label\)"),
    "a dict": ({"image": 1}, "the dataset gives a dict, not a pair"),
    "no tensor": (
        (np.zeros((1, 6, 6)), 0),
        r"the dataset gives \(..., label\) with an ndarray .*, not a tensor",
    ),
    "negative label": ((torch.zeros(1, 6, 6).double(), -1), "target -1 is no class"),
    "float label": ((torch.zeros(1, 6, 6).double(), 1.0), "label 1.0 is no integer class"),
    "label beyond the outputs": ((torch.zeros(1, 6, 6).double(), 3), "target 3: .*3"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("where", [13, 20])
def test_a_sample_with_a_problem(
    tmp_path: Path, name: str, where: int, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    sample, reason = BROKEN[name]
    data, attribution = Data(), CondAttribution(make_net())
    data.special = {where: sample}
    with untouched(attribution.model), pytest.raises(SampleError, match=rf"^sample {where}: {reason}") as caught:
        run(tmp_path, data, attribution=attribution)
    assert caught.value.index == where
    kept = Table.open(tmp_path)
    assert kept.coverage().seen == [(0, 8 * (where // 8))]
    assert kept.verify() == []
    with pytest.warns(UserWarning, match=rf"1 sample was skipped \(sample {where}: {reason}"):
        table = run(tmp_path, data, attribution=attribution, on_error="skip")
    assert rows_of(table) == [(i, i % 3) for i in range(21) if i != where]
    assert list(table.coverage().skipped) == [where]
    reference = run(tmp_path / "reference", Data())
    keep = np.arange(21) != where
    np.testing.assert_allclose(table.column("relu", 1).value, reference.column("relu", 1).value[keep], rtol=1e-12)


@pytest.mark.parametrize(
    ("error", "text"),
    [("truncated", "a/13.png: OSError: truncated"), ("a/13.png is cut off", "OSError: a/13.png is cut off")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, error: str, text: str) -> None:
    data: Any = Data()
    data.root, data.samples = "photos", [(f"photos/a/{i}.png", i % 3) for i in range(21)]
    data.special = {13: OSError(error)}
    with pytest.warns(UserWarning, match="1 sample was skipped"):
        table = run(tmp_path, data, on_error="skip")
    assert table.coverage().skipped == {13: text}


def test_where_no_sample_can_be_read_the_option_to_skip_them_is_not_advised_again(tmp_path: Path) -> None:
    data: Any = Data()
    data.special = dict.fromkeys(range(21), OSError("gone"))
    with pytest.raises(SampleError, match=r"^sample 0: OSError: gone; on_error='skip'"):
        run(tmp_path, data)
    with pytest.raises(ValueError, match=r"^none of the first 21 samples can be read; sample 0: OSError: gone$"):
        run(tmp_path, data, on_error="skip")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_data_that_is_not_finite_is_never_ranked(tmp_path: Path, value: float) -> None:
    data = Data()
    data.images[13, 0, 2, 3] = value
    with pytest.warns(UserWarning, match="sample 13: its data is not finite"):
        table = run(tmp_path, data)
    assert table.coverage().skipped == {13: "its data is not finite"}
    assert 13 not in top_k(table, "relu").sample


def test_scores_that_are_not_finite_are_never_ranked(tmp_path: Path) -> None:
    data = Data(9, [[0, 1]] * 9)
    data.images[[5, 8]] *= 1e200  # (the last shard holds sample 8 alone, so that it has no rows)

    class Cubed(ChannelConcept):
        def scores(self, relevance, layer_name=None):
            return super().scores(relevance**3, layer_name)

    skipped = pytest.warns(UserWarning, match="2 samples were skipped")
    with skipped, pytest.warns(UserWarning, match=r"Cubed\(\) contradicts itself"):
        table = run(tmp_path, data, layer_map={"relu": Cubed()}, single_targets=list)
    assert "at layer 'relu' is not finite" in table.coverage().skipped[5]
    again = Table.open(tmp_path)
    assert (again.coverage(), again.verify()) == (table.coverage(), [])
    assert rows_of(again) == [(i, t) for i in range(9) if i not in (5, 8) for t in (0, 1)]


def test_relevance_in_other_numbers_is_not_mixed_with_that_of_the_model(tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        table = run(tmp_path, Data(), stop=8)
        assert table.header.recipe["precision"] == "autocast to torch.bfloat16"
        assert not run(tmp_path, Data()).coverage().missing
    for other in (nullcontext(), torch.autocast("cpu", torch.float16)):
        with other, pytest.raises(TableMismatchError, match=r"another precision \(precision autocast to"):
            run(tmp_path, Data())


@pytest.mark.parametrize("autocast", [False, True], ids=["model", "autocast"])
def test_relevance_that_is_lost_in_float16_is_told_once(tmp_path: Path, autocast: bool) -> None:
    net, data = make_net(), Data()
    with torch.no_grad():
        net.fc.weight[0] *= 1e-6
    net, data.images = (net.float(), data.images.float()) if autocast else (net.half(), data.images.half())
    lost = "relevance of layer 'conv' is below 6e-05 for some samples, where float16 has few digits left"
    for target, told in ((0, [lost]), (1, [])):
        with warnings.catch_warnings(record=True) as found, torch.autocast("cpu", torch.float16, enabled=autocast):
            warnings.simplefilter("always")
            run(tmp_path / str(target), data, attribution=CondAttribution(net), targets=[target])
        assert [str(warning.message).partition(", or none")[0] for warning in found] == told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "double", Data(), attribution=CondAttribution(net.double()), targets=[0])


def test_errors_of_the_users_functions_are_theirs(tmp_path: Path) -> None:
    def single_targets(label: int) -> Iterable[int]:
        if label == 2:
            raise NotImplementedError("no such label")
        return [label]

    with pytest.raises(SampleError, match="sample 2: NotImplementedError: no such label") as caught:
        run(tmp_path / "a", Data(), single_targets=single_targets)
    assert isinstance(caught.value.__cause__, NotImplementedError)

    def preprocess(x: Tensor) -> Tensor:
        return x / 0 if float(x[0, 0, 0, 0]) == float(Data().images[9, 0, 0, 0]) else x

    with pytest.warns(UserWarning, match="sample 9: its data is not finite"):
        run(tmp_path / "b", Data(), preprocess=preprocess)


def test_an_error_of_all_samples_is_not_theirs(
    tmp_path: Path, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    class Broken(ChannelConcept):
        def scores(self, relevance, layer_name=None):
            raise ZeroDivisionError("a bug")

    attribution = CondAttribution(make_net())
    for on_error in ("stop", "skip"):
        with untouched(attribution.model), pytest.raises(ZeroDivisionError, match="a bug"):
            run(tmp_path, Data(), attribution=attribution, layer_map={"conv": Broken()}, on_error=on_error)


def test_a_layer_that_the_forward_pass_does_not_use(tmp_path: Path) -> None:
    net = make_net()
    net.flat.unused = nn.Linear(2, 2).eval()
    with (
        pytest.warns(UserWarning, match="not called"),
        pytest.raises(ValueError, match=r"layer 'flat\.unused' gives no relevance: the forward pass does not use it"),
    ):
        run(tmp_path, Data(), attribution=CondAttribution(net), layer_map={"flat.unused": ChannelConcept()})


def test_where_memory_does_not_suffice_batches_are_halved(tmp_path: Path) -> None:
    class Small(CondAttribution):
        def __call__(self, data: Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(data) > 2:
                raise torch.OutOfMemoryError("too large")
            return super().__call__(data, *args, **kwargs)

    with pytest.warns(UserWarning, match=r"4 rows at once failed \(OutOfMemoryError: too large\) .*; lower batch_size"):
        table = run(tmp_path / "small", Data(), attribution=Small(make_net()))
    same_rows(table, run(tmp_path / "all", Data()))


def test_skipped_samples_are_tried_again_on_demand(tmp_path: Path) -> None:
    data = Data()
    data.special = {13: OSError("not mounted")}
    with pytest.warns(UserWarning, match="1 sample was skipped"):
        run(tmp_path / "a", data, on_error="skip")
    data.special = {}
    data.read.clear()
    assert list(run(tmp_path / "a", data).coverage().skipped) == [13]
    table = run(tmp_path / "a", data, retry_skipped=True)
    assert data.read[-8:] == list(range(8, 16))
    assert files_of(table.path) == files_of(run(tmp_path / "b", Data()).path)


# --- interruption and resumption ----------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    prints = {"dataset": "the same"}  # (so that none is read to tell)
    run(tmp_path / "reference", Data(), fingerprints=prints)
    data, attribution = Data(), CondAttribution(make_net())
    for where in (3, 11, 20):
        data.special = {where: KeyboardInterrupt()}
        with untouched(attribution.model), pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", data, attribution=attribution, fingerprints=prints)
        assert Table.open(tmp_path / "a").coverage().missing == [(8 * (where // 8), 21)]
        assert not list((tmp_path / "a").glob("lock-*"))
    data.special = {}
    data.read.clear()
    run(tmp_path / "a", data, fingerprints=prints)
    assert data.read == [0, *range(16, 21)]  # the first tells the shape
    assert files_of(tmp_path / "a") == files_of(tmp_path / "reference")
    data.read.clear()
    run(tmp_path / "a", data, fingerprints=prints)
    assert data.read == [0]


def test_a_damaged_or_missing_shard_is_mined_again(tmp_path: Path) -> None:
    table = run(tmp_path, Data())
    before = files_of(tmp_path)
    first, second, _ = (tmp_path / "shards" / shard.file for shard in table.shards)
    first.write_bytes(first.read_bytes()[:-1] + b"\x01")
    second.unlink()
    with pytest.warns(UserWarning, match="its samples are mined again") as caught:
        run(tmp_path, Data())
    assert [name in str(w.message) for w, name in zip(caught, (first.name, second.name), strict=True)] == [True, True]
    assert files_of(tmp_path) == before


def test_full_shards_are_closed_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(tmp_path / "reference", Data(40), shard_size=32)
    sizes = []
    write = shard_rows.write_shard

    def counted(*args: Any) -> Any:
        sizes.append(sum(part.nbytes for parts in args[4].values() for part in parts))
        return write(*args)

    monkeypatch.setattr(shard_rows, "write_shard", counted)
    monkeypatch.setattr(writing, "SHARD_BYTES", 4500)
    table = run(tmp_path / "small", Data(40), shard_size=32)
    assert [(s.start, s.stop) for s in table.shards] == [(0, 12), (12, 24), (24, 32), (32, 40)]
    assert max(sizes) < 2 * 4500
    same_rows(table, reference)
    data = Data(40)
    data.special = {20: KeyboardInterrupt()}
    prints = {"dataset": reference.fingerprints["dataset"]}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", data, shard_size=32, fingerprints=prints)
    run(tmp_path / "again", Data(40), shard_size=32)
    assert shards_of(files_of(tmp_path / "again")) == shards_of(files_of(tmp_path / "small"))


def test_shards_mined_apart_make_the_same_table(tmp_path: Path) -> None:
    reference = run(tmp_path / "reference", Data())
    settings: dict[str, Any] = {"batch_size": 4, "shard_size": 8}
    layer_map = dict.fromkeys(reversed(LAYERS), ChannelConcept())
    job = prepare(CondAttribution(make_net()), Data(), layer_map, EpsilonPlus(), tmp_path / "a", **settings)
    table = Table.create(tmp_path / "a", job.header)
    records = [record for start, stop in ((16, 21), (0, 8), (8, 16), (0, 8)) for record in mine_shard(job, start, stop)]
    assert records[1] == records[3]
    assert table.adopt() == 3
    assert files_of(tmp_path / "a") == files_of(tmp_path / "reference")
    assert table.digest == reference.digest


@pytest.mark.timeout(0)
def test_killed_at_random_and_while_writing(tmp_path: Path) -> None:
    script = Path(__file__).parent / "kill_mining.py"
    paths = [str(script.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, str(script), str(tmp_path), "2"], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["kills"] == 2 and report["at writes"] == 8


# --- refusals -----------------------------------------------------------------------------------------


def test_another_model_composite_dataset_or_function_is_refused(tmp_path: Path) -> None:
    data = Data()
    run(tmp_path, data, stop=8, composite=NameMapComposite([(["conv"], Epsilon())]))
    before = files_of(tmp_path)
    other = Data()
    other.images[0] += 1
    epsilon = NameMapComposite([(["conv"], Epsilon())])
    one_layer = {"conv": ChannelConcept()}
    changes: list[tuple[str, Any, dict[str, Any]]] = [
        ("another composite", data, {"composite": NameMapComposite([(["conv"], ZPlus())])}),
        ("another composite", data, {"composite": NameMapComposite([(["conv"], Epsilon(1e-3))])}),
        ("another model", data, {"composite": epsilon, "attribution": CondAttribution(make_net(5))}),
        ("another dataset", other, {"composite": epsilon}),
        ("another preprocess", data, {"composite": epsilon, "preprocess": lambda x: x}),
        ("other single_targets", data, {"composite": epsilon, "single_targets": lambda label: [label]}),
        ("other layers", data, {"composite": epsilon, "layer_map": one_layer}),
        ("other layers and another preprocess", data,
         {"composite": epsilon, "layer_map": one_layer, "preprocess": lambda x: x}),
    ]  # fmt: skip
    for what, dataset, change in changes:
        with pytest.raises(TableMismatchError, match=rf"was mined with {what}( \(|:)"):
            run(tmp_path, dataset, **change)
    with pytest.raises(TableMismatchError, match="modes"):
        run(tmp_path, data, composite=epsilon, modes=["activation"])
    assert files_of(tmp_path) == before
    table = run(tmp_path, other, composite=epsilon, overwrite=True)
    assert table.coverage().seen == [(0, 21)]
    same_rows(table, run(tmp_path / "fresh", other, composite=epsilon))
    assert files_of(tmp_path / "fresh") == {k: v for k, v in files_of(tmp_path).items() if not k.startswith("fresh")}


def test_a_second_run_into_the_folder_fails(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TableLockedError, match=str(os.getpid())):
        run(tmp_path, Data())
    assert not Table.exists(tmp_path)
    run(tmp_path, Data())


class Empty:
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> None:
        raise IndexError(index)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"layer_map": {"convv": ChannelConcept()}}, KeyError, r"<layer_map> 'convv' not found .*'conv'"),
        ({"layer_map": {}}, ValueError, "layer_map must map layers"),
        ({"layer_map": ["conv"]}, ValueError, "layer_map must map layers"),
        ({"layer_map": {"conv": ChannelConcept}}, TypeError, r"layer_map\['conv'\] must be a concept"),
        ({"composite": "epsilon_plus"}, TypeError, "composite must be None, or a composite of .* not 'eps"),
        ({"start": 5, "stop": 5}, ValueError, "the range 5 to 5 must be within the dataset, 0 to 21, and not empty"),
        ({"stop": 22}, ValueError, "the range 0 to 22"),
        ({"start": -1}, ValueError, "the range -1 to 21"),
        ({"start": 1.0}, ValueError, "the range 1.0 to 21"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1, not 0"),
        ({"shard_size": -1}, ValueError, "shard_size must be a whole number of at least 1, not -1"),
        ({"shard_size": 0}, ValueError, "shard_size must be a whole number of at least 1, not 0"),
        ({"num_workers": -1}, ValueError, "num_workers must be a whole number of at least 0, not -1"),
        ({"modes": "relevance"}, ValueError, "modes must be among 'relevance', 'activation'; not 'relevance'"),
        ({"modes": []}, ValueError, "modes must be among"),
        ({"kinds": ["mean"]}, ValueError, r"kinds must be among 'sum', 'max'; not \['mean'\]"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of 'stop', 'skip', not 'ignore'"),
        ({"preprocess": lambda x: x[0, 0, 0]}, TypeError, r"preprocess must make a sample of shape \(1, ...\)"),
        ({"preprocess": lambda x: None}, TypeError, "not None"),
        ({"data": 3}, TypeError, "the dataset needs __len__ and __getitem__; int lacks one"),
        ({"data": Empty()}, ValueError, "the dataset is empty"),
        (
            {"data": [(np.zeros((1, 6, 6)), 0)]},
            TypeError,
            "sample 0: the dataset gives .* ndarray .*, not a tensor",
        ),
        ({"data": [(torch.zeros(1, 6, 6), 0, 1)]}, TypeError, "sample 0: the dataset gives 3 entries, not a pair"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        run(tmp_path / "table", changes.pop("data", Data()), **changes)
    assert not (tmp_path / "table").exists()


def test_progress_shows_rate_and_remaining_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, Data(), stop=8)
    assert capfd.readouterr() == ("", "")
    run(tmp_path, Data(), progress=True)
    shown = capfd.readouterr().err
    assert "Mining" in shown and "8/21" in shown and "21/21" in shown and "sample/s" in shown


@pytest.mark.parametrize("composite", [EpsilonPlus(), ZennitEpsilonPlus(), None], ids=["ours", "zennit", "gradient"])
def test_activations_alone_need_no_backward_pass(tmp_path: Path, composite: Any) -> None:
    """Nor the forward passes of rules."""
    same = {"composite": composite, "attribution": CondAttribution(make_net())}
    both = run(tmp_path / "both", Data(9), **same)
    calls: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[func.overloadpacket._qualified_op_name.rpartition("::")[2]] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        alone = run(tmp_path / "alone", Data(8), modes=["activation"], **same)
    assert calls["convolution"] == 2  # batches; the axes of the channels are known from the run before
    assert calls["convolution_backward"] == 0
    for layer in both.layers:
        for one, other in zip(both.column(layer, 1, "activation"), alone.column(layer, 1, "activation"), strict=True):
            np.testing.assert_allclose(one[:8], other, rtol=1e-12)
