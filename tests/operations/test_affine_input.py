"""Rules at the input reach it through what only copies its entries, or puts constants beside them."""

import pytest
import torch
from core_cases import deviation, net
from rule_cases import FORMS, affine, as_matrices, jacobian, relevance
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import LRP
from crp.rules import Flat, ZBox


def images():
    """Shape (2, 2, 4, 4), black in places: there a multiplier would lose the relevance."""
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    return x * (torch.rand_like(x) < 0.7)


def filled(x, change):
    """A tensor of zeros that is written to."""
    canvas = x.new_zeros(len(x), 2, 6, 6)
    change(canvas)
    return canvas


def changed(x, change):
    x = x.clone()
    change(x)
    return x


def windows(x):
    """Patches of 2 × 2, as patch embeddings make them."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


MASK = torch.tensor([True, False, True, True])
COPIES = {
    "nothing": lambda x: x,
    "index_put": lambda x: changed(x, lambda y: y.__setitem__((slice(None), 0), 0.3)),
    "canvas": lambda x: filled(x, lambda y: y.__setitem__((..., slice(1, 5), slice(1, 5)), x)),
    "view": lambda x: x.view(-1, 2, 16).reshape(-1, 4, 8).unflatten(2, (4, 2)).reshape(-1, 2, 4, 4),
    "clone": lambda x: x.clone().contiguous(),
    "to": lambda x: x.to(torch.float64).double(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "identity": nn.Identity(),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_value": lambda x: F.pad(x, (1, 1), value=0.7),
    "pad_negative": lambda x: F.pad(x, (-1, 1)),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 2, 1), "reflect"),
    "pad_replicate": lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"),
    "pad_circular": lambda x: F.pad(input=x, pad=(1, 2, 2, 1), mode="circular"),
    "pad_twice": lambda x: F.pad(F.pad(x, (1, 1)), (1, 1, 1, 1), "reflect"),
    "zero_pad_module": nn.ZeroPad2d(1),
    "constant_pad_module": nn.ConstantPad2d(1, -0.4),
    "reflection_pad_module": nn.ReflectionPad2d(1),
    "replication_pad_module": nn.ReplicationPad2d(2),
    "circular_pad_module": nn.CircularPad2d(1),
    "slice": lambda x: x[:, :, 1:],
    "narrow": lambda x: x.narrow(3, 1, 3),
    "strided_slice": lambda x: x[..., ::2, :],
    "index": lambda x: x[:, [1, 0, 1]],
    "index_mask": lambda x: x[:, :, MASK],
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll(1, 2),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "transpose": lambda x: x.transpose(2, 3),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "movedim": lambda x: x.movedim(2, 3),
    "mT": lambda x: x.mT,
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(1, 1, 2, 1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 3),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "windows": windows,
    "unfold": lambda x: x.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(3),
    "unfold_function": lambda x: F.unfold(x, 3, padding=1).mT,
    "flatten": lambda x: x.flatten(1),
    "flatten_module": nn.Flatten(),
    "view_as": lambda x: x.flatten(1).view_as(x),
    "type_as": lambda x: x.type_as(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 0])),
    "take_along_dim": lambda x: x.take_along_dim(torch.tensor([3, 0, 0]).view(1, 1, 1, 3), 3),
    "gather": lambda x: x.gather(3, torch.tensor([3, 0, 0, 1]).expand(len(x), 2, 4, 4)),
    "chunk": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "split": lambda x: torch.cat(torch.split(x, [1, 3], 3), 3),
    "unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "select": lambda x: torch.stack([x.select(1, 0), x[:, 1], x[:, 0]], dim=1),
    "cat_itself": lambda x: torch.cat([x, x], 1),
    "cat_flipped": lambda x: torch.cat([x, x.flip(1)], 2),
    "cat_constant": lambda x: torch.cat([x, torch.linspace(-1, 1, 4, dtype=x.dtype).expand(len(x), 1, 4, 4)], 1),
    "cat_zeros": lambda x: torch.cat((x, torch.zeros_like(x)), dim=2),
    "where": lambda x: torch.where(MASK, x, 0.0),
    "where_constant": lambda x: torch.where(MASK, x, 0.3),
    "masked_fill": lambda x: x.masked_fill(MASK, 0.0),
    "masked_fill_": lambda x: changed(x, lambda y: y.masked_fill_(MASK, 0.3)),
    "times_a_mask": lambda x: x * MASK,
    "token": lambda x: torch.cat([x.new_full((len(x), 1, 8), 0.5), windows(x)], 1),
}


#: Functions that are no mere copies: constants are entries like those of the input, and a black place hands nothing on.
ELSE = {
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "upsample": nn.Upsample(scale_factor=2),
    "triu": lambda x: x.triu(),
    "canvas_copy": lambda x: filled(x, lambda y: y[..., 1:5, 1:5].copy_(x)),
    "canvas_index": lambda x: filled(x, lambda y: y.index_copy_(2, torch.tensor([5, 2, 0, 1]), F.pad(x, (1, 1)))),
}


def layer_for(prepared):
    """A layer that reads the tensor."""
    if prepared.ndim == 4:
        return nn.Conv2d(prepared.shape[1], 3, (2, 3), padding=1).double()
    return nn.Linear(prepared.shape[-1], 3).double()


def deviations(prepare, a, at_input):
    """Forms that are not met; at the input, what is no entry of it takes no part, as zeros of a padding do not."""
    prepared = prepare(a)
    layer, places = layer_for(prepared), jacobian(prepare, torch.zeros_like(a[:1]))
    model = net(lambda s, x: s.layer(prepare(x)), layer=layer)
    m = torch.randn_like(model(a))
    r, (_, w, b) = (m * model(a)).detach(), as_matrices(layer, prepared)
    wrong = {}
    for name, (rule, form) in FORMS.items():
        reached = w * places.any(1) if rule.at_input and at_input else w
        wanted = form(prepared.flatten(1), reached, b, r.flatten(1)).detach() @ places
        found = deviation(relevance(rule, model, a, m), wanted.reshape(a.shape))
        wrong |= {name: found} if not found <= 1e-10 else {}
    return wrong


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_the_input(name):
    assert not deviations(COPIES[name], images(), at_input=True)


@pytest.mark.parametrize("name", ELSE)
def test_tensors_of_which_some_entries_are_the_input(name):
    assert not deviations(ELSE[name], torch.randn(2, 2, 4, 4, dtype=torch.float64), at_input=False)


@pytest.mark.parametrize("name", [*COPIES, *ELSE])
def test_account_closes_behind_copies(name):
    """What black places lose is in it."""
    prepare, a = {**COPIES, **ELSE}[name], images()
    model = net(lambda s, x: s.layer(prepare(x)).flatten(1)[:, :3], layer=layer_for(prepare(a)))
    for rule in (Flat(1e-3), ZBox(-3.0, 2.5, 1e-3)):
        found = CondAttribution(model).absorbed(a, [{"y": 1}], LRP(None, layer_map=affine(rule)))
        torch.testing.assert_close(found.rest, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
