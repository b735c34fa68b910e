"""Recurrent layers have the rules of what they consist of: each step written out is the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from preset_cases import LRP_PRESETS, assert_closes, assert_same_map, numbers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import crp.composites as composites

#: (gates are products, of which the paper says nothing)
pytestmark = pytest.mark.filterwarnings("ignore:outside DeepLIFT's rules:UserWarning")

PRESETS = LRP_PRESETS | {name: partial(composites.get, name) for name in ("attn_lrp", "relp", "deeplift")}
DATA = numbers(2, 5, 4, seed=3)
LENGTHS = [3, 5]
LAYERS = {
    "lstm": partial(nn.LSTM, 4, 6),
    "lstm_both_ways": partial(nn.LSTM, 4, 6, 2, bidirectional=True, dropout=0.5),
    "lstm_projected": partial(nn.LSTM, 4, 6, 2, proj_size=3),
    "lstm_no_bias": partial(nn.LSTM, 4, 6, proj_size=3, bias=False),
    "gru": partial(nn.GRU, 4, 6, 2, bidirectional=True),
    "rnn": partial(nn.RNN, 4, 6, 2),
    "rnn_relu": partial(nn.RNN, 4, 6, nonlinearity="relu"),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
    "rnn_relu": partial(nn.RNNCell, nonlinearity="relu"),
}


class Recurrent(nn.Module):
    """A recurrent layer, its states at all steps, and the last ones; perhaps of sequences of several lengths."""

    def __init__(self, make, packed):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.packed = make(batch_first=True), packed
        ways = 1 + self.layer.bidirectional
        self.width = getattr(self.layer, "proj_size", 0) or 6
        self.head = nn.Linear(ways * self.width * 5 + ways * self.layer.num_layers * self.width, 3)
        self.double().eval()

    def states(self, x):
        if not self.packed:
            return self.layer(x)
        packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
        states, last = self.layer(packed)
        return pad_packed_sequence(states, batch_first=True)[0], last

    def forward(self, x):
        states, last = self.states(x)
        last = last[0] if isinstance(last, tuple) else last
        return self.head(torch.cat([states.flatten(1), last.transpose(0, 1).flatten(1)], 1))


class WrittenOut(Recurrent):
    """The same, step by step."""

    def step(self, x, state, end):
        layer, (h, *others) = self.layer, state
        of_input = F.linear(x, getattr(layer, f"weight_ih_{end}"), getattr(layer, f"bias_ih_{end}", None))
        of_state = F.linear(h, getattr(layer, f"weight_hh_{end}"), getattr(layer, f"bias_hh_{end}", None))
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (of_input + of_state).split(6, 1)
            c = torch.sigmoid(f) * others[0] + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            return (F.linear(h, getattr(layer, f"weight_hr_{end}")) if layer.proj_size else h), c
        if isinstance(layer, nn.GRU):
            (r, z, n), (r0, z0, n0) = of_input.split(6, 1), of_state.split(6, 1)
            z = torch.sigmoid(z + z0)
            return ((1 - z) * torch.tanh(n + torch.sigmoid(r + r0) * n0) + z * h,)
        return (getattr(torch, layer.nonlinearity)(of_input + of_state),)

    def states(self, x):
        steps, last = list(x.unbind(1)), []
        lengths = torch.tensor(LENGTHS if self.packed else [5, 5])
        for number in range(self.layer.num_layers):
            ways = []
            for end in ("", "_reverse")[: 1 + self.layer.bidirectional]:
                state, made = [x.new_zeros(len(x), self.width), x.new_zeros(len(x), 6)], {}
                state = state[: 1 + isinstance(self.layer, nn.LSTM)]
                for t in reversed(range(5)) if end else range(5):
                    runs = (t < lengths)[:, None]
                    new = self.step(steps[t], state, f"l{number}{end}")
                    state = [torch.where(runs, one, before) for one, before in zip(new, state, strict=True)]
                    made[t] = torch.where(runs, state[0], 0.0)
                ways.append(made)
                last.append(state[0])
            steps = [torch.cat([made[t] for made in ways], 1) for t in range(5)]
        return torch.stack(steps, 1), torch.stack(last)


@pytest.mark.parametrize("preset", PRESETS)
def test_recurrent_layer_is_what_its_steps_are(preset):
    found, wanted = (made(LAYERS["lstm_both_ways"], False) for made in (Recurrent, WrittenOut))
    assert_same_map(found, wanted, DATA, PRESETS[preset]())


@pytest.mark.parametrize("packed", [False, True], ids=["equal lengths", "packed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_recurrent_layer_of_any_kind_is_what_its_steps_are(layer, packed):
    found, wanted = (made(LAYERS[layer], packed) for made in (Recurrent, WrittenOut))
    for preset in ("attn_lrp", "epsilon_plus", "deeplift"):
        assert_same_map(found, wanted, DATA, PRESETS[preset]())
    assert_closes(found, DATA, PRESETS["epsilon_plus"]())


class Stepwise(nn.Module):
    """A recurrent cell, called once for each step."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = make(4, 6), nn.Linear(6, 3)
        self.double().eval()

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class OfLayer(Stepwise):
    """The same with a layer that holds the cell's parameters."""

    def forward(self, x):
        kind = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU}.get(type(self.cell))
        other = {"nonlinearity": self.cell.nonlinearity} if kind is None else {}
        layer = (kind or nn.RNN)(4, 6, batch_first=True, **other).double().eval()
        layer.load_state_dict({f"{name}_l0": value for name, value in self.cell.state_dict().items()})
        return self.head(layer(x)[0][:, -1])


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cell_is_what_the_layer_is(cell):
    for preset in ("attn_lrp", "epsilon_plus", "deeplift"):
        assert_same_map(Stepwise(CELLS[cell]), OfLayer(CELLS[cell]), DATA, PRESETS[preset]())
