"""What may be wrong with a call of `random_calls`, and where an error was raised."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from random_calls import Call, Drawing
from torch import Tensor

import crp
from crp.composites import EpsilonPlus

PACKAGE = Path(crp.__file__).parent


@lru_cache
def _raises(file: str) -> frozenset[int]:
    """Lines of statements that raise, in a file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    raising = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return frozenset(line for node in raising for line in range(node.lineno, (node.end_lineno or 0) + 1))


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a statement of this package, and is not one of torch or Python."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    file = last.tb_frame.f_code.co_filename
    return PACKAGE in Path(file).parents and last.tb_lineno in _raises(file)


# --- faults ---------------------------------------------------------------------------------------------------------


def _change(data: Any, function: Callable[[Tensor], Any]) -> Any:
    """The first tensor changed."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, dict):
        return {key: function(value) if i == 0 else value for i, (key, value) in enumerate(data.items())}
    return type(data)([function(data[0]), *data[1:]])


def _with_another(data: Any) -> Any:
    return {**data, "w": 1.0} if isinstance(data, dict) else (*data, 1.0, 2.0)


def _without_one(data: Any) -> Any:
    return dict([*data.items()][1:]) if isinstance(data, dict) else data[1:]


def _nan(x: Tensor) -> Tensor:
    x = x.detach().clone()
    x[(0,) * x.dim()] = torch.nan
    return x


def _other(x: Tensor) -> Tensor:
    return x.detach().to(torch.float16 if x.dtype != torch.float16 else torch.float32)


DATA: dict[str, Callable[..., Any]] = {
    "nan": _nan,
    "infinite": lambda x: _nan(x).nan_to_num(nan=torch.inf),
    "another dtype": _other,
    "integers": lambda x: x.detach().long(),
    "complex": lambda x: x.detach().to(torch.complex128),
    "an array": lambda x: x.detach().float().numpy(),
    "numbers in lists": lambda x: x.tolist(),
    "none": lambda x: None,
    "no samples": lambda x: x[:0],
    "features": lambda x, axis=1: x.detach().repeat_interleave(2, axis),
    "a single sample": lambda x: x[0],
    "another axis": lambda x: x[..., None],
    "text": lambda x: "data",
    "sparse": lambda x: x.detach().to_sparse(),
    "meta": lambda x: x.detach().to("meta"),
}
CONDITIONS: dict[str, Callable[[Drawing, list[Any]], Any]] = {
    "a dict": lambda d, c: c[0],
    "none at all": lambda d, c: [],
    "not a dict": lambda d, c: [*c, d.draw.choice([3, None, "y", [("y", 1)]])],
    "in a list": lambda d, c: [c],
    "nothing": lambda d, c: None,
    "layer": lambda d, c: [*c[:-1], {**c[-1], d.draw.choice(["nope", "", "fc.weight", "conv1#", "#0"]): [0]}],
    "call": lambda d, c: [*c[:-1], {**c[-1], "%s#7": [0]}],
    "name": lambda d, c: [*c[:-1], {**c[-1], d.draw.choice([0, None, 1.5, ("conv1",)]): [0]}],
}
TARGETS: list[Any] = [
    99, -50, [0, 77], [], "1", "y", 1.0, [0.5], None, {0}, {0: 1}, [[0, 1], [2]], np.array([0.0]), torch.tensor([]),
    torch.tensor([1.0]), [True], b"1", slice(1), ..., [None], [(0, 0, 0, 0, 0)], [("a",)], [()], 2**80,
]  # fmt: skip
IDS: list[Any] = [
    99, [-50], "0", "a", 1.0, [0.5], None, {0: "a"}, [[0, 1], [2]], np.array([0.5]), torch.tensor([1.5]), [True],
    torch.tensor([True, False]), slice(1), ..., [None], b"0", 2**80, [(0, 0)],
]  # fmt: skip
INITIAL: list[Any] = [
    "1", 1 + 2j, float("nan"), float("inf"), torch.ones(7, 9, 11), torch.ones(2, 3, dtype=torch.complex128), [1.0],
    np.ones((1, 3)), {}, lambda y: None, lambda y: y.sum() * torch.nan, lambda y: "1", lambda y: torch.ones(7, 9, 11),
    torch.tensor(torch.inf),
]  # fmt: skip
MASKS: list[Any] = [
    3, "mask", [], {}, {"nope": 1}, lambda *a: None, lambda *a: 3, lambda *a: lambda g: None,
    lambda *a: lambda g: g[:0],
    lambda *a: lambda g: g * torch.nan, lambda *a: lambda g: g.to(torch.complex128), lambda *a: lambda g: g.tolist(),
    lambda *a: lambda g: g.to("meta"), lambda *a: lambda g: g.detach().float().numpy(),
]  # fmt: skip
OTHERS: dict[str, list[Any]] = {
    "record_layer": ["conv1", 3, None, ["nope"], [3], [None], ["fc#9"], [""], ["fc.bias"], [["fc"]]],
    "start_layer": ["nope", 3, "", ["fc"], "fc.weight", "fc#9", True],
    "composite": ["epsilon_plus", EpsilonPlus, 3, [EpsilonPlus()], lambda: None],
    "on_device": ["xyz", 3.5, "", "cuda:99", True, []],
    "batch_size": [0, -1, 2.5, "2", None],
    "explain": [7, "nope", [], 1.5, [None], True, ["x", "nope"]],
}


def spoil(drawing: Drawing, call: Call) -> bool:
    """Make one thing of a right call wrong; False where this one cannot be made so."""
    draw, given = drawing.draw, call.arguments
    what = draw.choice(["data", "data", "arguments", "conditions", "y", "ids", "init_rel", "mask_map", *OTHERS])
    if what == "data":
        name = draw.choice(list(DATA))
        if name in ("infinite", "nan") and "explain" in given:
            return False  # (an input that is passed on may have them)
        # (a list holds samples, which have no batch axis)
        change = partial(DATA[name], axis=0) if name == "features" and isinstance(given["data"], list) else DATA[name]
        given["data"], call.wrong = _change(given["data"], change), f"data: {name}"
    elif what == "arguments":
        if isinstance(given["data"], Tensor | list):
            return False
        given["data"] = draw.choice([_with_another, _without_one])(given["data"])
        call.wrong = "arguments"
    elif what == "conditions":
        name = draw.choice(list(CONDITIONS))
        given["conditions"] = CONDITIONS[name](drawing, [*given["conditions"]])
        if name == "call":
            layer = draw.choice([name for name, _ in call.model.named_children()])
            last = given["conditions"][-1]
            given["conditions"][-1] = {key.replace("%s", layer): value for key, value in last.items()}
        call.wrong = f"conditions: {name}"
    elif what == "y":
        conditions = [{**condition} for condition in given["conditions"]]
        conditions[-1]["y"] = draw.choice(TARGETS)
        if given.get("start_layer") or (conditions[-1]["y"] is None and "init_rel" in given):
            return False
        given["conditions"], call.wrong = conditions, f"y: {conditions[-1]['y']!r}"
    elif what == "ids":
        conditions = [{**condition} for condition in given["conditions"]]
        layers = [name for name in conditions[-1] if name != "y"]
        if not layers or isinstance(given.get("mask_map"), dict):
            return False
        conditions[-1][layers[0]] = draw.choice(IDS)
        given["conditions"], call.wrong = conditions, f"ids: {conditions[-1]}"
    elif what == "mask_map":
        if not any(meant.masks for meant in call.meant):
            return False
        number = draw.randrange(len(MASKS))
        given["mask_map"], call.wrong = MASKS[number], f"mask {number}"
    elif what == "init_rel":
        number = draw.randrange(len(INITIAL))
        given["init_rel"], call.wrong = INITIAL[number], f"init_rel {number}"
    elif (what == "batch_size" and call.kind != "generate") or (
        call.kind == "absorbed" and what in ("record_layer", "on_device")
    ):
        return False
    else:
        given[what] = draw.choice(OTHERS[what])
        call.wrong = f"{what}: {given[what]!r}"
    return True
