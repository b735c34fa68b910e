"""Recurrent layers and cells of torch, written out as the dense layers, gates and activations that rules are for.

Of an LSTM, gates are then gates (Arras et al., "Explaining and interpreting LSTMs", 2019, section 11.2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

#: Hidden state, and that of the cell in an LSTM.
State: TypeAlias = tuple[Tensor, ...]
#: From what the input gives, the state, and what a step is weighted with; the next state.
Step: TypeAlias = Callable[..., State]


def _lstm(x: Tensor, state: State, weight: Tensor, bias: Tensor | None, projection: Tensor | None = None) -> State:
    i, f, g, o = (x + F.linear(state[0], weight, bias)).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if projection is None else F.linear(h, projection), c


def _gru(x: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    (r, z, n), (of_r, of_z, of_n) = x.chunk(3, -1), F.linear(state[0], weight, bias).chunk(3, -1)
    z, n = (z + of_z).sigmoid(), (n + (r + of_r).sigmoid() * of_n).tanh()
    return ((1 - z) * n + z * state[0],)


def _rnn(activation: Callable[[Tensor], Tensor], x: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    return (activation(x + F.linear(state[0], weight, bias)),)


def _cell(
    step: Step, x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Any = None
) -> Any:
    """One step, as torch's cells are called."""
    new = step(F.linear(x, w_ih, b_ih), (state,) if isinstance(state, Tensor) else state, w_hh, b_hh)
    return new[0] if len(new) == 1 else new


def _layers(step: Step, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """All steps of all layers, as torch's layers are called, also of packed sequences."""
    if not isinstance(arguments[2], list | tuple):
        arguments = (None, *arguments)
    sizes, state, weights, has_biases, number, dropout, training, is_bidirectional, *is_batch_first = arguments
    axis, directions, states = int(any(is_batch_first)), 1 + is_bidirectional, list[State]()
    each = len(weights) // (number * directions)
    for layer in range(number):
        if layer:
            data = F.dropout(data, dropout, training)
        outputs = []
        for backward in range(directions):
            w_ih, w_hh, *others = weights[each * len(states) : each * (len(states) + 1)]
            (b_ih, b_hh), others = (others[:2], others[2:]) if has_biases else ((None, None), others)
            gates = F.linear(data, w_ih, b_ih)
            steps = gates.unbind(axis) if sizes is None else gates.split_with_sizes(sizes.tolist())
            own = tuple(one[len(states)] for one in ([state] if isinstance(state, Tensor) else state))
            hidden, last = _over_time(partial(step, weight=w_hh, bias=b_hh, **_named(others)), steps, own, backward)
            outputs.append(torch.stack(hidden, axis) if sizes is None else torch.cat(hidden))
            states.append(last)
        data = torch.cat(outputs, -1) if is_bidirectional else outputs[0]
    return data, *map(torch.stack, zip(*states, strict=True))


def _named(others: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"projection": others[0]} if others else {}


def _over_time(step: Step, steps: Sequence[Tensor], state: State, backward: int) -> tuple[list[Tensor], State]:
    """Hidden state after each step, and the last state; sequences that are over, or have not begun, keep theirs."""
    hidden = []
    for x in steps[::-1] if backward else steps:
        rows, others = len(x), len(state[0]) - len(x)
        new = step(x, tuple(one[:rows] for one in state) if others else state)
        hidden.append(new[0])
        state = tuple(map(torch.cat, zip(new, (one[rows:] for one in state), strict=True))) if others else new
    return hidden[::-1] if backward else hidden, state


_STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_rnn, torch.tanh),
    "rnn_relu": partial(_rnn, torch.relu),
}
#: By name of torch's function.
RECURRENT: dict[str, Callable[..., Any]] = {
    **{name: partial(_layers, step) for name, step in _STEPS.items()},
    **{f"{name}_cell": partial(_cell, step) for name, step in _STEPS.items()},
}
