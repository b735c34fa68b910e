"""Affine operations of the grammar of small models: their maths, their weights and the ways in which models spell them.

A function takes the settings of a step, its weights by name, and what it reads. Spellings that end in ``_`` overwrite
what they read first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

Settings = dict[str, Any]
Weights = dict[str, Tensor]
Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Operation:
    """Kind of step of a program.

    Attributes
    ----------
    plain : callable
        ``(settings, weights, *inputs)`` in plain words, out of place; what it means.
    rule : str
        How the reference sends relevance through it.
    settings : callable
        ``(choose, *shapes)``: settings for inputs of these shapes (without batch), or None where it does not fit.
    spellings : dict of str to callable
        Other ways to write ``plain``; ``fits`` says where one is possible.
    modules : dict of str to callable
        ``(settings, weights)``: modules that do the same.
    weights : callable
        ``(settings, *shapes)``: shapes of the weights by name.
    """

    plain: Callable[..., Tensor]
    rule: str = "linear"
    settings: Callable[..., Settings | None] = lambda choose, *shapes: {}
    spellings: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    modules: Mapping[str, Callable[[Settings, Weights], nn.Module]] = field(default_factory=dict)
    weights: Callable[..., dict[str, tuple[int, ...]]] = lambda settings, *shapes: {}
    fits: Mapping[str, Callable[[Settings, Shapes], bool]] = field(default_factory=dict)


# --- weights that are computed in the forward pass -------------------------------------------------------------------

FORMS = ("plain", "plain", "plain", "standardized", "binary", "normed")


def effective(form: str, weight: Tensor) -> Tensor:
    """Weight that the operation uses, of the one that is stored."""
    if form == "plain":
        return weight
    dims = tuple(range(1, weight.dim()))
    if form == "binary":
        return weight.sign() * weight.abs().mean(dims, keepdim=True)
    if form == "standardized" and weight[0].numel() > 2:
        return (weight - weight.mean(dims, keepdim=True)) / (weight.var(dims, keepdim=True) + 1e-3).sqrt()
    return 1.5 * weight / weight.square().sum(dims, keepdim=True).sqrt()


class Form(nn.Module):
    """Parametrization."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, weight: Tensor) -> Tensor:
        return effective(self.form, weight)


class ComputedLinear(nn.Linear):
    form = "plain"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, effective(self.form, self.weight), self.bias)


class ComputedConv1d(nn.Conv1d):
    form = "plain"

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, effective(self.form, self.weight), self.bias)


class ComputedConv2d(nn.Conv2d):
    form = "plain"

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, effective(self.form, self.weight), self.bias)


class ComputedTransposed2d(nn.ConvTranspose2d):
    form = "plain"

    def forward(self, x: Tensor) -> Tensor:
        weight = effective(self.form, self.weight)
        return F.conv_transpose2d(x, weight, self.bias, self.stride, self.padding, self.output_padding, self.groups)


