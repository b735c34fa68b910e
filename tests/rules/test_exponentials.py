"""Exponentials that are divided by their sum are a softmax, in whatever way and however late they are summed up."""

from __future__ import annotations

from functools import reduce

import core_cases
import pytest
import torch
from preset_cases import assert_closes, assert_same_map, numbers, off, seeded
from test_attention import explain, lrp
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlusFlat, RelP
from crp.errors import InputError

KINDS = [AttnLRP, RelP, CPLRP, EpsilonPlusFlat]
DATA = numbers(2, 5, 6, seed=3)


def net(attend):
    """Net of attention, which is given queries, keys and values of shape (n, 5, 6)."""

    def wiring(s, x):
        return s.head(attend(s.q(x), s.k(x), s.v(x))).mean(1)

    return seeded(core_cases.Net(wiring, **{name: nn.Linear(6, 6) for name in "qkv"}, head=nn.Linear(6, 3)))


def logits(q, k):
    return q @ k.mT * 6**-0.5


def streamed(q, k, v):
    """Block by block, with a running maximum, as kernels do."""
    top, total = q.new_full((*q.shape[:2], 1), -1e30), q.new_zeros(*q.shape[:2], 1)
    summed = torch.zeros_like(q)
    for keys, values in zip(k.split(2, 1), v.split(2, 1), strict=True):
        scores = logits(q, keys)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        e, scale, top = torch.exp(scores - higher), torch.exp(top - higher), higher
        total, summed = total * scale + e.sum(-1, keepdim=True), summed * scale + e @ values
    return summed / total


def streamed_in_place(q, k, v):
    top, total = q.new_full((*q.shape[:2], 1), -1e30), q.new_zeros(*q.shape[:2], 1)
    summed = torch.zeros_like(q)
    for keys, values in zip(k.split(2, 1), v.split(2, 1), strict=True):
        scores = logits(q, keys)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        scale, top = torch.exp(top - higher), higher
        e = (scores - higher).exp_()
        total = (total * scale).add_(e.sum(-1, keepdim=True))
        summed = (summed * scale).add_(e @ values)
    return summed.div_(total)


def by_blocks(q, k, v):
    es = [logits(q, keys).exp() for keys in k.split(2, 1)]
    total = sum(e.sum(-1, keepdim=True) for e in es)
    return sum(e @ values for e, values in zip(es, v.split(2, 1), strict=True)) / total


def less_logarithm(q, k, v):
    scores = logits(q, k)
    top = scores.amax(-1, keepdim=True)
    return (scores - ((scores - top).exp().sum(-1, keepdim=True).log() + top)).exp() @ v


def guarded(q, k, v):
    e = logits(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-300).clamp_min(1e-300) @ v


def by_keys(q, k, v):
    """A loop over keys."""
    es = [torch.exp((q * k[:, i : i + 1]).sum(-1, keepdim=True) * 6**-0.5) for i in range(5)]
    return sum(e * v[:, i : i + 1] for i, e in enumerate(es)) / sum(es)


def sharpened(q, k, v):
    e = (logits(q, k) / 2).exp() ** 2
    return e / e.sum(-1, keepdim=True) @ v


def by_columns(scores):
    e = scores.exp()
    return e / sum(e[..., i : i + 1] for i in range(5))


def one_by_one(scores):
    e, total = scores.exp(), scores.new_zeros(*scores.shape[:-1], 1)
    for column in e.split(1, -1):
        total += column
    return e / total


def unbound(scores):
    columns = scores.exp().unbind(-1)
    total = torch.stack(columns).sum(0)
    return torch.stack([column / total for column in columns], -1)


def into_a_buffer(scores):
    e = torch.empty_like(scores)
    e[..., :2], e[..., 2:] = scores[..., :2].exp(), scores[..., 2:].exp()
    return e / e.sum(-1, keepdim=True)


