"""Steps of the grammar of small models that read one tensor: constants, parts, shapes, padding, changes in place."""

from __future__ import annotations

from typing import Any

import torch
from grammar_affine import Operation, Settings, Weights
from grammar_steps import into
from torch import Tensor, nn
from torch.nn import functional as F

CONSTANTS = (0.5, -0.7, 2.0, -1.5)


class Unseen(torch.autograd.Function):
    """ReLU in a way that no composite can see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> Tensor:
        return m * (ctx.saved_tensors[0] > 0)


# --- constants -------------------------------------------------------------------------------------------------------


def _number(choose: Any, shape: tuple[int, ...]) -> Settings:
    return {"c": choose.of(CONSTANTS)}


def _channelwise(s: Settings, *shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"scale": (1, shapes[0][0], *[1] * (len(shapes[0]) - 1))}


def _mask(x: Tensor) -> Tensor:
    """Every third entry of a sample, of batch 1."""
    return (torch.arange(x[0].numel()).reshape(1, *x.shape[1:]) % 3) == 1


ONE = {
    "scale": Operation(
        lambda s, w, x: x * s["c"], "linear", _number,
        {"left": lambda s, w, x: s["c"] * x, "torch": lambda s, w, x: torch.mul(x, s["c"]),
         "div": lambda s, w, x: x / (1 / s["c"]), "tensor": lambda s, w, x: x * x.new_tensor(s["c"]),
         "mul_": lambda s, w, x: x.mul_(s["c"]), "imul_": lambda s, w, x: x.__imul__(s["c"])},
    ),
    "layer_scale": Operation(lambda s, w, x: x * w["scale"], "linear", spellings={
        "left": lambda s, w, x: w["scale"] * x, "expanded": lambda s, w, x: x * w["scale"].expand_as(x),
        "einsum": lambda s, w, x: torch.einsum("nc...,c->nc...", x, w["scale"].flatten()),
    }, weights=_channelwise),
    "shift": Operation(
        lambda s, w, x: x + s["c"], "linear", _number,
        {"left": lambda s, w, x: s["c"] + x, "sub": lambda s, w, x: x - (-s["c"]),
         "tensor": lambda s, w, x: torch.add(torch.full_like(x, s["c"] / 2), x, alpha=1) + s["c"] / 2,
         "alpha": lambda s, w, x: torch.add(x, 1.0, alpha=s["c"]),
         "add_": lambda s, w, x: x.add_(s["c"]), "iadd_": lambda s, w, x: x.__iadd__(s["c"])},
    ),
    "add_bias": Operation(lambda s, w, x: x + w["scale"], "linear", spellings={
        "left": lambda s, w, x: w["scale"] + x, "add_": lambda s, w, x: x.add_(w["scale"]),
    }, weights=_channelwise),
    "complement": Operation(
        lambda s, w, x: 1 - x, "linear",
        spellings={"rsub": lambda s, w, x: torch.rsub(x, 1), "neg": lambda s, w, x: -x + 1,
                   "ones": lambda s, w, x: torch.ones_like(x) - x},
    ),
    "negative": Operation(lambda s, w, x: -x, spellings={
        "torch": lambda s, w, x: torch.neg(x), "mul": lambda s, w, x: x * -1, "neg_": lambda s, w, x: x.neg_(),
    }),
    "reciprocal": Operation(lambda s, w, x: 1 / x, "pass", spellings={
        "method": lambda s, w, x: x.reciprocal(), "torch": lambda s, w, x: torch.reciprocal(x),
    }),
    "mask": Operation(
        lambda s, w, x: torch.where(_mask(x), x.new_tensor(s["c"]), x), "linear",
        lambda choose, shape: {"c": choose.of((0.0, 0.9))},
        {"masked_fill": lambda s, w, x: x.masked_fill(_mask(x), s["c"]),
         "set": into(lambda s, x: x.__setitem__(_mask(x).expand_as(x), s["c"])),
         "product": lambda s, w, x: x * ~_mask(x) + s["c"] * _mask(x).to(x),
         "fill_": lambda s, w, x: x.masked_fill_(_mask(x), s["c"])},
    ),
    "assign": Operation(
        lambda s, w, x: torch.cat([torch.full_like(x[:, : s["k"]], s["c"]), x[:, s["k"] :]], 1), "linear",
        lambda choose, shape: {"k": choose.integer(1, shape[0] - 1), "c": choose.of((0.0, 0.7))}
        if shape[0] > 1 else None,
        {"set": into(lambda s, x: x.__setitem__((slice(None), slice(s["k"])), s["c"])),
         "set_": into(lambda s, x: x.__setitem__((slice(None), slice(s["k"])), s["c"]), False),
         "index_fill": lambda s, w, x: x.index_fill(1, torch.arange(s["k"]), s["c"]),
         "view_": into(lambda s, x: x[:, : s["k"]].fill_(s["c"]), False)},
    ),
}  # fmt: skip

# --- parts and shapes ------------------------------------------------------------------------------------------------


def _parts(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    n = shape[0]
    if n < 2:
        return None
    length = choose.integer(1, n - 1)
    return {"start": choose.integer(0, n - length), "length": length, "n": n}


def _slice(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return x[:, s["start"] : s["start"] + s["length"]]


def _index(s: Settings) -> Tensor:
    return torch.arange(s["start"], s["start"] + s["length"])


def _gathered(s: Settings, w: Weights, x: Tensor) -> Tensor:
    index = _index(s).reshape(1, -1, *[1] * (x.dim() - 2)).expand(len(x), -1, *x.shape[2:])
    return x.gather(1, index)


def _halves(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    return {"which": choose.integer(0, 1)} if shape[0] % 2 == 0 else None


def _pad_settings(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    if len(shape) not in (2, 3):
        return None
    modes = ("zeros", "zeros", "constant") if min(shape[1:]) < 2 else ("zeros", "constant", "reflect", "replicate")
    return {"mode": choose.of(modes), "sides": [1, 1, 0, 1][: 2 * (len(shape) - 1)], "dims": len(shape) - 1}


def _pad(s: Settings, w: Weights, x: Tensor) -> Tensor:
    if s["mode"] in ("zeros", "constant"):
        return F.pad(x, s["sides"], value=0.0 if s["mode"] == "zeros" else 0.8)
    return F.pad(x, s["sides"], mode=s["mode"])


def _pad_module(s: Settings, w: Weights) -> nn.Module:
    name = {"zeros": "Constant", "constant": "Constant", "reflect": "Reflection", "replicate": "Replication"}
    more = {"zeros": (0.0,), "constant": (0.8,)}.get(s["mode"], ())
    return getattr(nn, f"{name[s['mode']]}Pad{s['dims']}d")(tuple(s["sides"]), *more)


def _pad_cat(s: Settings, w: Weights, x: Tensor) -> Tensor:
    for axis in range(s["dims"]):
        before, after = s["sides"][2 * axis : 2 * axis + 2]
        x = x.movedim(-1 - axis, 0)
        value = 0.0 if s["mode"] == "zeros" else 0.8
        x = torch.cat([torch.full_like(x[:1], value)] * before + [x] + [torch.full_like(x[:1], value)] * after)
        x = x.movedim(0, -1 - axis)
    return x


def _axes(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    return {"dims": len(shape)} if len(shape) > 1 else None


def _factors(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    return {"k": 2} if len(shape) == 1 and shape[0] % 2 == 0 and shape[0] > 2 else None


SHAPES = {
    "slice": Operation(
        _slice, "linear", _parts,
        {
            "narrow": lambda s, w, x: x.narrow(1, s["start"], s["length"]),
            "select": lambda s, w, x: x.index_select(1, _index(s)),
            "index": lambda s, w, x: x[:, _index(s)],
            "list": lambda s, w, x: x[:, _index(s).tolist()],
            "gather": _gathered,
            "split": lambda s, w, x: x.split([s["start"], s["length"], s["n"] - s["start"] - s["length"]], 1)[1],
            "unbind": lambda s, w, x: torch.stack(x.unbind(1)[s["start"] : s["start"] + s["length"]], 1),
            "items": lambda s, w, x: torch.stack([x[:, i] for i in _index(s).tolist()], dim=1),
        },
    ),
    "chunk": Operation(
        lambda s, w, x: x[:, s["which"] * (x.shape[1] // 2) :][:, : x.shape[1] // 2], "linear", _halves,
        {"chunk": lambda s, w, x: x.chunk(2, 1)[s["which"]],
         "tensor_split": lambda s, w, x: torch.tensor_split(x, 2, dim=1)[s["which"]],
         "unflatten": lambda s, w, x: x.unflatten(1, (2, -1))[:, s["which"]]},
    ),
    "swap": Operation(
        lambda s, w, x: x.transpose(-1, -2), "linear", _axes,
        {"mT": lambda s, w, x: x.mT, "movedim": lambda s, w, x: x.movedim(-1, -2),
         "permute": lambda s, w, x: x.permute(*range(s["dims"] - 1), s["dims"], s["dims"] - 1),
         "einsum": lambda s, w, x: torch.einsum("...ab->...ba", x)},
    ),
    "flatten": Operation(
        lambda s, w, x: x.flatten(1), "linear", _axes,
        {"reshape": lambda s, w, x: x.reshape(len(x), -1), "torch": lambda s, w, x: torch.flatten(x, 1),
         "view": lambda s, w, x: x.contiguous().view(x.size(0), -1)},
        {"module": lambda s, w: nn.Flatten()},
    ),
    "unflatten": Operation(
        lambda s, w, x: x.unflatten(1, (s["k"], -1)), "linear", _factors,
        {"view": lambda s, w, x: x.reshape(x.shape[0], s["k"], -1), "stack": lambda s, w, x: torch.stack(
            x.chunk(s["k"], 1), 1)},
        {"module": lambda s, w: nn.Unflatten(1, (s["k"], -1))},
    ),
    "pad": Operation(_pad, "linear", _pad_settings, {"cat": _pad_cat}, {"module": _pad_module},
                     fits={"cat": lambda s, shapes: s["mode"] in ("zeros", "constant")}),
    "unsqueeze": Operation(lambda s, w, x: x[..., None], "linear",
                           lambda choose, shape: {} if len(shape) == 1 else None,
                           {"method": lambda s, w, x: x.unsqueeze(-1), "view": lambda s, w, x: x.view(*x.shape, 1)}),
    "upsample": Operation(
        lambda s, w, x: x.repeat_interleave(2, -1), "linear",
        lambda choose, shape: {} if len(shape) == 2 and shape[1] < 5 else None,
        {"interpolate": lambda s, w, x: F.interpolate(x, scale_factor=2),
         "expand": lambda s, w, x: x[..., None].expand(*x.shape, 2).flatten(2),
         "stack": lambda s, w, x: torch.stack([x, x], -1).flatten(-2)},
        {"module": lambda s, w: nn.Upsample(scale_factor=2)},
    ),
    "flip": Operation(lambda s, w, x: x.flip(-1), "linear", _axes, {
        "torch": lambda s, w, x: torch.flip(x, [-1]), "index": lambda s, w, x: x[..., list(range(x.shape[-1]))[::-1]],
    }),
    "roll": Operation(lambda s, w, x: x.roll(1, -1), "linear", _axes,
                      {"cat": lambda s, w, x: torch.cat([x[..., -1:], x[..., :-1]], -1)}),
    "cumsum": Operation(lambda s, w, x: x.cumsum(-1), "linear", _axes, {
        "sums": lambda s, w, x: torch.stack([x[..., : i + 1].sum(-1) for i in range(x.shape[-1])], -1),
    }),
    "same": Operation(
        lambda s, w, x: x.clone(), "linear",
        spellings={"contiguous": lambda s, w, x: x.contiguous(), "ellipsis": lambda s, w, x: x[...],
                   "dropout": lambda s, w, x: F.dropout(x, 0.5, False), "view_as": lambda s, w, x: x.view_as(x),
                   "itself": lambda s, w, x: x, "times": lambda s, w, x: 1.0 * x,
                   "squeezed": lambda s, w, x: x.unsqueeze(0).squeeze(0), "double": lambda s, w, x: x.double()},
        modules={"identity": lambda s, w: nn.Identity(), "module": lambda s, w: nn.Dropout()},
    ),
    "relu_part": Operation(
        lambda s, w, x: torch.cat([x[:, : s["start"]], x[:, s["start"] :].relu()], 1), "pass", _parts,
        {"view": into(lambda s, x: x[:, s["start"] :].relu_()),
         "view_": into(lambda s, x: F.relu(x[:, s["start"] :], inplace=True), False),
         "set": into(lambda s, x: x.__setitem__((slice(None), slice(s["start"], None)), x[:, s["start"] :].relu()))},
    ),
    "silu_part": Operation(
        lambda s, w, x: torch.cat([x[:, : s["start"]], F.silu(x[:, s["start"] :])], 1), "pass", _parts,
        {"view": into(lambda s, x: F.silu(x[:, s["start"] :], inplace=True)),
         "view_": into(lambda s, x: F.silu(x[:, s["start"] :], inplace=True), False)},
    ),
    "glu": Operation(lambda s, w, x: F.glu(x, 1), "glu", lambda choose, shape: {} if shape[0] % 2 == 0 else None,
                     {"written": lambda s, w, x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1))},
                     {"module": lambda s, w: nn.GLU(1)}),
    "unseen": Operation(lambda s, w, x: Unseen.apply(x), "refused"),
}  # fmt: skip
