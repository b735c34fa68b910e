"""Rows that start alike share what starts, and what arrives at the first layer: long texts need no more memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import AxisConcept
from crp.engine.backward import _slots_at_once
from crp.engine.conditions import Grid, Rows
from crp.engine.starts import Arrivals, Starts, distinct
from crp.engine.targets import all_positions
from crp.outputs import Position

TOKENS, FEATURES, VOCABULARY = 12, 5, 999
TOKEN = AxisConcept(1).mask
CPU = torch.device("cpu")


class Language(nn.Module):
    """Two layers, of which the second sees the mean of all tokens, and scores of tokens at each position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(FEATURES, 6), nn.Linear(6, 7)
        self.head = nn.Linear(7, VOCABULARY)
        self.double()

    def forward(self, data: Tensor) -> Tensor:
        hidden = torch.relu(self.low(data))
        return self.head(torch.relu(self.high(hidden + hidden.mean(1, keepdim=True))))


@pytest.fixture
def attribution() -> CondAttribution:
    return CondAttribution(Language().eval())


def texts(n: int) -> Tensor:
    return torch.randn(n, TOKENS, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


LAST = {"y": Position(-1, 3)}
CONDITIONS: dict[str, list[dict[str, Any]]] = {
    "one target": [LAST | {"high": [c]} for c in range(6)],
    "equal targets of other forms": [{"y": [Position(-1, [3])], "high": [c]} for c in range(3)]
    + [LAST | {"high": [3]}],
    "several targets": [{"y": Position(-1 - c % 2, c % 3, against=5), "high": [c]} for c in range(6)],
    "another target in each part": [{"y": Position(-1, c // 4), "high": [c % 7]} for c in range(8)],
    "two layers": [LAST | {"high": [c], "low": [c]} for c in range(5)],
    "other layers": [LAST | {("high", "low")[c % 2]: [c]} for c in range(6)],
    "without layers": [{"y": Position(c, 1)} for c in range(4)] + [LAST] * 2,
    "a class of all positions": [{"y": 2, "high": [c]} for c in range(4)],
}


@pytest.mark.parametrize("composite", [None, EpsilonPlus()], ids=["gradient", "epsilon_plus"])
@pytest.mark.parametrize("n", [1, 2], ids="{} texts".format)
@pytest.mark.parametrize("conditions", CONDITIONS.values(), ids=CONDITIONS)
def test_each_row_is_what_it_is_alone(
    attribution: CondAttribution, conditions: list[dict[str, Any]], n: int, composite: Any
) -> None:
    data, layers = texts(n), ["low", "high", "head"]
    parts = list(attribution.generate(data, conditions, composite, layers, batch_size=4, verbose=False, mask_map=TOKEN))
    whole = attribution(data, conditions * n if n == len(conditions) else conditions, composite, layers, mask_map=TOKEN)
    row = 0
    for part in parts:
        for place in range(len(part.prediction)):
            sample, condition = divmod(row, len(conditions))
            alone = attribution(data[sample : sample + 1], [conditions[condition]], composite, layers, mask_map=TOKEN)
            for of_many, at in ((part, place), (whole, row)):
                torch.testing.assert_close(of_many.heatmap[at], alone.heatmap[0])
                torch.testing.assert_close(of_many.prediction[at], alone.prediction[0])
                for layer in layers:
                    torch.testing.assert_close(of_many.relevances[layer][at], alone.relevances[layer][0])
                    torch.testing.assert_close(of_many.activations[layer][at], alone.activations[layer][0])
            row += 1
    assert row == n * len(conditions)


def test_rows_of_paired_texts(attribution: CondAttribution) -> None:
    data = texts(3)
    conditions = [{"y": Position(-1, 3), "high": [c]} for c in range(3)]
    found = attribution(data, conditions, EpsilonPlus(), mask_map=TOKEN)
    for i in range(3):
        alone = attribution(data[i : i + 1], conditions[i : i + 1], EpsilonPlus(), mask_map=TOKEN)
        torch.testing.assert_close(found.heatmap[i], alone.heatmap[0])


@pytest.mark.parametrize("init_rel", [2.0, lambda output: output.abs(), torch.ones(1).double()], ids=["2", "f", "1"])
def test_initial_relevance_of_positions(attribution: CondAttribution, init_rel: Any) -> None:
    data, conditions = texts(1), CONDITIONS["one target"]
    found = attribution(data, conditions, EpsilonPlus(), init_rel=init_rel, mask_map=TOKEN)
    for i, condition in enumerate(conditions):
        alone = attribution(data, [condition], EpsilonPlus(), init_rel=init_rel, mask_map=TOKEN)
        torch.testing.assert_close(found.heatmap[i], alone.heatmap[0])


# --- memory and operations --------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the entries of every new storage, and matrix products with the scores of all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Tensor] = {}
        self.entries: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in args if isinstance(one, Tensor)]
        if "mm" in str(func) and any(TOKENS in one.shape and VOCABULARY in one.shape for one in given):
            self.products += 1
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in self.known:
                self.known[one.untyped_storage()._cdata] = one  # (kept, so that no other has its address)
                self.entries.append(one.untyped_storage().nbytes() // one.element_size())
        return result


def watched(attribution: CondAttribution, n_rows: int, batch_size: int, targets: int = 1) -> Watch:
    conditions = [{"y": Position(-1, c % targets), "high": [c % 7]} for c in range(n_rows)]
    with Watch() as watch:
        for part in attribution.generate(
            texts(1), conditions, EpsilonPlus(), batch_size=batch_size, verbose=False, mask_map=TOKEN
        ):
            assert part.prediction.shape[1:] == (TOKENS, VOCABULARY)
    return watch


def test_no_row_has_an_output_of_its_own(attribution: CondAttribution) -> None:
    """Of 32 rows, as of one: scores of all positions exist once for each thing that is computed of them."""
    output = TOKENS * VOCABULARY
    one, many = watched(attribution, 1, 1), watched(attribution, 32, 32)
    assert max(many.entries) == max(one.entries) == output
    assert many.entries.count(output) <= one.entries.count(output) + 1
    parts = watched(attribution, 32, 8)
    assert max(parts.entries) == output
    assert parts.entries.count(output) <= one.entries.count(output) + 3 * 4


def test_the_way_to_the_first_layer_is_gone_once(attribution: CondAttribution) -> None:
    one = watched(attribution, 1, 1).products
    assert one >= 1
    assert watched(attribution, 32, 4).products == watched(attribution, 8, 1).products == one
    assert watched(attribution, 8, 1, targets=2).products == 8 * one  # (each part has another target)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_was_given_may_be_written_into(attribution: CondAttribution, batch_size: int) -> None:
    conditions = CONDITIONS["one target"]
    layers = ["head", "high"]
    asked = {"record_layer": layers, "mask_map": TOKEN, "verbose": False, "batch_size": batch_size}
    expected = list(attribution.generate(texts(1), conditions, **asked))
    parts = attribution.generate(texts(1), conditions, **asked)
    for part, unchanged in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.heatmap, unchanged.heatmap)
        torch.testing.assert_close(part.relevances, unchanged.relevances)
        for tensor in (part.heatmap, *part.relevances.values(), *part.activations.values()):
            tensor.fill_(7.0)


@pytest.mark.parametrize(("n_bytes", "slots"), [(2**14, 32), (2**17, 4), (602_112, 4), (1_024_000, 1), (2**24, 1)])
def test_slots_of_large_data_go_back_one_by_one(n_bytes: int, slots: int) -> None:
    assert _slots_at_once(torch.empty(100, 1), n_bytes) == slots
    assert _slots_at_once(torch.empty(100, 1, device="meta"), n_bytes) == 100
    assert _slots_at_once(torch.empty(2, 1), n_bytes) == min(2, slots)


# --- starts -----------------------------------------------------------------------------------------------------------


def test_starts_of_slots() -> None:
    rows = Rows.of([0, 0, 1, 1], [{"y": 3}, {"y": 3}, {"y": 1}, {"y": 1}])
    first, starts = distinct(rows, [0, 0, 1, 1], rows.targets("y"))
    assert first == [0, 2] and starts.of_rows == (0, 0, 1, 1)
    starts = Starts(torch.tensor([[1.0], [2.0]]), starts.of_rows, starts.keys)
    assert starts.rows().tolist() == [[1], [1], [2], [2]]
    cotangent, key = starts.shared(Grid([0, 0, 1, 1], 2, CPU)) or (None, ())
    assert cotangent is not None and cotangent.tolist() == [[[1], [2]]] and len(key) == 2
    of_one = starts.part([2, 3])
    cotangent, _ = of_one.shared(Grid([1, 1], 2, CPU)) or (None, ())
    assert cotangent is not None and cotangent.tolist() == [[[0], [2]]]
    # (the second slot lacks a column, where nobody reads)
    cotangent, _ = starts.part([0, 1, 2]).shared(Grid([0, 0, 1], 2, CPU)) or (None, ())
    assert cotangent is not None and cotangent.tolist() == [[[1], [2]]]
    assert starts.part([0, 2]).shared(Grid([0, 0], 1, CPU)) is None  # (two starts in one column)
    assert Starts.of_each(torch.ones(2, 1)).shared(Grid([0, 0], 1, CPU)) is None  # (it is not known)


def test_targets_are_told_apart() -> None:
    array = torch.tensor([1])
    targets = [1, [1], (1,), Position(0, 1), Position(0, [1]), Position(0, 1, 2), None, array, array.clone(), array, 1]
    rows = Rows.of([0] * len(targets), [{} for _ in targets])
    assert distinct(rows, [0] * len(targets), targets)[1].of_rows == (0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 0)
    assert not all_positions(None) and not all_positions([]) and not all_positions([[]])
    assert not all_positions([Position(0, 1), 1]) and all_positions([Position(0, 1), [Position(1, 1)]])


def test_another_start_is_computed_again() -> None:
    arrivals, computed = Arrivals(), []

    def compute() -> dict[str, Tensor]:
        computed.append(1)
        return {"layer": torch.ones(1)}

    for start, keep, n in (
        ("a", True, 1), ("a", False, 1), ("b", False, 2), ("a", True, 2), ("b", True, 3), ("a", True, 4),
        (None, True, 5), (None, True, 6),
    ):  # fmt: skip
        assert arrivals.get("layer", start and (start,), compute, keep)["layer"].item() == 1
        assert len(computed) == n, start