def in_halves(scores):
    e = F.pad(scores.exp(), (0, 1))
    left, right = e.chunk(2, -1)
    return (e / (left + right).sum(-1, keepdim=True))[..., :5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softmax", [by_columns, one_by_one, unbound, into_a_buffer, in_halves])
def test_a_softmax_whose_parts_are_added(softmax, kind):
    model, plain = (
        net(lambda q, k, v, share=share: share(logits(q, k)) @ v) for share in (softmax, lambda z: z.softmax(-1))
    )
    assert_same_map(model, plain, DATA, kind())


#: Maps of shape (n, 3, 4, 4) that are weighted by themselves, as by SoftPool, and averaged over windows.
POOLED = {
    "exponentials": lambda x: (x * x.exp()).sum((2, 3)) / x.exp().sum((2, 3)),
    "pools": lambda x: F.avg_pool2d(x * x.exp(), 4) / F.avg_pool2d(x.exp(), 4),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x * (x.exp() / F.avg_pool2d(x.exp(), 4)), 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POOLED)
def test_a_softmax_of_the_same_tensor_that_it_weights(name, kind):
    def pooling(function):
        def wiring(s, x):
            return s.head(function(s.below(x)).flatten(1))

        return seeded(core_cases.Net(wiring, below=nn.Conv2d(2, 3, 1), head=nn.Linear(3, 3)))

    wanted = pooling(lambda x: (x.flatten(2).softmax(-1) * x.flatten(2)).sum(-1))
    assert_same_map(pooling(POOLED[name]), wanted, numbers(2, 2, 4, 4, seed=3), kind())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "attend",
    [sharpened, streamed, streamed_in_place, by_blocks, less_logarithm, guarded, by_keys],
    ids=lambda f: f.__name__,
)
def test_attention_that_is_summed_up_in_parts(attend, kind):
    assert_same_map(net(attend), net(F.scaled_dot_product_attention), DATA, kind())
    assert_closes(net(attend), DATA, kind())


def to_nothing(q, k, v):
    """Attention that may attend to nothing: a logit of 0, whose value is 0."""
    return F.pad(logits(q, k), (0, 1)).softmax(-1)[..., :-1] @ v


def one_and_sum(q, k, v):
    e = logits(q, k).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v


def one_and_sum_later(q, k, v):
    e = logits(q, k).exp()
    return (e @ v) / (1 + e.sum(-1, keepdim=True))


