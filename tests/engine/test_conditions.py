"""Conditions as data: their checks, initial relevance, masks."""

from __future__ import annotations

import functools

import pytest
import torch
from attribution_cases import net, small_net
from torch import Tensor
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, Gradient
from crp.concepts import ChannelConcept, mask_of
from crp.engine.conditions import check_conditions
from crp.engine.inputs import check_data
from crp.engine.masks import mask_factory, needs_multiplier, row_masks
from crp.engine.targets import check_start, check_targets_exist, init_of_rows, initial_relevance

ABC = [{"y": 0}, {"y": 1, "a": [1]}, {"y": 2, "b": [0], "a": [2]}]


# --- initial relevance ----------------------------------------------------------------------------------------------


def test_initial_relevance_starts_at_the_targets():
    prediction = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert torch.equal(initial_relevance(prediction, None, None), prediction)
    assert torch.equal(initial_relevance(prediction, [1, None], None), torch.tensor([[0.0, 2, 0], [4, 5, 6]]))
    assert torch.equal(initial_relevance(prediction, [[0, 2], -1], 2), torch.tensor([[2.0, 0, 2], [0, 0, 2]]))
    assert torch.equal(initial_relevance(prediction, [0, 1], lambda p: p * 2), torch.tensor([[2.0, 0, 0], [0, 10, 0]]))
    given = torch.tensor([1, 0, 7])
    found = initial_relevance(prediction, None, given)
    assert torch.equal(found, torch.tensor([[1.0, 0, 7], [1, 0, 7]]))
    assert found.dtype == prediction.dtype


def test_initial_relevance_of_maps_starts_at_whole_channels():
    prediction = torch.arange(1.0, 17).reshape(1, 4, 2, 2)
    found = initial_relevance(prediction, [[1, 3]], None)
    assert torch.equal(found[:, [1, 3]], prediction[:, [1, 3]])
    assert not found[:, [0, 2]].any()


def test_initial_relevance_of_a_part():
    """A tensor with an entry for each row is cut by the rows' places; one for a part serves every part."""
    prediction, rows = torch.zeros(2, 5), torch.arange(25.0).reshape(5, 5)
    assert torch.equal(init_of_rows(rows, [2, 3], prediction, (5, 2)), rows[2:4])
    assert torch.equal(init_of_rows(rows, [4, 1], prediction, (5, 2)), rows[[4, 1]])
    assert torch.equal(init_of_rows(rows[:2], [2, 3], prediction, (5, 2)), rows[:2])
    assert torch.equal(init_of_rows(rows[:2], [4], prediction[:1], (5, 2)), rows[:1])
    assert init_of_rows(rows, range(5), torch.zeros(5, 5), (5, 5)) is rows
    for whole in (rows[0], rows[:1], rows[:3], rows[None], torch.tensor(1.0), 3, None, torch.exp):
        assert init_of_rows(whole, [2, 3], prediction, (5, 2)) is whole


def test_start_has_the_shape_of_the_prediction():
    prediction = torch.zeros(2, 3)
    check_start(torch.ones(2, 3), prediction)
    with pytest.raises(ValueError, match=r"has the shape \(3,\); it must be a tensor of \(rows.* = \(2, 3\)"):
        check_start(torch.ones(3), prediction)
    with pytest.raises(ValueError, match=r"has the type list; it must be a tensor"):
        check_start([[1.0] * 3] * 2, prediction)


# --- checks ---------------------------------------------------------------------------------------------------------


def test_conditions_that_are_right():
    assert check_conditions(tuple(ABC), "y") == ABC
    assert check_conditions([{}, {"a": []}], "y", start_layer="a") == [{}, {"a": []}]
    assert check_conditions([{"a": object()}, {"y": None}], "y", has_init=True)
    assert check_conditions([{"class": [[0, 1]]}], "class")
    check_targets_exist([3, -4, [0, 1], torch.tensor([2]), None, [True] * 4, range(2)], torch.zeros(7, 4), "y")
    check_targets_exist(None, torch.zeros(3), "y")