class Sized(nn.Module):
    """Transposed convolution that is told the size of its output."""

    def __init__(self, inner: nn.Module, size: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.size = inner, list(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, output_size=self.size)


def filled(module: nn.Module, s: Settings, w: Weights, computed: bool = False) -> nn.Module:
    """Module with these weights; of a form, by a parametrization or in its own forward."""
    module = module.double()
    with torch.no_grad():
        for name, value in w.items():
            getattr(module, name).copy_(value)
    if computed:
        module.form = s["form"]
    elif s.get("form", "plain") != "plain":
        parametrize.register_parametrization(module, "weight", Form(s["form"]))
    return module


# --- dense layers ----------------------------------------------------------------------------------------------------


def linear(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return F.linear(x, w["weight"], w.get("bias"))


def _linear_module(kind: type[nn.Linear]) -> Callable[[Settings, Weights], nn.Module]:
    return lambda s, w: filled(kind(s["in"], s["out"], "bias" in w), s, w, kind is not nn.Linear)


def _linear_settings(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    if len(shape) > 2:
        return None
    return {"in": shape[-1], "out": choose.integer(2, 5), "bias": choose.flag(), "form": choose.of(FORMS)}


def _addmm(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return torch.addmm(w["bias"], x, w["weight"].t())


def _batched(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return w["weight"].t().expand(len(x), -1, -1)


def _each(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sample by sample."""
    return lambda s, w, x: torch.stack([function(s, w, one) for one in x])


def _rows(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return linear(s, w, x.flatten(0, 1)).unflatten(0, x.shape[:2])


LINEAR_SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "aten": lambda s, w, x: torch.ops.aten.linear(x, w["weight"], w.get("bias")),
    "keywords": lambda s, w, x: F.linear(bias=w.get("bias"), weight=w["weight"], input=x),
    "each": _each(linear),
    "rows": _rows,
    "addmm": _addmm,
    "addmm_scaled": lambda s, w, x: torch.addmm(w["bias"] / 2, x, w["weight"].t() / 4, beta=2, alpha=4),
    "addmm_method": lambda s, w, x: w["bias"].expand(len(x), -1).addmm(x, w["weight"].t()),
    "addmm_aten": lambda s, w, x: torch.ops.aten.addmm(w["bias"], x, w["weight"].t()),
    "baddbmm": lambda s, w, x: torch.baddbmm(w["bias"].expand(len(x), 1, -1), x, _batched(s, w, x)),
    "bilinear": lambda s, w, x: F.bilinear(x, x.new_ones(*x.shape[:-1], 1), w["weight"][..., None], w.get("bias")),
}
#: Without a bias.
MATMUL_SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "operator": lambda s, w, x: x @ w["weight"].t(),
    "matmul": lambda s, w, x: torch.matmul(x, w["weight"].T),
    "method": lambda s, w, x: x.matmul(w["weight"].mT),
    "rmatmul": lambda s, w, x: (w["weight"] @ x.mT).mT,
    "mm": lambda s, w, x: torch.mm(x, w["weight"].t()),
    "bmm": lambda s, w, x: torch.bmm(x, _batched(s, w, x)),
    "einsum": lambda s, w, x: torch.einsum("...i,oi->...o", x, w["weight"]),
    "einsum_swapped": lambda s, w, x: torch.einsum("oi,n...i->n...o", w["weight"], x),
    "inner": lambda s, w, x: torch.inner(x, w["weight"]),
    "tensordot": lambda s, w, x: torch.tensordot(x, w["weight"], dims=([-1], [1])),
}


def _fits_linear(bias: bool | None = None, dims: int | None = None) -> Callable[[Settings, Shapes], bool]:
    """Whether a way of writing it is possible, with or without bias (None: both) for inputs of so many axes."""

    def fits(s: Settings, shapes: Shapes) -> bool:
        return (bias is None or s["bias"] == bias) and (dims is None or len(shapes[0]) == dims)

    return fits


_LINEAR_FITS = {
    "rows": _fits_linear(dims=2),
    **{name: _fits_linear(bias=True, dims=1) for name in LINEAR_SPELLINGS if name.startswith("addmm")},
    "baddbmm": _fits_linear(bias=True, dims=2),
    **{name: _fits_linear(bias=False) for name in MATMUL_SPELLINGS},
    "mm": _fits_linear(bias=False, dims=1),
    "bmm": _fits_linear(bias=False, dims=2),
}


def _linear_weights(s: Settings, *shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"weight": (s["out"], s["in"])} | ({"bias": (s["out"],)} if s["bias"] else {})


# --- convolutions ----------------------------------------------------------------------------------------------------

CONV = {1: F.conv1d, 2: F.conv2d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d}
NAMES = {"zeros": "constant"}


def conv_padded(s: Settings, x: Tensor) -> Tensor:
    """What the convolution reads: pixels that the padding repeats are there each time."""
    return x if s["mode"] == "zeros" else F.pad(x, [s["padding"]] * 2 * s["dims"], s["mode"])


def conv_valid(s: Settings, w: Weights, x: Tensor) -> Tensor:
    """The convolution of what it reads."""
    padding = s["padding"] if s["mode"] == "zeros" else 0
    return CONV[s["dims"]](x, w["weight"], w.get("bias"), s["stride"], padding, s["dilation"], s["groups"])


def conv(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return conv_valid(s, w, conv_padded(s, x))


def _conv_settings(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    dims = len(shape) - 1
    if dims not in CONV:
        return None
    kernel, dilation = choose.integer(1, 3), choose.of((1, 1, 1, 2))
    padding, span = choose.integer(0, 1), dilation * (kernel - 1) + 1
    if min(shape[1:]) + 2 * padding < span:
        return None
    mode = choose.of(("zeros", "zeros", "reflect", "replicate", "circular")) if padding else "zeros"
    if min(shape[1:]) < 2:
        mode = "zeros"
    groups = choose.of((1, 1, shape[0]))
    return {
        "in": shape[0], "out": groups * choose.integer(1, 2) if groups > 1 else choose.integer(2, 4), "dims": dims,
        "kernel": kernel, "stride": choose.integer(1, 2), "padding": padding, "dilation": dilation, "groups": groups,
        "mode": mode, "bias": choose.flag(), "form": choose.of(FORMS),
    }  # fmt: skip


def _conv_weights(s: Settings, *shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    kernel = (s["kernel"],) * s["dims"]
    return {"weight": (s["out"], s["in"] // s["groups"], *kernel)} | ({"bias": (s["out"],)} if s["bias"] else {})


def _conv_module(kinds: Mapping[int, type[Any]], computed: bool) -> Callable[[Settings, Weights], nn.Module]:
    def make(s: Settings, w: Weights) -> nn.Module:
        names = ("in", "out", "kernel", "stride", "padding", "dilation", "groups")
        return filled(kinds[s["dims"]](*(s[name] for name in names), "bias" in w, s["mode"]), s, w, computed)

    return make


def _conv_padded_before(s: Settings, w: Weights, x: Tensor) -> Tensor:
    padded = F.pad(x, [s["padding"]] * 2 * s["dims"], NAMES.get(s["mode"], s["mode"]))
    return CONV[s["dims"]](padded, w["weight"], w.get("bias"), s["stride"], 0, s["dilation"], s["groups"])


def _convolution(s: Settings, w: Weights, x: Tensor) -> Tensor:
    stride, padding, dilation, zero = ([s[n]] * s["dims"] for n in ("stride", "padding", "dilation", "dims"))
    padding = padding if s["mode"] == "zeros" else [0] * s["dims"]
    return torch.convolution(
        conv_padded(s, x), w["weight"], w.get("bias"), stride, padding, dilation, False, [0 for _ in zero], s["groups"]
    )


def _conv_each(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return torch.cat([conv(s, w, one[None]) for one in x])


def _plain_padding(s: Settings, shapes: Shapes) -> bool:
    return s["mode"] == "zeros"


def transposed(s: Settings, w: Weights, x: Tensor) -> Tensor:
    function = TRANSPOSED[s["dims"]]
    return function(x, w["weight"], w.get("bias"), s["stride"], s["padding"], s["output_padding"], s["groups"])


def _transposed_settings(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    dims = len(shape) - 1
    if dims not in TRANSPOSED or max(shape[1:]) > 4:
        return None
    stride = choose.integer(1, 2)
    groups = choose.of((1, 1, shape[0]))
    out = groups * choose.integer(1, 2) if groups > 1 else choose.integer(1, 3)
    return {
        "in": shape[0], "out": out, "dims": dims, "kernel": choose.integer(2, 3), "stride": stride, "groups": groups,
        "padding": choose.integer(0, 1), "output_padding": choose.integer(0, stride - 1), "bias": choose.flag(),
        "form": choose.of(("plain", "plain", "binary")),
    }  # fmt: skip


def _transposed_weights(s: Settings, *shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    kernel = (s["kernel"],) * s["dims"]
    return {"weight": (s["in"], s["out"] // s["groups"], *kernel)} | ({"bias": (s["out"],)} if s["bias"] else {})


def _transposed_module(s: Settings, w: Weights, kinds: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d)) -> nn.Module:
    names = ("in", "out", "kernel", "stride", "padding", "output_padding", "groups")
    made = kinds[s["dims"] - 1](*(s[name] for name in names), "bias" in w)
    return filled(made, s, w, computed=kinds[1] is ComputedTransposed2d)


def _sized(s: Settings, w: Weights) -> nn.Module:
    rest = {**s, "output_padding": 0}
    size = [(n - 1) * s["stride"] - 2 * s["padding"] + s["kernel"] + s["output_padding"] for n in s["space"]]
    return Sized(_transposed_module(rest, w), size)


def _with_space(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    settings = _transposed_settings(choose, shape)
    return settings and {**settings, "space": shape[1:]}


AFFINE = {
    "linear": Operation(
        linear, "dense", _linear_settings, LINEAR_SPELLINGS | MATMUL_SPELLINGS,
        {"module": _linear_module(nn.Linear), "subclass": _linear_module(ComputedLinear)},
        _linear_weights, _LINEAR_FITS,
    ),
    "conv": Operation(
        conv, "convolution", _conv_settings,
        {"padded": _conv_padded_before, "convolution": _convolution, "each": _conv_each, "unbatched": _each(conv)},
        {
            "module": _conv_module({1: nn.Conv1d, 2: nn.Conv2d}, False),
            "subclass": _conv_module({1: ComputedConv1d, 2: ComputedConv2d}, True),
        },
        _conv_weights, {"unbatched": _plain_padding},
    ),
    "transposed": Operation(
        transposed, "convolution", _with_space, {"each": _each(transposed)},
        {
            "module": _transposed_module,
            "sized": _sized,
            "subclass": lambda s, w: _transposed_module(s, w, (None, ComputedTransposed2d)),
        },
        _transposed_weights, {"subclass": lambda s, shapes: s["dims"] == 2},
    ),
}  # fmt: skip