def one_and_sum_less_the_largest(q, k, v):
    scores = logits(q, k)
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    e = (scores - top).exp()
    return e / (torch.exp(-top) + e.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attend", [one_and_sum, one_and_sum_later, one_and_sum_less_the_largest])
def test_attention_to_nothing(attend, kind):
    assert_same_map(net(attend), net(to_nothing), DATA, kind())


MASK = torch.ones(5, 5, dtype=torch.float64).tril()


def behind_a_mask(q, k, v):
    return logits(q, k).masked_fill(MASK == 0, -torch.inf).softmax(-1) @ v


def by_sum(q, k, v):
    p = logits(q, k).softmax(-1) * MASK
    return p / p.sum(-1, keepdim=True) @ v


def by_norm(q, k, v):
    return F.normalize(logits(q, k).softmax(-1).masked_fill(MASK == 0, 0.0), p=1, dim=-1) @ v


def by_sum_later(q, k, v):
    p = logits(q, k).softmax(-1) * MASK
    return (p @ v) / (p.sum(-1, keepdim=True) + 1e-300)


def written_out(q, k, v):
    e = logits(q, k).exp()
    p = e / e.sum(-1, keepdim=True) * MASK
    return p / p.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attend", [by_sum, by_sum_later, by_norm, written_out])
def test_softmax_that_is_masked_and_divided_by_its_sum_again(attend, kind):
    """Under AttnLRP, queries and keys had another share than behind a mask before the softmax."""
    assert_same_map(net(attend), net(behind_a_mask), DATA, kind())
    assert_closes(net(attend), DATA, kind())


@pytest.mark.parametrize("attend", [behind_a_mask, lambda q, k, v: logits(q, k).softmax(-1) * MASK @ v])
@pytest.mark.parametrize("kind", [AttnLRP, RelP, CPLRP])
def test_the_norm_of_what_was_attended_to_is_held_constant(kind, attend):
    def written(q, k, v):
        attended = attend(q, k, v)
        return attended / (attended.pow(2).mean(-1, keepdim=True) + 1e-6).pow(0.5)

    assert_same_map(net(written), net(lambda *qkv: F.rms_norm(attend(*qkv), (6,), eps=1e-6)), DATA, kind())


@pytest.mark.parametrize("kind", [AttnLRP, RelP])
@pytest.mark.parametrize("shares", [lambda z: z.softmax(-1), torch.exp], ids=["softmax", "exp"])
def test_weights_of_experts_that_an_index_chooses_are_held_constant(shares, kind):
    def attend(is_held):
        def mixed(q, k, v):
            p = shares(k)
            best = p.detach().topk(2, -1).indices
            p = p.gather(-1, best)
            p = p / p.sum(-1, keepdim=True)
            experts = torch.stack([q * i + v for i in range(6)], 2)
            return (p.detach() if is_held else p)[:, :, None] @ experts.take_along_dim(best[..., None], 2)

        return lambda *qkv: mixed(*qkv).squeeze(2)

    assert_same_map(net(attend(False)), net(attend(True)), DATA, kind())


def bins(ends):
    return ends[..., 1:] - ends[..., :-1]


@pytest.mark.parametrize(
    "divisor",
    [
        lambda k: k.softmax(-1).cumsum(-1),
        lambda k: bins(F.pad(k.softmax(-1).cumsum(-1), (1, 0))),
        lambda k: k.exp().sum(-1, keepdim=True),
    ],
    ids=["softmax", "bins of a spline", "exponentials"],
)
@pytest.mark.parametrize("kind", [AttnLRP, RelP, EpsilonPlusFlat])
def test_a_sum_of_other_exponentials_is_held_constant_as_any_divisor(divisor, kind):
    """It was taken for that of a softmax, which splines of normalizing flows do not have there."""
    divided = [lambda q, k, v, d=d: q.softmax(-1) / d(k) + v for d in (divisor, lambda k: divisor(k).detach())]
    assert_same_map(*map(net, divided), DATA, kind())


@pytest.mark.parametrize("kind", [AttnLRP, RelP])
def test_exponentials_may_be_computed_twice(kind):
    def less_the_largest(z):
        return z - z.amax(-1, keepdim=True)

    def attend(q, k, v):
        z = logits(q, k)
        return less_the_largest(z).exp() / less_the_largest(z).exp().sum(-1, keepdim=True) @ v

    assert_same_map(net(attend), net(lambda q, k, v: logits(q, k).softmax(-1) @ v), DATA, kind())


#: Edges of a graph of five nodes, each with at least one that ends there.
BEGIN, END = torch.tensor([0, 1, 2, 3, 4, 0, 2]), torch.tensor([1, 2, 3, 4, 0, 2, 1])


class Graph(nn.Module):
    """Attention over the edges of a graph, all at once or edge by edge."""

    def __init__(self, attend):
        super().__init__()
        self.nodes, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 1)
        self.head, self.attend = nn.Linear(6, 3), attend

    def forward(self, x):
        h = self.nodes(x)
        return self.head(self.attend(h, self.left(h), self.right(h)).relu()).mean(1)


def dense(h, left, right):
    edges = torch.zeros(5, 5, dtype=torch.bool)
    edges[END, BEGIN] = True
    return F.leaky_relu(left + right.mT, 0.2).masked_fill(~edges, -torch.inf).softmax(-1) @ h


def summed_at_ends(values):
    return torch.zeros_like(values[:, :5]).index_add(1, END, values)


def by_edges(h, left, right):
    e = F.leaky_relu(left[:, END] + right[:, BEGIN], 0.2)
    top = torch.full_like(left, -1e9).scatter_reduce(1, END[None, :, None].expand_as(e), e.detach(), "amax")
    e = (e - top[:, END]).exp()
    return summed_at_ends(e / (summed_at_ends(e)[:, END] + 1e-300) * h[:, BEGIN])


