"""Functions that are others, written out, have the relevance of these under every preset."""

from __future__ import annotations

import warnings

import pytest
import torch
from core_cases import Net
from preset_cases import FEW, LRP_PRESETS, assert_closes, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F

from crp.composites import AttnLRP, DeepLift, EpsilonPlus, RelP

W, IDS, PLACES = numbers(7, 4, seed=3), torch.tensor([[0, 2, 4], [1, 1, 6]]), torch.tensor([0, 2, 1, 1, 2, 0])
STARTS, LENGTHS = torch.tensor([0, 2, 2, 3]), torch.tensor([2, 0, 1, 3])


def bags(h, mode="mean", padding=None):
    """Bags of rows of a table that is made of each sample; one is empty."""
    return torch.stack([F.embedding_bag(PLACES, table.mT, STARTS, mode=mode, padding_idx=padding) for table in h])


def by_hand(h, reduce, padding=None):
    each = [[i for i in places.tolist() if i != padding] for places in PLACES.split(LENGTHS.tolist())]
    return torch.stack([torch.stack([reduce(t.mT[i]) if i else t.new_zeros(2) + 0 * t.sum() for i in each]) for t in h])


def segments(h, reduce):
    return torch.segment_reduce(h.flatten(1).T.contiguous(), reduce, lengths=torch.tensor([2, 4])).T


#: A function of (n, 2, 3), and the same in others that have rules.
PAIRS = {
    "logsumexp": (lambda h: h.logsumexp(-1), lambda h: h.exp().sum(-1).log()),
    "logsumexp_axes": (
        lambda h: h + torch.special.logsumexp(h, (1, 2), keepdim=True),
        lambda h: h + h.exp().sum((1, 2), keepdim=True).log(),
    ),
    "remainder": (lambda h: h.remainder(0.7), lambda h: h - 0.7 * (h / 0.7).floor()),
    "mod": (lambda h: h % 0.7, lambda h: h - 0.7 * (h / 0.7).floor()),
    "fmod": (lambda h: h.fmod(0.7), lambda h: h - 0.7 * (h / 0.7).trunc()),
    "frac": (lambda h: h.frac(), lambda h: h - h.trunc()),
    "of_two": (lambda h: h.remainder(h.exp()), lambda h: h - h.exp() * (h / h.exp()).floor()),
    "deg2rad": (lambda h: h.deg2rad(), lambda h: h * (torch.pi / 180)),
    "gammaln": (lambda h: torch.special.gammaln(h.exp() + 1), lambda h: (h.exp() + 1).lgamma()),
    "embedding": (
        lambda h: torch.stack([F.embedding(IDS % 2, table) for table in h]),
        lambda h: torch.stack([table[IDS % 2] for table in h]),
    ),
    "bags": (bags, lambda h: by_hand(h, lambda rows: rows.mean(0))),
    "bags_sum": (lambda h: bags(h, "sum"), lambda h: by_hand(h, lambda rows: rows.sum(0))),
    "bags_max": (lambda h: bags(h, "max"), lambda h: by_hand(h, lambda rows: rows.amax(0))),
    "bags_padded": (lambda h: bags(h, padding=-1), lambda h: by_hand(h, lambda rows: rows.mean(0), 2)),
    "bags_weighted": (
        lambda h: F.embedding_bag(IDS, W, mode="sum", per_sample_weights=h[:, 0]),
        lambda h: (h[:, :1] @ W[IDS])[:, 0],
    ),
    "bags_weighted_from": (
        lambda h: nn.EmbeddingBag.from_pretrained(W, mode="sum", include_last_offset=True)(
            IDS.flatten(), torch.tensor([0, 3, 6]), h[:, 0].flatten()
        ),
        lambda h: (h[:, :1] @ W[IDS])[:, 0],
    ),
    "segments": (
        lambda h: segments(h, "sum"),
        lambda h: torch.stack([h.flatten(1)[:, :2].sum(1), h.flatten(1)[:, 2:].sum(1)], 1),
    ),
    "segments_max": (
        lambda h: segments(h, "max"),
        lambda h: torch.stack([h.flatten(1)[:, :2].amax(1), h.flatten(1)[:, 2:].amax(1)], 1),
    ),
}
PRESETS = {**FEW, "zplus": LRP_PRESETS["zplus"], "attn_lrp": AttnLRP, "relp": RelP}
PRESETS |= {"split": lambda: EpsilonPlus(gates="split", attention="split"), "deeplift": lambda: DeepLift(reference=0.1)}
#: What DeepLIFT decomposes otherwise, or not: it says so.
NOT_BY_DEEPLIFT = ("of_two", "bags_max", "segments", "segments_max")


