"""Concepts: masking, relevance of each, and how samples are ranked for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution_cases import close, net
from concept_cases import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import AxisConcept, ChannelConcept, Concept, as_ids, normalize
from crp.engine.masks import apply_masks

CHANNEL = ChannelConcept()


# --- masks ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.lists(st.integers(-4, 3), max_size=5), st.sampled_from([(), (2,), (2, 3), (2, 2, 2)]))
def test_mask_keeps_channels_of_one_row(row, ids, space):
    grad = drawn(3, 4, *space)
    kept = {i % 4 for i in ids}
    wanted = grad.clone()
    for channel in set(range(4)) - kept:
        wanted[row, channel] = 0
    given_grad = grad.clone()
    found = ChannelConcept.mask(row, ids, "layer")(given_grad)
    assert found is given_grad
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0), (1,), (1, 1), (0, 1, 2, 2)])
@pytest.mark.parametrize("space", [(), (4,), (2, 3)])
def test_masks_of_many_rows_at_once(rows, space):
    """As one after the other; a row that is masked twice keeps what both keep."""
    grad = drawn(3, 5, *space)
    masks = [ChannelConcept.mask(row, [i, (i + row + 1) % 5], "layer") for i, row in enumerate(rows)]
    one_by_one = grad.clone()
    for mask in masks:
        one_by_one = mask(one_by_one)
    assert torch.equal(apply_masks(masks, grad), one_by_one)
    assert one_by_one.count_nonzero() < grad.numel()
    with pytest.raises(IndexError, match="layer 'layer' has 5 channels, 0 to 4; there is no channel 5"):
        apply_masks([*masks, ChannelConcept.mask(0, 5, "layer")], grad)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.dictionaries(st.integers(-4, 3), st.lists(st.integers(-6, 5), max_size=3), max_size=3))
def test_mask_rf_keeps_positions_of_one_row(row, neurons):
    grad = drawn(3, 4, 2, 3)
    wanted = grad.clone()
    wanted[row] = 0
    for channel, positions in neurons.items():
        wanted[row, channel].view(-1)[positions] = grad[row, channel].view(-1)[positions]
    given_grad = grad.clone()
    assert ChannelConcept.mask_rf(row, neurons, "layer")(given_grad) is given_grad
    assert torch.equal(given_grad, wanted)


def test_masks_in_every_layout():
    grad = drawn(2, 3, 4, 4)
    strided = grad.to(memory_format=torch.channels_last)
    assert torch.equal(ChannelConcept.mask_rf(1, {2: 7})(strided), ChannelConcept.mask_rf(1, {2: 7})(grad))
    assert ChannelConcept.mask_rf(0, {1: torch.tensor([0])})(drawn(2, 3)).count_nonzero() == 4
    assert CHANNEL.mask(0, [0])(drawn(2, 3)).count_nonzero() == 4


@pytest.mark.parametrize(
    ("ids", "listed"),
    [(3, [3]), (-1, [-1]), ((1, 2), [1, 2]), ([], []), (range(3), [0, 1, 2]), (np.int64(4), [4]),
     (np.array([[1, 2]]), [1, 2]), (torch.tensor([[3], [1]]), [3, 1]), (torch.tensor(2), [2]), ([torch.tensor(2)], [2]),
     ({5}, [5])],
)  # fmt: skip
def test_ids_of_any_kind(ids, listed):
    assert as_ids(ids) == listed


@pytest.mark.parametrize(
    "ids",
    [
        "1",
        None,
        1.0,
        [1.5],
        np.nan,
        [np.inf],
        True,
        [True],
        torch.tensor([True]),
        {1: 2},
        [[1]],
        torch.ones(2),
        object,
        iter([1]),
    ],
)
def test_ids_that_are_none(ids):
    with pytest.raises(TypeError, match=r"^concept ids must be integers, not "):
        as_ids(ids)
    with pytest.raises(TypeError, match=r"^layer 'fc': concept ids must be integers, not "):
        ChannelConcept.mask(0, ids, "fc")


def test_errors_name_the_layer():
    """C14"""
    grad = drawn(2, 3, 2, 2)
    for ids in ([3], -4):
        with pytest.raises(IndexError, match=r"layer 'conv' has 3 channels, 0 to 2; there is no channel (3|-4)"):
            CHANNEL.mask(0, ids, "conv")(grad.clone())
    with pytest.raises(IndexError, match=r"layer 'conv' has 3 channels, 0 to 2; there is no channel 3"):
        CHANNEL.mask_rf(0, {3: [0]}, "conv")(grad.clone())
    with pytest.raises(IndexError, match=r"layer 'conv' has 4 positions, 0 to 3; there is no position 4"):
        CHANNEL.mask_rf(0, {0: [4]}, "conv")(grad.clone())
    for neurons in ([1, 2], 3, None):
        with pytest.raises(TypeError, match=r"layer 'conv': mask_rf needs \{channel: positions\}, not "):
            CHANNEL.mask_rf(0, neurons, "conv")
    for function in (CHANNEL.mask(0, [0], "fc"), CHANNEL.mask_rf(0, {0: [0]}, "fc"), CHANNEL.scores):
        with pytest.raises(
            ValueError, match=r"layer ('fc'|None) gives \(3,\); channels need \(batch, channel, \*space\)"
        ):
            function(drawn(3))


# --- relevance ------------------------------------------------------------------------------------------------------


def test_relevance_of_each_channel():
    relevance = drawn(2, 3, 4, 5)
    total = relevance.sum((2, 3))
    assert close(CHANNEL.attribute(relevance, abs_norm=False), total)
    assert close(CHANNEL.attribute(relevance), total / total.abs().sum(1, keepdim=True), 1e-9)
    mask = (relevance > 0).to(relevance)
    assert close(CHANNEL.attribute(relevance, mask, "layer", abs_norm=False), (relevance * mask).sum((2, 3)))
    assert close(CHANNEL.attribute(relevance, mask=None, abs_norm=False), total)
    assert close(CHANNEL.attribute(relevance[..., 0, 0], abs_norm=False), relevance[..., 0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_shares_in_every_dtype(dtype):
    """S27: no channel is NaN where all are zero; sums of half precision do not overflow."""
    assert not CHANNEL.attribute(torch.zeros(1, 3, dtype=dtype)).any()
    large = torch.full((1, 4, 8, 8), 60000, dtype=dtype)
    shares = CHANNEL.attribute(large)
    assert torch.equal(shares, torch.full_like(shares, 0.25))
    assert shares.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.isfinite(CHANNEL.attribute(large, abs_norm=False)).all()
    scores = CHANNEL.scores(large)
    assert torch.isfinite(scores.sum).all()
    assert scores.sum.dtype == shares.dtype


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e-300), (torch.float64, 1e-9), (torch.float32, 1e-30)])
def test_shares_of_very_little_relevance_add_up(dtype: torch.dtype, scale: float) -> None:
    """S27: zennit-crp adds 1e-10 to the sum, by which they were next to nothing."""
    relevance = torch.tensor([[3.0, -1.0, 4.0]], dtype=dtype) * scale
    wanted = torch.tensor([[0.375, -0.125, 0.5]], dtype=dtype)
    torch.testing.assert_close(CHANNEL.attribute(relevance), wanted, rtol=2e-6, atol=0)


def test_equal_shares_rank_by_their_size() -> None:
    relevance = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    assert CHANNEL.reference_sampling(relevance)[0][:, 0].tolist() == [1, 2, 0]


def test_tokens_have_channels_last():
    """S28: axis 1 is that of concepts; tokens of shape (batch, token, channel) are for a concept type of one's own."""

    class TokenChannels(ChannelConcept):
        def attribute(self, relevance, mask=None, layer_name=None, abs_norm=True):
            return super().attribute(relevance.movedim(-1, 1), mask, layer_name, abs_norm)

        @staticmethod
        def mask(batch_id, concept_ids, layer_name=None):
            channels = ChannelConcept.mask(batch_id, concept_ids, layer_name)
            return lambda grad: channels(grad.movedim(-1, 1)).movedim(1, -1)

    class Tables(CondAttribution):
        def heatmap_modifier(self, data, on_device=None):
            return data.grad.sum(-1)

    assert CHANNEL.attribute(drawn(1, 10, 64)).shape == (1, 10)
    assert TokenChannels().attribute(drawn(1, 10, 64)).shape == (1, 64)
    model = net(lambda s, x: s.head(s.embed(x).relu().mean(1)), embed=nn.Linear(4, 6), head=nn.Linear(6, 2))
    attribution, tokens = Tables(model), drawn(1, 5, 4)
    whole = attribution(tokens, [{"y": 1}], EpsilonPlus(), ["embed"])
    parts = attribution(tokens, [{"y": 1, "embed": [i]} for i in range(6)], EpsilonPlus(), mask_map=TokenChannels.mask)
    assert close(parts.heatmap.sum(0), whole.heatmap[0])
    assert TokenChannels().attribute(whole.relevances["embed"]).shape == (1, 6)