def by_edges_later(h, left, right):
    e = F.leaky_relu(left[:, END] + right[:, BEGIN], 0.2).exp()
    return summed_at_ends(e * h[:, BEGIN]) / summed_at_ends(e)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attend", [by_edges, by_edges_later])
def test_attention_over_the_edges_of_a_graph(attend, kind):
    assert_same_map(*(seeded(Graph(one)) for one in (attend, dense)), DATA, kind())


@pytest.mark.parametrize("power", [lambda p: p**2, lambda p: p * p], ids=["power", "product"])
def test_probabilities_that_are_sharpened_are_held_constant(power):
    def attend(q, k, v):
        p = power(logits(q, k / 2).softmax(-1))
        return p / p.sum(-1, keepdim=True) @ v

    assert_same_map(net(attend), net(F.scaled_dot_product_attention), DATA, CPLRP())


def largest_and_rest(x):
    top = x.amax(-1, keepdim=True)
    return (x - top).exp().sum(-1, keepdim=True).log() + top


@pytest.mark.parametrize(
    "written",
    [lambda x: x.exp().sum(-1, True).log(), largest_and_rest, lambda x: reduce(torch.logaddexp, x.split(1, -1))],
    ids=["plain", "less_the_largest", "one_after_the_other"],
)
def test_logarithms_of_a_sum_of_exponentials(written):
    """Each gets its share of the gradient; what the logarithm adds to the mean is kept, as by `torch.logsumexp`."""
    x, r = numbers(3, 4), numbers(3, 1, seed=1)
    (found,), kept = explain(written, [x], r, lrp("split"))
    assert off(found, r / x.logsumexp(-1, True) * x.softmax(-1) * x) <= 1e-12
    assert off(kept.flatten(), (r - found.sum(-1, keepdim=True)).flatten()) <= 1e-9


def tapped(wiring, **layers):
    """Net whose layers a, b and c hand on what they are given, to be named."""
    return seeded(core_cases.Net(wiring, **layers, **{name: nn.Identity() for name in "abc"}, head=nn.Linear(6, 3)))


@pytest.mark.parametrize("layer", "abc")
def test_layers_inside_a_softmax_have_what_flows_through_them(layer):
    """They had zeros, and conditions on them were refused."""

    def wiring(s, x):
        e = s.a(s.scores(x).exp())
        return s.head(s.c(e / s.b(e.sum(-1, keepdim=True))) * x)

    model, data = tapped(wiring, scores=nn.Linear(6, 6)), numbers(3, 6)
    p = model.scores(data).detach().softmax(-1)
    m = model.head.weight[1].detach() * data / 2
    of_mean = (p * m).sum(-1, keepdim=True)
    attribution = CondAttribution(model)
    plain, recorded = (attribution(data, [{"y": 1}], AttnLRP(), record_layer=names) for names in ([], [layer]))
    assert off(recorded.heatmap, plain.heatmap) <= 1e-12
    wanted = {"a": p * (m - of_mean), "b": -of_mean, "c": p * m}[layer]
    assert off(recorded.relevances[layer], wanted) <= 1e-12
    concepts = range(wanted.shape[1])
    parts = [attribution(data, [{"y": 1, layer: [i]}], AttnLRP()).heatmap for i in concepts]
    assert off(sum(parts), attribution(data, [{"y": 1, layer: [*concepts]}], AttnLRP()).heatmap) <= 1e-12


def of_sums(s, q, k, v):
    e = s.a(logits(q, k).exp())
    return s.c(e @ v) / s.b(e.sum(-1, keepdim=True))


