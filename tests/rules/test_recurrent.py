"""Recurrent layers and cells of torch are the dense layers, gates and activations that they consist of."""

from __future__ import annotations

import pytest
import torch
from core_cases import Net
from preset_cases import assert_closes, assert_same_map, numbers, off, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlus, EpsilonPlusFlat, UniformLRP0

DATA = numbers(2, 5, 6)
KINDS = [EpsilonPlus, EpsilonPlusFlat, CPLRP, AttnLRP, UniformLRP0]


def lstm(cell, x, state):
    h, c = state or (x.new_zeros(len(x), cell.hidden_size),) * 2
    z = F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
    i, f, g, o = torch.chunk(z, 4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(cell, x, state):
    h = x.new_zeros(len(x), cell.hidden_size) if state is None else state[0]
    r, z, n = F.linear(x, cell.weight_ih, cell.bias_ih).chunk(3, 1)
    of_r, of_z, of_n = F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, 1)
    z = torch.sigmoid(z + of_z)
    return ((1 - z) * torch.tanh(n + torch.sigmoid(r + of_r) * of_n) + z * h,)


def rnn(cell, x, state):
    h = x.new_zeros(len(x), cell.hidden_size) if state is None else state[0]
    return (torch.tanh(F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)),)


def of_torch(cell, x, state):
    new = cell(x, state[0] if state and len(state) == 1 else state)
    return new if isinstance(new, tuple) else (new,)


def by_steps(step):
    def wiring(s, x):
        state = None
        for one in x.unbind(1):
            state = step(s.part, one, state)
        return s.head(state[0])

    return wiring


def by_layer(s, x):
    return s.head(s.part(x)[0][:, -1])


CASES = {"lstm": (nn.LSTM, nn.LSTMCell, lstm), "gru": (nn.GRU, nn.GRUCell, gru), "rnn": (nn.RNN, nn.RNNCell, rnn)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_layers_and_cells_are_the_cell_written_out(name, kind):
    """They had no rule, and were given the ordinary chain rule with a warning."""
    layer, cell, step = CASES[name]
    written = seeded(Net(by_steps(step), part=cell(6, 4), head=nn.Linear(4, 3)))
    assert_same_map(seeded(Net(by_steps(of_torch), part=cell(6, 4), head=nn.Linear(4, 3))), written, DATA, kind())
    of_layer = seeded(Net(by_layer, part=layer(6, 4, batch_first=True), head=nn.Linear(4, 3)))
    assert_same_map(of_layer, written, DATA, kind())
    if kind is not EpsilonPlusFlat:
        assert_closes(of_layer, DATA, kind())


#: Layers of other settings, and whether data are packed.
LAYERS = {
    "two_layers_both_ways": (lambda: nn.LSTM(6, 4, 2, bidirectional=True, dropout=0.5), False),
    "projected": (lambda: nn.LSTM(6, 4, 2, proj_size=3, bias=False, bidirectional=True), False),
    "packed": (lambda: nn.LSTM(6, 4, 2, bidirectional=True), True),
    "packed_gru": (lambda: nn.GRU(6, 4, bidirectional=True, bias=False), True),
    "by_relu": (lambda: nn.RNN(6, 4, 2, nonlinearity="relu", bidirectional=True), True),
}


def results(layer, data, is_packed):
    given = pack_padded_sequence(data, torch.tensor([5, 3]), enforce_sorted=False) if is_packed else data
    output, state = layer(given)
    output = pad_packed_sequence(output)[0] if is_packed else output
    return [output, *(state if isinstance(state, tuple) else [state])]


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_states_and_gradients_are_those_of_torch(name):
    make, is_packed = LAYERS[name]
    layer = seeded(make())
    wanted = results(layer, DATA.transpose(0, 1), is_packed)
    composite = AttnLRP()
    with composite.context(layer):
        leaf = DATA.transpose(0, 1).clone().requires_grad_()
        found = results(layer, leaf, is_packed)
        with composite.inactive():
            (gradient,) = torch.autograd.grad(sum(one.square().sum() for one in found), leaf)
    plain = DATA.transpose(0, 1).clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(one.square().sum() for one in results(layer, plain, is_packed)), plain)
    assert all(off(one.detach(), other.detach()) <= 1e-12 for one, other in zip(found, wanted, strict=True))
    assert off(gradient, expected) <= 1e-9


def test_a_layer_that_is_named_has_what_is_said():
    net = seeded(Net(by_layer, part=nn.LSTM(6, 4, batch_first=True), head=nn.Linear(4, 3)))
    leaf = DATA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    for what in (nn.LSTM, "part"):
        composite = UniformLRP0(layer_map=[(what, None)])
        assert off(CondAttribution(net)(DATA, [{"y": 1}], composite).heatmap, (DATA * gradient).sum(1)) <= 1e-12
