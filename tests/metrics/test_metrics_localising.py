"""Metrics of heatmaps alone: where relevance lies, and on how many places."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
import torch

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.demo import DigitNet
from crp.metrics import complexity, pointing_game, relevance_mass, relevance_rank, sparseness

MASKED = {"pointing": pointing_game, "mass": relevance_mass, "rank": relevance_rank}
METRICS = MASKED | {
    "sparseness": lambda heatmaps, _: sparseness(heatmaps),
    "complexity": lambda heatmaps, _: complexity(heatmaps),
}


def by_orders(heat: list[float], inside: list[bool]) -> tuple[float, float]:
    """Pointing game and rank accuracy, means over all orders of the places in which no relevance grows."""
    orders = [order for order in permutations(range(len(heat))) if all(heat[a] >= heat[b] for a, b in pairwise(order))]
    size = sum(inside)
    hits = [(inside[order[0]], sum(inside[i] for i in order[:size]) / size) for order in orders]
    return tuple(sum(values) / len(orders) for values in zip(*hits, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(8))
def test_equal_places_are_taken_in_no_order(seed):
    generator = torch.Generator().manual_seed(seed)
    heat = torch.randint(-1, 3, (4, 2, 3), generator=generator).double()
    heat[:, 0, 0], heat[:, 1, 1] = 2, 0
    inside = torch.rand(4, 2, 3, generator=generator) < 0.5
    inside[:, 1, 2] = True
    for i, (pointing, rank) in enumerate(zip(pointing_game(heat, inside), relevance_rank(heat, inside), strict=True)):
        wanted = by_orders(heat[i].flatten().tolist(), inside[i].flatten().tolist())
        assert (pointing.item(), rank.item()) == pytest.approx(wanted)


def test_mass_is_the_share_of_positive_relevance():
    heat = torch.tensor([[[4.0, -8], [1, 3]], [[0, 0], [0.5, 0]]])
    mask = torch.tensor([[True, True], [False, False]])
    assert relevance_mass(heat, mask).tolist() == [0.5, 0]
    assert relevance_mass(heat, mask).tolist() == [1 - one for one in relevance_mass(heat, ~mask).tolist()]


@pytest.mark.parametrize("places", [1, 2, 7, 100])
def test_sparseness_and_complexity_have_closed_forms(places):
    alone, same = torch.zeros(1, places), -torch.ones(1, places)
    alone[0, -1] = -3
    assert sparseness(alone).item() == pytest.approx(1 - 1 / places) and sparseness(same).item() == pytest.approx(0)
    assert complexity(alone).item() == 0 and complexity(same).item() == pytest.approx(math.log(places), abs=1e-6)
    sizes = torch.rand(places, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    gini = (sizes[:, None] - sizes).abs().sum() / (2 * places * sizes.sum())
    shares = sizes / sizes.sum()
    assert sparseness(sizes[None]).item() == pytest.approx(gini.item())
    assert complexity(sizes[None]).item() == pytest.approx(-(shares * shares.log()).sum().item())


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_heatmaps_do_not_depend_on_scale_precision_or_the_batch(name):
    heat = torch.randint(-20, 20, (5, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    mask = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    found = METRICS[name](heat, mask)
    assert found.shape == (5,) and found.dtype == torch.float32 and found.isfinite().all()
    for factor in (1e-38, 1e-20, 1e30):
        torch.testing.assert_close(METRICS[name](heat * factor, mask), found)
    torch.testing.assert_close(METRICS[name](heat.half(), mask), found)
    torch.testing.assert_close(METRICS[name](heat.double(), mask), found.double(), rtol=1e-5, atol=1e-6)
    one_by_one = torch.cat([METRICS[name](heat[i : i + 1], mask[i]) for i in range(5)])
    torch.testing.assert_close(one_by_one, found)


@pytest.mark.parametrize("name", METRICS)
def test_a_heatmap_without_relevance_has_no_place(name):
    heat, mask = torch.zeros(2, 3, 3), torch.ones(3, 3, dtype=torch.bool)
    heat[1, 1, 1] = 1
    found = METRICS[name](heat, mask)
    assert found[0].isnan() and not found[1].isnan()


@pytest.mark.parametrize("name", MASKED)
def test_what_is_no_mask_is_refused(name):
    heat = torch.rand(2, 3, 4, 4)
    for mask, error, message in (
        (torch.ones(2, 4, 4, dtype=torch.bool), ValueError, r"in heatmaps.sum\(1\)"),
        (torch.ones(2, 3, 4, 4), TypeError, "masks must be a tensor of bool"),
        (torch.arange(2).view(2, 1, 1, 1).expand(2, 3, 4, 4) > 0, ValueError, r"masks of samples \[0\] are empty"),
    ):
        with pytest.raises(error, match=message):
            MASKED[name](heat, mask)
    for wrong, error in ((heat.tolist(), TypeError), (heat[0, 0, 0], ValueError), (heat / 0, ValueError)):
        with pytest.raises(error, match="heatmaps"):
            MASKED[name](wrong, torch.ones(4, 4, dtype=torch.bool))


def test_heatmaps_of_an_attribution_go_in_as_they_are():
    torch.manual_seed(0)
    net, images = DigitNet().eval(), torch.rand(3, 1, 32, 32)
    heatmap = CondAttribution(net)(images, [{"y": 1}], EpsilonPlus()).heatmap
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16] = True
    positive = heatmap.clamp(min=0)
    torch.testing.assert_close(relevance_mass(heatmap, mask), positive[:, :16].sum((1, 2)) / positive.sum((1, 2)))


@pytest.mark.parametrize("name", METRICS)
def test_the_largest_numbers_are_summed_without_overflow(name):
    heat, mask = torch.tensor([[1.0, 0.5, 0.25, 0.75]]), torch.tensor([True, False, True, False])
    assert torch.allclose(METRICS[name](heat * 3e38, mask), METRICS[name](heat, mask))