def of_powers(s, q, k, v):
    e = s.a((logits(q, k) / 2).exp()) ** 2
    return s.c(e) * s.b(1 / e.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attend", [of_sums, of_powers])
def test_layers_inside_attention_change_nothing(attend, kind):
    model = tapped(
        lambda s, x: s.head(attend(s, s.q(x), s.k(x), s.v(x))).mean(1), **{n: nn.Linear(6, 6) for n in "qkv"}
    )
    plain = CondAttribution(model)(DATA, [{"y": 1}], kind())
    for layer in "abc":
        recorded = CondAttribution(model)(DATA, [{"y": 1}], kind(), record_layer=[layer])
        assert off(recorded.heatmap, plain.heatmap) <= 1e-12
        is_held = kind is not AttnLRP and (layer, attend) != ("c", of_sums)
        assert (recorded.relevances[layer].abs().max() == 0) == is_held


def test_several_layers_inside_a_softmax_are_recorded_together():
    model = tapped(
        lambda s, x: s.head(of_sums(s, s.q(x), s.k(x), s.v(x))).mean(1), **{n: nn.Linear(6, 6) for n in "qkv"}
    )
    attribution = CondAttribution(model)
    together = attribution(DATA, [{"y": 1}], AttnLRP(), record_layer=list("abc"))
    for layer in "abc":
        alone = attribution(DATA, [{"y": 1}], AttnLRP(), record_layer=[layer])
        assert off(together.relevances[layer], alone.relevances[layer]) <= 1e-12
    assert off(together.heatmap, alone.heatmap) <= 1e-12


def test_a_layer_whose_exponentials_have_other_readers_beside_a_softmax_is_refused():
    def wiring(s, x):
        e = s.a(s.scores(x).exp())
        return s.head(e / e.sum(-1, keepdim=True) * x) + s.other(e)

    model = tapped(wiring, scores=nn.Linear(6, 6), other=nn.Linear(6, 3))
    CondAttribution(model)(numbers(3, 6), [{"y": 1}], AttnLRP())
    with pytest.raises(InputError, match="cannot be told apart"):
        CondAttribution(model)(numbers(3, 6), [{"y": 1}], AttnLRP(), record_layer=["a"])


def test_a_layer_between_values_that_are_weighted_entry_by_entry_and_their_sum_is_refused():
    def wiring(s, x):
        e = s.scores(x).exp()
        return s.head(s.a(e * x) / e.sum(-1, keepdim=True))

    with pytest.raises(InputError, match="no relevance flows through what is named"):
        CondAttribution(tapped(wiring, scores=nn.Linear(6, 6)))(numbers(3, 6), [{"y": 1}], RelP(), record_layer=["a"])


class Masking(nn.Module):
    def forward(self, p):
        return p * MASK.new_tensor([1, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("layer", ["softmax", "masking"])
def test_a_softmax_that_is_recorded_has_what_flows_through_it(layer):
    def wiring(s, x):
        p = s.masking(s.softmax(s.scores(x)))
        return s.head(p / p.sum(-1, keepdim=True) * x)

    layers = {"scores": nn.Linear(6, 6), "softmax": nn.Softmax(-1), "masking": Masking(), "head": nn.Linear(6, 3)}
    model, data = seeded(core_cases.Net(wiring, **layers)), numbers(3, 6)
    attribution = CondAttribution(model)
    plain, recorded = (attribution(data, [{"y": 1}], AttnLRP(), record_layer=names) for names in ([], [layer]))
    assert off(recorded.heatmap, plain.heatmap) <= 1e-12
    assert recorded.relevances[layer].abs().max() > 0
    parts = [attribution(data, [{"y": 1, layer: [i]}], AttnLRP()).heatmap for i in range(6)]
    only = attribution(data, [{"y": 1, layer: list(range(6))}], AttnLRP()).heatmap
    assert only.abs().max() > 0 and off(sum(parts), only) <= 1e-9


def of_a_copy(q, k, v):
    e = logits(q, k).exp()
    return e / e.sum(-1, keepdim=True).clone().add_(1e-3) @ v


def of_an_exponent(q, k, v):
    scores = logits(q, k)
    e = scores.exp()
    scores.mul_(2)
    return e @ v / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attend", [of_a_copy, of_an_exponent])
def test_a_softmax_of_what_was_overwritten_since_is_refused(attend, kind):
    with pytest.raises(InputError, match=r"a softmax that is written out, and something .* was overwritten"):
        CondAttribution(net(attend))(DATA, [{"y": 1}], kind())