# --- rankings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 3, 7), (5, 3), (5, 3, 1, 1), (5, 3, 2, 2, 2)])
def test_scores(shape):
    relevance = drawn(*shape)
    flat = relevance.reshape(5, 3, -1)
    scores = CHANNEL.scores(relevance, "layer")
    assert close(scores.sum, flat.sum(-1))
    assert torch.equal(scores.max, flat.max(-1).values)
    assert torch.equal(scores.position, flat.argmax(-1))
    assert scores.position.dtype == torch.int64


@pytest.mark.parametrize("n", [4, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_of_equal_values_the_first_position_counts(n, dtype):
    values = torch.zeros(300, 4, n, dtype=dtype)
    values[:, 1, n // 2 :] = 1
    values[:, 2, -1] = 1
    values[:, 3, 2:] = torch.nan
    positions = CHANNEL.scores(values, "layer").position
    assert torch.equal(positions, torch.tensor([[0, n // 2, n - 1, 2]]).expand(300, 4))


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 3)])
@pytest.mark.parametrize("target", ["sum", "max"])
@pytest.mark.parametrize("norm", [True, False])
def test_ranking_of_the_batch(shape, target, norm):
    relevance = drawn(*shape)
    flat = relevance.reshape(5, 3, -1)
    value = flat.sum(-1) if target == "sum" else flat.amax(-1)
    if norm:
        value = value / value.abs().sum(1, keepdim=True)
    order, ranked, position = CHANNEL.reference_sampling(relevance, "layer", target, norm)
    assert torch.equal(order, value.argsort(0, descending=True))
    assert close(ranked, value.gather(0, order), 1e-9)
    assert torch.equal(position, flat.argmax(-1).gather(0, order))


def test_ties_keep_the_order_of_the_batch():
    """S17, within a batch."""
    order, _, position = CHANNEL.reference_sampling(torch.ones(40, 2, 3, 3))
    assert torch.equal(order, torch.arange(40)[:, None].expand(40, 2))
    assert not position.any()


def test_unknown_ranking():
    with pytest.raises(ValueError, match="max_target must be one of 'sum', 'max', not 'mean'"):
        CHANNEL.reference_sampling(drawn(2, 3), max_target="mean")


def test_positions_of_a_layer():
    assert CHANNEL.get_rf_indices((7,)) == [0]
    assert CHANNEL.get_rf_indices((7, 3, 4), "layer").tolist() == list(range(12))
    assert CHANNEL.get_rf_indices((7, 5)).tolist() == list(range(5))


# --- concepts of the user -------------------------------------------------------------------------------------------


class Reversed(ChannelConcept):
    """Concept ``i`` is the channel before the last ``i``: rankings of its own, as legacy concepts have."""

    def reference_sampling(self, relevance, layer_name=None, max_target="sum", abs_norm=True):
        found = super().reference_sampling(relevance, layer_name, max_target, abs_norm)
        return tuple(part.flip(1) for part in found)


class ReversedScores(ChannelConcept):
    def scores(self, relevance, layer_name=None):
        return type(super().scores(relevance))(*(part.flip(1) for part in super().scores(relevance, layer_name)))


class ReversedBoth(ReversedScores, Reversed):
    pass


class Legacy(Concept):
    """Knows only `reference_sampling`."""

    def reference_sampling(self, relevance, layer_name=None, max_target="sum", abs_norm=True):
        return CHANNEL.reference_sampling(relevance.flip(1), layer_name, max_target, abs_norm)


@pytest.mark.parametrize("concept", [Reversed(), ReversedScores(), ReversedBoth(), Legacy()], ids=repr)
def test_scores_and_rankings_of_a_subclass_agree(concept):
    """S19: a subclass may override either, or both, and call the inherited one."""
    relevance = drawn(6, 4, 3, 3)
    wanted = CHANNEL.scores(relevance.flip(1))
    for found, right in zip(concept.scores(relevance, "layer"), wanted, strict=True):
        assert torch.allclose(found.double(), right.double(), rtol=1e-12)
    for target in ("sum", "max"):
        for norm in (True, False):
            found = concept.reference_sampling(relevance, "layer", target, norm)
            right = CHANNEL.reference_sampling(relevance.flip(1), "layer", target, norm)
            assert all(torch.allclose(one.double(), two.double()) for one, two in zip(found, right, strict=True))


class Halves(Concept):
    """Two concepts, the halves of the channels, by `code`, `relevance` and `mask` alone."""

    def code(self, activation):
        halves = activation.unflatten(1, (2, -1))
        return halves.movedim(2, -1)

    def relevance(self, activation, multiplier):
        return self.code(activation * multiplier)

    def mask(self, batch_id, concept_ids, layer_name=None):
        def keep(grad):
            rows = grad[batch_id].unflatten(0, (2, -1)).clone()
            for half in {0, 1} - set(as_ids(concept_ids)):
                rows[half] = 0
            grad[batch_id] = rows.flatten(0, 1)
            return grad

        return keep


def test_what_follows_from_code_and_relevance():
    concept, relevance = Halves(), drawn(3, 4, 2, 5)
    halves = relevance.reshape(3, 2, -1)
    assert close(concept.attribute(relevance, abs_norm=False), halves.sum(-1))
    shares = halves.sum(-1) / halves.sum(-1).abs().sum(1, keepdim=True)
    assert close(concept.attribute(relevance), shares, 1e-9)
    scores = concept.scores(relevance, "layer")
    assert close(scores.sum, halves.sum(-1))
    assert close(scores.max, halves.amax(-1))
    assert torch.equal(concept.code(relevance).flatten(2).gather(2, scores.position[..., None])[..., 0], scores.max)
    order, value, _ = concept.reference_sampling(relevance, "layer", "max", False)
    assert torch.equal(order, halves.amax(-1).argsort(0, descending=True))
    assert close(value, halves.amax(-1).sort(0, descending=True)[0])
    assert concept.get_rf_indices((4, 2, 5)).tolist() == list(range(20))
    with pytest.raises(NotImplementedError, match=r"of the layer \(2, 5\); define Halves\.mask_rf"):
        concept.mask_rf(0, {0: 1}, "layer")(relevance)


def test_interface():
    """Without a word of its own, a concept type is that of the entries of axis 1, with no mask."""
    concept, relevance = Concept(), drawn(4, 3, 2, 2)
    assert repr(concept) == "Concept()"
    assert concept.describe(2) == "concept 2"
    assert torch.equal(concept.code(relevance), relevance)
    assert close(concept.attribute(relevance), CHANNEL.attribute(relevance))
    for found, wanted in zip(concept.scores(relevance), CHANNEL.scores(relevance), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(NotImplementedError, match=r"Concept does not implement Concept\.mask$"):
        concept.mask(0, [1])
    with pytest.raises(NotImplementedError, match=r"Concept does not implement Concept\.mask$"):
        concept.mask_rf(0, {1: 0})(relevance)
    with pytest.raises(TypeError, match=r"layer 'conv': mask_rf needs \{concept: positions\}, not \[1\]"):
        concept.mask_rf(0, [1], "conv")
    assert "ChannelConcept()" in repr({"layer": ChannelConcept()})


def test_relevance_of_one_sample_without_its_axis():
    """G10: ``attribute(relevances["linear"][0])``."""
    relevance = torch.tensor([1.0, -3.0, 0.0])
    assert torch.equal(CHANNEL.attribute(relevance, abs_norm=False), relevance[None])
    assert torch.equal(CHANNEL.attribute(relevance), CHANNEL.attribute(relevance[None]))
    masked = CHANNEL.attribute(relevance, mask=torch.tensor([0.0, 1.0, 1.0]), abs_norm=False)
    assert torch.equal(masked, torch.tensor([[0.0, -3.0, 0.0]]))


@pytest.mark.parametrize("concept", [ChannelConcept(), AxisConcept(1)])
def test_masks_of_relevance(concept):
    relevance = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    kept = concept.attribute(relevance, torch.tensor([True, False]), abs_norm=False)
    assert kept.tolist() == [[1.0, 0.0], [3.0, 0.0]]
    with pytest.raises(TypeError, match=r"mask must be a tensor, or None, not array\(\[0., 0.\]"):
        concept.attribute(relevance, np.zeros(2))
    with pytest.raises(ValueError, match=r"mask has the shape \(3, 2\), which does not broadcast to .* \(1, 2\)"):
        concept.attribute(relevance[:1], torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2)])
@pytest.mark.parametrize("target", ["sum", "max"])
def test_no_samples_have_no_ranking(shape, target):
    for found in ChannelConcept().reference_sampling(torch.zeros(shape), max_target=target):
        assert found.shape == (0, 3)
    assert ChannelConcept().attribute(torch.zeros(shape)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_relevance_has_no_shares(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, 3, dtype=dtype)
    for shares in (normalize(zeros), CHANNEL.attribute(zeros)):
        assert torch.equal(shares, torch.zeros_like(shares))