def test_elements_of_the_output_are_tuples():
    """G8: on an output of shape (B, C, H, W), one element; a shorter tuple is all that it holds."""
    prediction = torch.arange(2.0 * 4 * 3 * 5).reshape(2, 4, 3, 5) + 1
    targets: list[object] = [[(1, 2, 3)], [(0, 1), 2, (3, -1, -5)]]
    check_targets_exist(targets, prediction, "y")
    found = initial_relevance(prediction, targets, None)
    wanted = torch.zeros_like(prediction)
    wanted[0, 1, 2, 3] = prediction[0, 1, 2, 3]
    wanted[1, 0, 1], wanted[1, 2], wanted[1, 3, 2, 0] = prediction[1, 0, 1], prediction[1, 2], prediction[1, 3, 2, 0]
    assert torch.equal(found, wanted)
    # A tuple that is no part of a list is one of classes, as lists, arrays and tensors of any shape are.
    classes = initial_relevance(prediction, [(1, 2, 3), torch.tensor([[1, 2, 3]])], None)
    assert torch.equal(classes[:, 0], torch.zeros(2, 3, 5)) and torch.equal(classes[:, 1:], prediction[:, 1:])
    assert check_conditions([{"y": [(1, 2, 3)]}], "y")
    for wrong, message in (
        ([()], r"conditions\[0\]\['y'\] names the element \(\); it must be a tuple of int"),
        ([1, (1, 0.5)], r"names the element \(1, 0.5\)"),
        ([(True, 1)], "names the element"),
        ([(1, 2), "a"], "must be an int, or a list"),
    ):
        with pytest.raises(TypeError, match=message):
            check_conditions([{"y": wrong}], "y")
    for wrong in ((4, 0, 0), (0, 3, 0), (0, 0, -6), (0, 0, 0, 0)):
        with pytest.raises(IndexError, match=r"row 1: 'y' names the element .* output has the shape \(4, 3, 5\)"):
            check_targets_exist([0, [wrong]], prediction, "y")
    with pytest.raises(IndexError, match="row 7: 'y' is 4"):
        check_targets_exist([0, 4], prediction, "y", [2, 7])
    with pytest.raises(IndexError, match=r"row 0: 'y' names the element \(1, 2\), .* has the shape \(4,\)"):
        check_targets_exist([[(1, 2)]], torch.zeros(1, 4), "y")


@pytest.mark.parametrize("exclude_parallel", [True, False])
@pytest.mark.parametrize("composite", [None, EpsilonPlus()], ids=["gradient", "ours"])
def test_one_element_is_explained(exclude_parallel, composite):
    """G8: as if the model had only this output."""
    model = net(lambda s, x: s.conv(x.relu()), conv=torch.nn.Conv2d(3, 4, 3))
    data = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    conditions = [{"y": [(1, 2, 3)]}, {"y": [(0, 0, 1), (2, 3, 3)]}, {"y": [(0, 0, 1)]}, {"y": [(2, 3, 3)]}]
    found = CondAttribution(model)(data[:1], conditions, composite, exclude_parallel=exclude_parallel).heatmap
    alone = CondAttribution(model, output=lambda y: y[:, 1, 2, 3, None])(data[:1], [{"y": 0}], composite).heatmap
    assert torch.allclose(found[0], alone[0], rtol=1e-12, atol=1e-14) and alone.any()
    assert torch.allclose(found[1], found[2] + found[3], rtol=1e-12, atol=1e-14)


def test_samples_that_are_not_finite_are_named():
    data = torch.zeros(5, 2, 3)
    data[1, 0, 2], data[4, 1, 1] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match=r"NaN or infinite values in samples \[1, 4\]"):
        check_data(data)
    for right in (data[[0, 2]], data[:1].half(), torch.zeros(3)):
        check_data(right)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_masks_know_their_row_ids_and_layer():
    asked = []

    def mask_map(row: int, ids: object, layer: str):
        asked.append((row, ids, layer))
        return lambda grad: grad

    rows = {4: {"a": [1]}, 7: {"y": 0}, 9: {"b": 3, "a": "head"}}
    assert len(row_masks(rows, "a", mask_map)) == 2
    assert asked == [(4, [1], "a"), (9, "head", "a")]
    assert mask_factory({"a": mask_map}, "a") is mask_map
    assert row_masks({}, "a", mask_map) == []
    asked.clear()
    assert len(row_masks({0: {"a": 1}, 2: {"a": 5}}, "a", mask_map, n_entries=3)) == 6
    assert asked == [(row, 1, "a") for row in range(3)] + [(row, 5, "a") for row in range(6, 9)]