def both(name):
    nets = []
    for function in PAIRS[name]:
        below, above = nn.Linear(6, 6), nn.LazyLinear(3)
        net = Net(lambda s, x, f=function: s.above(f(s.below(x).view(-1, 2, 3)).flatten(1)), below=below, above=above)
        net.double()(numbers(2, 6))
        nets.append(seeded(net))
    return nets


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore:outside DeepLIFT", "ignore:Flat gives all")
def test_the_same_as_written_out(name, preset):
    if preset == "deeplift" and name in NOT_BY_DEEPLIFT:
        pytest.skip("by the ordinary chain rule, with a warning")
    found, wanted = (maps(net, numbers(2, 6), PRESETS[preset]()) for net in both(name))
    assert off(found, wanted) <= 1e-12


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_kept_is_accounted_for(name):
    assert_closes(both(name)[0], numbers(2, 6), EpsilonPlus())


@pytest.mark.parametrize("function", [torch.special.log_softmax, F.log_softmax], ids=["special", "functional"])
@pytest.mark.filterwarnings("ignore:outside DeepLIFT")
def test_deeplift_of_a_logarithm_of_a_softmax_sums_up_in_each_spelling(function):
    net = seeded(Net(lambda s, x: function(s.fc(x), -1), fc=nn.Linear(6, 3)))
    data, reference = numbers(2, 6), 0.1
    found = maps(net, data, DeepLift(reference=reference))
    difference = (net(data) - net(torch.full_like(data, reference)))[:, 1].detach()
    assert off(found.flatten(1).sum(1), difference) <= 1e-12


def test_products_of_segments_have_no_rule():
    net = seeded(Net(lambda s, x: s.fc(segments(x.view(-1, 2, 3), "prod")), fc=nn.Linear(2, 3)))
    with pytest.warns(UserWarning, match=r"EpsilonPlus has no rule for segment_reduce\(\)"):
        maps(net, numbers(2, 6), EpsilonPlus())


def test_rows_of_a_table_that_are_scaled_in_place_are_refused():
    net = seeded(Net(lambda s, x: F.embedding_bag(IDS % 2, s.fc(x), max_norm=1.0), fc=nn.Linear(6, 3)))
    with pytest.raises(NotImplementedError, match=r"embedding_bag\(\) is known .* without max_norm"):
        maps(net, numbers(2, 6), EpsilonPlus())


@pytest.mark.parametrize("function", [torch.vstack, torch.hstack, torch.dstack, torch.column_stack, torch.row_stack])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_tensors_side_by_side_are_as_torch_puts_them(function, dims):
    x = numbers(2, 6)

    def placed(x):
        tensors = [row.view(1, 2, 3)[(0,) * (3 - dims)] for row in x] if dims else [x[0, 0], x[1, 1]]
        return function(tensors)

    composite, net = EpsilonPlus(), seeded(Net(lambda s, x: placed(s.fc(x)), fc=nn.Linear(6, 6)))
    with composite.context(net):
        found = net(x.clone().requires_grad_())
    torch.testing.assert_close(found.detach(), net(x).detach(), rtol=1e-12, atol=0)


def by_branch(s, h):
    return torch.cond(h.sum() > 0, lambda h: s.inner(h).tanh(), lambda h: h * 2, (h,))


def in_a_loop(s, h):
    steps = (torch.tensor(0), h)
    return torch._higher_order_ops.while_loop(lambda i, h: i < 2, lambda i, h: (i + 1, s.inner(h).tanh()), steps)[1]


@pytest.mark.parametrize(
    ("controlled", "written"),
    [(by_branch, lambda s, h: s.inner(h).tanh()), (in_a_loop, lambda s, h: s.inner(s.inner(h).tanh()).tanh())],
    ids=["cond", "while_loop"],
)
def test_branches_and_loops_are_what_they_run(controlled, written):
    layers = {"below": nn.Linear(6, 4), "inner": nn.Linear(4, 4), "above": nn.Linear(4, 3)}
    found, wanted = (
        seeded(Net(lambda s, x, f=f: s.above(f(s, s.below(x).relu())), **layers)) for f in (controlled, written)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (of torch, which traces what it runs)
        result = maps(found, numbers(1, 6), EpsilonPlus())
    assert off(result, maps(wanted, numbers(1, 6), EpsilonPlus())) <= 1e-12
