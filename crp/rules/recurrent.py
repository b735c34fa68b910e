"""Recurrent layers, written out as the operations of every step, which have rules of their own.

What a gate lets pass of a state is a product: `crp.rules.functional.Gate` says which factor takes the relevance. Where
gates are held constant, all of it goes to the state (Arras et al., "Explaining recurrent neural network predictions in
sentiment analysis", WASSA 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

#: What a layer hands from one step to the next: what it returns, and what else it remembers.
State: TypeAlias = tuple[Tensor, ...]
#: From a step's input, the state before, and two weights, perhaps two biases.
Cell: TypeAlias = Callable[..., State]


def _lstm(x: Tensor, state: State, w: Tensor, u: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> State:
    hidden, memory = state
    opened, kept, new, shown = (F.linear(x, w, b) + F.linear(hidden, u, c)).chunk(4, -1)
    memory = kept.sigmoid() * memory + opened.sigmoid() * new.tanh()
    return shown.sigmoid() * memory.tanh(), memory


def _gru(x: Tensor, state: State, w: Tensor, u: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> State:
    (hidden,) = state
    of_input, of_hidden = F.linear(x, w, b).chunk(3, -1), F.linear(hidden, u, c).chunk(3, -1)
    reset, kept = ((one + other).sigmoid() for one, other in zip(of_input[:2], of_hidden[:2], strict=True))
    new = (of_input[2] + reset * of_hidden[2]).tanh()
    return ((1 - kept) * new + kept * hidden,)


def _rnn(
    activation: Callable[[Tensor], Tensor], x: Tensor, state: State, w: Tensor, u: Tensor,
    b: Tensor | None = None, c: Tensor | None = None,
) -> State:  # fmt: skip
    return (activation(F.linear(x, w, b) + F.linear(state[0], u, c)),)


def _cell(cell: Cell, x: Tensor, hx: Any, *parameters: Tensor | None) -> Any:
    """One step, as `torch.lstm_cell` and its like return it."""
    state = cell(x, hx if isinstance(hx, tuple | list) else (hx,), *parameters)
    return state if len(state) > 1 else state[0]


def _layers(cell: Cell, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """All steps of all layers and directions, as `torch.lstm` and its like take and return them.

    Parameters
    ----------
    x : Tensor of shape (steps, batch, features)
        Or (batch, steps, features), as the last argument says; of packed sequences, of shape (steps in all, features).
    *args
        Of packed sequences, how many there are at each step; states; parameters of all layers and directions; whether
        there are biases; number of layers; dropout; whether that is active; whether there are two directions.
    """
    is_packed = not isinstance(args[2], bool)
    hx, parameters, _, n_layers, dropout, training, is_both_ways = args[is_packed : 7 + is_packed]
    axis = 0 if is_packed or not args[7] else 1
    steps = list(torch.split(x, args[0].tolist()) if is_packed else x.unbind(axis))
    states = list(zip(*(part.unbind(0) for part in (hx if isinstance(hx, tuple | list) else (hx,))), strict=True))
    each, last = len(parameters) // len(states), list[State]()
    for number in range(n_layers):
        ways = []
        for backward in range(1 + is_both_ways):
            k = len(last)
            ordered = steps[::-1] if backward else steps
            made, state = _steps(cell, ordered, states[k], parameters[each * k : each * (k + 1)])
            ways.append(made[::-1] if backward else made)
            last.append(state)
        steps = [torch.cat(both, -1) for both in zip(*ways, strict=True)] if is_both_ways else ways[0]
        if training and dropout and number + 1 < n_layers:
            steps = [F.dropout(step, dropout) for step in steps]
    output = torch.cat(steps) if is_packed else torch.stack(steps, axis)
    return output, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _steps(
    cell: Cell, steps: Sequence[Tensor], state: State, parameters: Sequence[Tensor]
) -> tuple[list[Tensor], State]:
    """What a layer returns at each step, and its last state; the longest sequences come first."""
    weights, made = parameters[: len(parameters) // 2 * 2], []
    for x in steps:
        n, is_whole = len(x), len(x) == len(state[0])
        new = cell(x, state if is_whole else tuple(part[:n] for part in state), *weights)
        if len(parameters) > len(weights):  # (what an LSTM returns is projected)
            new = F.linear(new[0], parameters[-1]), *new[1:]
        made.append(new[0])
        pairs = zip(new, state, strict=True)
        state = new if is_whole else tuple(torch.cat([part, before[n:]]) for part, before in pairs)
    return made, state


_CELLS: dict[str, Cell] = {
    "lstm": _lstm, "gru": _gru, "rnn_tanh": partial(_rnn, torch.tanh), "rnn_relu": partial(_rnn, torch.relu),
}  # fmt: skip
#: By name of the function.
RECURRENT: dict[str, Callable[..., Any]] = {
    **{name: partial(_layers, cell) for name, cell in _CELLS.items()},
    **{f"{name}_cell": partial(_cell, cell) for name, cell in _CELLS.items()},
}