@pytest.mark.parametrize("exclude_parallel", [True, False])
def test_mask_functions_act_on_their_row_of_the_gradient(exclude_parallel):
    """In a gradient of all rows that have the layer, whichever samples they are of."""
    model, seen = small_net(), []
    data = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def mask_map(row: int, ids: object, layer: str):
        def mask(grad: Tensor) -> Tensor:
            seen.append((row, tuple(grad.shape)))
            grad[row] *= 2
            return grad

        return mask

    conditions = [{"y": 0}, {"y": 1, "conv2": "anything"}, {"y": 2, "conv2": None}]
    found = CondAttribution(model)(data, conditions, mask_map=mask_map, exclude_parallel=exclude_parallel)
    plain = CondAttribution(model)(data, [{"y": 0}, {"y": 1}, {"y": 2}])
    factor = torch.tensor([1.0, 2, 2, 1, 2, 2], dtype=torch.float64)[:, None, None]
    assert torch.allclose(found.heatmap, factor * plain.heatmap, rtol=1e-12)
    n = 4 if exclude_parallel else 6
    assert {shape for _, shape in seen} == {(n, 4, 2, 2)}
    assert [row for row, _ in seen] == (list(range(4)) if exclude_parallel else [1, 2, 4, 5])


class Direction(ChannelConcept):
    """Relevance along a direction: the multiplier's part along it."""

    needs_multiplier = True

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction / direction.norm()

    def mask(self, batch_id: int, concept_ids: object, layer_name: str | None = None):
        def along(grad: Tensor) -> Tensor:
            flat = grad[batch_id].flatten(1)
            grad[batch_id] = (self.direction[:, None] * (self.direction @ flat)).reshape(grad.shape[1:])
            return grad

        return along


def free_mask(row: int, ids: object, layer: str):
    return Direction(torch.arange(1.0, 6).double()).mask(row, ids, layer)


def saying(row: int, ids: object, layer: str):
    mask = free_mask(row, ids, layer)
    mask.needs_multiplier = True
    return mask


MASKS = {
    "method": Direction(torch.arange(1.0, 6).double()).mask,
    "map": {"conv1": Direction(torch.arange(1.0, 6).double()).mask},
    "partial": functools.partial(Direction(torch.arange(1.0, 6).double()).mask),
    "concept": mask_of(Direction(torch.arange(1.0, 6).double())),
    "mask": saying,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("exclude_parallel", [True, False])
@pytest.mark.parametrize("start", [None, "conv1"])
def test_masks_that_need_multipliers(name, exclude_parallel, start, untouched):
    """G3: refused where relevance itself flows, before the model runs if the mask's factory says so."""
    model, data = small_net(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    condition: dict[str, object] = {"conv1": [0]} if start else {"y": 1, "conv1": [0]}
    keywords = {"mask_map": MASKS[name], "exclude_parallel": exclude_parallel, "start_layer": start}
    attribution = CondAttribution(model)
    for composite in (None, EpsilonPlus(), Gradient()):
        found = attribution(data, [condition], composite, **keywords)
        wanted = attribution(data, [condition], composite, **keywords | {"mask_map": free_mask})
        assert torch.equal(found.heatmap, wanted.heatmap) and found.heatmap.any()
    calls = model.calls
    with untouched(model), pytest.raises(TypeError, match=r"layer 'conv1' needs multipliers \(needs_multiplier"):
        attribution(data, [condition], ZennitEpsilonPlus(), **keywords)
    assert model.calls == calls + (name == "mask")
    with ZennitEpsilonPlus().context(model), pytest.raises(TypeError, match="needs multipliers"):
        attribution(data, [condition], None, **keywords)


def test_concepts_say_that_their_static_masks_need_multipliers():
    class Static(ChannelConcept):
        needs_multiplier = True

        @staticmethod
        def mask(batch_id: int, concept_ids: object, layer_name: str | None = None):
            return lambda grad: grad

    assert not needs_multiplier(Static().mask)
    assert needs_multiplier(mask_of(Static())) and needs_multiplier(mask_of(Static(), "mask_rf"))
    assert mask_of(ChannelConcept()) is ChannelConcept.mask
