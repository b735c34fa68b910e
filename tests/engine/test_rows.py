"""Rows of a result: pairing, parts, grouping, and places in the grid of a forward pass."""

from __future__ import annotations

import torch
from attribution_cases import SMALL, small_net
from hypothesis import given, settings
from hypothesis import strategies as st

from crp.engine.conditions import Grid, Rows, row_index
from crp.engine.forward import ForwardPass, tensor_in
from crp.engine.inputs import Inputs

CPU = torch.device("cpu")
ABC = [{"y": 0}, {"y": 1, "a": [1]}, {"y": 2, "b": [0], "a": [2]}]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_as_many_conditions_as_samples_are_paired():
    rows = Rows.broadcast(3, ABC)
    assert rows.samples == (0, 1, 2)
    assert rows.conditions == tuple(ABC)


def test_otherwise_every_sample_meets_every_condition():
    for n in (1, 2, 5):
        rows = Rows.broadcast(n, ABC)
        assert list(zip(rows.samples, rows.conditions, strict=True)) == [(i, c) for i in range(n) for c in ABC]
        assert len(rows) == 3 * n
    assert Rows.broadcast(3, ABC[:1]).samples == (0, 1, 2)


def test_parts_keep_samples_conditions_and_places():
    rows = Rows.broadcast(2, ABC)
    assert rows.places == tuple(range(6))
    assert [len(part) for part in rows.chunks(4)] == [4, 2]
    assert rows.chunks(4)[1] == Rows((1, 1), (ABC[1], ABC[2]), (4, 5))
    assert rows.chunks(100) == [rows]
    assert rows.part([5, 0]) == Rows((1, 0), (ABC[2], ABC[0]), (5, 0))
    assert rows.part([5, 0, 3]).part([2, 0]) == Rows((1, 1), (ABC[0], ABC[2]), (3, 5))


def test_rows_of_each_sample_or_one_by_one():
    rows = Rows.of([3, 1, 3], ABC)
    assert rows.one_by_one(every_row=False) == [rows.part([0, 2]), rows.part([1])]
    assert rows.one_by_one(every_row=True) == [rows.part([0]), rows.part([1]), rows.part([2])]


def passed(samples: tuple[int, ...]) -> ForwardPass:
    inputs = Inputs.single(SMALL[[0] * len(samples)])
    return ForwardPass.run(small_net(), inputs, {"conv1": "record"}, tensor_in, None, samples=samples)


def test_columns_of_rows():
    rows = Rows.of([3, 1, 3], ABC)
    assert passed((1, 3)).columns(rows) == [1, 0, 1]
    assert passed((3, 1, 3)).columns(rows) == [0, 1, 2]
    assert passed((1, 2, 3)).columns(rows.part([2])) == [2]


def test_values_of_rows_are_detached_and_a_copy_where_asked():
    values = torch.arange(6.0).reshape(3, 2).requires_grad_()
    one_each, forward = Rows.broadcast(3, ABC), passed((0, 1, 2))
    view, copy = forward.of_rows(values, one_each), forward.of_rows(values, one_each, copy=True)
    assert not view.requires_grad
    assert not copy.requires_grad
    assert view.data_ptr() == values.data_ptr() != copy.data_ptr()
    assert torch.equal(view, copy)
    assert torch.equal(forward.of_rows(values, Rows.of([2, 0], ABC[:2])), values.detach()[[2, 0]])
    entries = torch.arange(6.0).reshape(6, 1)
    assert forward.of_rows(entries, Rows.of([2, 0], ABC[:2])).flatten().tolist() == [4, 5, 0, 1]


def test_layers_and_targets():
    rows = Rows.broadcast(3, ABC)
    assert rows.layers("y") == ["a", "b"]
    assert rows.layers("a") == ["y", "b"]
    assert rows.targets("y") == [0, 1, 2]
    assert Rows.broadcast(2, [{"a": [0]}, {"y": 1}]).targets("y") == [None, 1]
    assert Rows.broadcast(2, [{"a": [0]}, {}]).targets("y") is None


def test_groups_have_their_layers_in_one_order():
    conditions = [{"a": 0, "y": 1, "b": 0}, {"b": 0, "a": 0}, {"y": 0}, {"a": 0, "b": 0}, {}]
    assert Rows.broadcast(5, conditions).groups("y") == [[0, 3], [1], [2, 4]]


# --- grid -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_grid_places_every_row_and_gives_it_back(samples):
    grid = Grid(samples, 4, CPU)
    rows = torch.arange(1.0, 2 * len(samples) + 1).reshape(-1, 2)
    placed = grid.scatter(rows)
    assert placed.shape == (grid.n_slots, 4, 2)
    assert grid.n_slots == max(samples.count(i) for i in range(4))
    assert torch.equal(grid.gather(placed), rows)
    assert placed.count_nonzero() == rows.numel()
    for row, sample in zip(rows, samples, strict=True):
        assert (placed[:, sample] == row).all(-1).any()


def test_grid_of_pairs_or_of_one_sample_moves_nothing():
    rows = torch.ones(3, 2)
    for grid in (Grid([0, 1, 2], 3, CPU), Grid([0, 0, 0], 1, CPU)):
        assert grid.scatter(rows).data_ptr() == rows.data_ptr()
        assert grid.gather(grid.scatter(rows)).data_ptr() == rows.data_ptr()
    assert Grid([1, 0], 2, CPU).scatter(rows[:2]).data_ptr() != rows.data_ptr()


def test_grid_of_rows_with_several_entries():
    """With one column, all entries are of its sample; slots may share what they hold."""
    grid, rows = Grid([0, 0], 1, CPU), torch.arange(12.0).reshape(6, 2)
    assert torch.equal(grid.scatter(rows), rows.reshape(2, 3, 2))
    assert torch.equal(grid.gather(grid.scatter(rows)), rows)
    assert torch.equal(grid.gather(rows[None, :3]), rows[:3].repeat(2, 1))
    assert row_index([2, 0], 3) == [6, 7, 8, 0, 1, 2]
