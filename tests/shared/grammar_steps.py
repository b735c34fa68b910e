"""Steps of the grammar of small models that are no affine operations: activations, pooling, norms, shapes, products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from grammar_affine import Operation, Settings, Weights
from torch import Tensor, nn
from torch.nn import functional as F

MAX_SIZE = 80


def unary(plain: Callable[[Tensor], Tensor], rule: str, modules: dict[str, Callable[[], nn.Module]], **spellings: Any):
    """Operation without settings and weights."""
    return Operation(
        lambda s, w, x: plain(x), rule,
        spellings={name: lambda s, w, x, f=f: f(x) for name, f in spellings.items()},
        modules={name: lambda s, w, f=f: f() for name, f in modules.items()},
    )  # fmt: skip


# --- elementwise -----------------------------------------------------------------------------------------------------


class WrittenGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class WrittenSiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


ACTIVATIONS = {
    "relu": unary(
        torch.relu, "pass", {"module": nn.ReLU, "module_": lambda: nn.ReLU(inplace=True)},
        F=F.relu, method=lambda x: x.relu(), clamp=lambda x: x.clamp(min=0), clamp_min=lambda x: torch.clamp_min(x, 0),
        maximum=lambda x: torch.maximum(x, torch.zeros_like(x)), threshold=lambda x: F.threshold(x, 0.0, 0.0),
        mask=lambda x: x * (x > 0), written=lambda x: (x + x.abs()) / 2,
        where=lambda x: torch.where(x > 0, x, 0.0), aten=torch.ops.aten.relu,
        method_=lambda x: x.relu_(), F_=lambda x: F.relu(x, inplace=True), clamp_=lambda x: x.clamp_(min=0),
        positional_=lambda x: F.relu(x, True),
    ),
    "leaky": unary(F.leaky_relu, "pass", {"module": nn.LeakyReLU}, where=lambda x: torch.where(x > 0, x, 0.01 * x)),
    "abs": unary(torch.abs, "pass", {}, method=lambda x: x.abs(), builtin=abs, method_=lambda x: x.abs_()),
    "gelu": unary(F.gelu, "pass", {"module": nn.GELU}, written=lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "gelu_tanh": unary(lambda x: F.gelu(x, approximate="tanh"), "pass",
                       {"module": lambda: nn.GELU("tanh"), "written": WrittenGELU}),
    "silu": unary(
        F.silu, "pass", {"module": nn.SiLU, "module_": lambda: nn.SiLU(inplace=True), "written": WrittenSiLU},
        product=lambda x: x * torch.sigmoid(x), quotient=lambda x: x / (1 + torch.exp(-x)),
        F_=lambda x: F.silu(x, inplace=True),
    ),
    "tanh": unary(torch.tanh, "pass", {"module": nn.Tanh}, method=lambda x: x.tanh(), method_=lambda x: x.tanh_()),
    "softplus": unary(F.softplus, "pass", {"module": nn.Softplus}, log1p=lambda x: torch.log1p(torch.exp(x))),
    "elu": unary(F.elu, "pass", {"module": nn.ELU, "module_": lambda: nn.ELU(inplace=True)}),
    "relu6": unary(F.relu6, "pass", {"module": nn.ReLU6}, clamp=lambda x: x.clamp(0, 6)),
    "hardswish": unary(F.hardswish, "pass", {"module": nn.Hardswish}, written=lambda x: x * F.relu6(x + 3) / 6),
    "mish": unary(F.mish, "pass", {"module": nn.Mish}, written=lambda x: x * torch.tanh(F.softplus(x))),
    "softsign": unary(F.softsign, "pass", {"module": nn.Softsign}, written=lambda x: x / (1 + x.abs())),
    "clamp": unary(lambda x: x.clamp(-0.8, 1.1), "pass", {"module": lambda: nn.Hardtanh(-0.8, 1.1)},
                   hardtanh=lambda x: F.hardtanh(x, -0.8, 1.1), method_=lambda x: x.clamp_(-0.8, 1.1)),
    "square": unary(torch.square, "pass", {}, pow=lambda x: x**2, product=lambda x: x * x, pow_=lambda x: x.pow_(2)),
    "exp": unary(torch.exp, "pass", {}, method=lambda x: x.exp()),
    "normalize": unary(lambda x: F.normalize(x, dim=1), "pass", {},
                       written=lambda x: x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)),
    "sigmoid": unary(torch.sigmoid, "squash", {"module": nn.Sigmoid}, method=lambda x: x.sigmoid(),
                     special=torch.special.expit, method_=lambda x: x.sigmoid_(),
                     quotient=lambda x: 1 / (1 + torch.exp(-x)), tanh=lambda x: 0.5 * (1 + torch.tanh(x / 2))),
    "hardsigmoid": unary(F.hardsigmoid, "squash", {"module": nn.Hardsigmoid}, relu6=lambda x: F.relu6(x + 3) / 6,
                         clamp=lambda x: (x / 6 + 0.5).clamp(0, 1)),
}  # fmt: skip

# --- pooling ---------------------------------------------------------------------------------------------------------


def _pool_settings(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    if len(shape) not in (2, 3) or min(shape[1:]) < 2:
        return None
    kernel = 2 if min(shape[1:]) < 3 else choose.integer(2, 3)
    return {"dims": len(shape) - 1, "kernel": kernel, "stride": choose.integer(1, 2), "padding": choose.integer(0, 1),
            "ceil_mode": choose.flag()}  # fmt: skip


def _pool(kind: str, **more: Any) -> Callable[..., Tensor]:
    def pool(s: Settings, w: Weights, x: Tensor) -> Tensor:
        function = getattr(F, f"{kind}_pool{s['dims']}d")
        return function(x, s["kernel"], s["stride"], s["padding"], ceil_mode=s["ceil_mode"], **more)

    return pool


def _pool_module(kind: str) -> Callable[[Settings, Weights], nn.Module]:
    def make(s: Settings, w: Weights) -> nn.Module:
        module = getattr(nn, f"{kind}Pool{s['dims']}d")
        return module(s["kernel"], s["stride"], s["padding"], ceil_mode=s["ceil_mode"])

    return make


def _with_indices(s: Settings, w: Weights, x: Tensor) -> Tensor:
    function = getattr(F, f"max_pool{s['dims']}d")
    return function(x, s["kernel"], s["stride"], s["padding"], ceil_mode=s["ceil_mode"], return_indices=True)[0]


def _adaptive(kind: str) -> Operation:
    def settings(choose: Any, shape: tuple[int, ...]) -> Settings | None:
        return {"dims": len(shape) - 1, "size": choose.integer(1, 2)} if len(shape) in (2, 3) else None

    def pool(s: Settings, w: Weights, x: Tensor) -> Tensor:
        return getattr(F, f"adaptive_{kind}_pool{s['dims']}d")(x, s["size"])

    def module(s: Settings, w: Weights) -> nn.Module:
        return getattr(nn, f"Adaptive{kind.capitalize()}Pool{s['dims']}d")(s["size"])

    return Operation(pool, "winner" if kind == "max" else "linear", settings, {}, {"module": module})


def _space(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    return {"dims": tuple(range(2, len(shape) + 1)), "keep": choose.flag()} if len(shape) in (2, 3) else None


def _global(s: Settings, w: Weights, x: Tensor) -> Tensor:
    pooled = getattr(F, f"adaptive_avg_pool{len(s['dims'])}d")(x, 1)
    return pooled if s["keep"] else torch.flatten(pooled, 1)


def _flat_mean(s: Settings, w: Weights, x: Tensor) -> Tensor:
    pooled = x.flatten(2).mean(-1)
    return pooled[(..., *[None] * len(s["dims"]))] if s["keep"] else pooled


POOLING = {
    "max_pool": Operation(
        _pool("max"), "winner", _pool_settings, {"indices": _with_indices}, {"module": _pool_module("Max")}
    ),
    "avg_pool": Operation(_pool("avg"), "linear", _pool_settings, {}, {"module": _pool_module("Avg")}),
    "adaptive_max": _adaptive("max"),
    "adaptive_avg": _adaptive("avg"),
    "mean": Operation(
        lambda s, w, x: x.mean(s["dims"], keepdim=s["keep"]), "linear", _space,
        {
            "global": _global,
            "flat": _flat_mean,
            "sum": lambda s, w, x: x.sum(s["dims"], keepdim=s["keep"]) / x[0, 0].numel(),
        },
    ),
    "amax": Operation(lambda s, w, x: x.amax(s["dims"], keepdim=s["keep"]), "winner", _space),
    "max": Operation(lambda s, w, x: x.max(1).values, "winner",
                     lambda choose, shape: {} if len(shape) > 1 else None,
                     {"keepdim": lambda s, w, x: torch.max(x, 1, keepdim=True)[0].squeeze(1),
                      "sorted": lambda s, w, x: x.sort(1).values[:, -1]}),
    "sum": Operation(lambda s, w, x: x.sum(1), "linear", lambda choose, shape: {} if len(shape) > 1 else None,
                     {"einsum": lambda s, w, x: torch.einsum("nc...->n...", x),
                      "unbind": lambda s, w, x: sum(x.unbind(1)), "cumsum": lambda s, w, x: x.cumsum(1)[:, -1]}),
}  # fmt: skip

# --- norms -----------------------------------------------------------------------------------------------------------


def _norm_weights(s: Settings, *shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"weight": (s["size"],), "bias": (s["size"],)} if s["affine"] else {}


def _affine(w: Weights, y: Tensor) -> Tensor:
    return y * w["weight"] + w["bias"] if w else y


def _written_norm(s: Settings, w: Weights, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return _affine(w, centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + s["eps"]))


def _written_rms_norm(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s["eps"]) * w.get("weight", 1.0))


def _norm_by_variance(s: Settings, w: Weights, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return _affine(w, centred * (x.var(-1, keepdim=True, unbiased=False) + s["eps"]).rsqrt())


def _norm_by_var_mean(s: Settings, w: Weights, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return _affine(w, (x - mean) / (var + s["eps"]) ** 0.5)


def _norm_by_squares(s: Settings, w: Weights, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return _affine(w, (x - mean) / (x.square().mean(-1, keepdim=True) - mean**2 + s["eps"]).sqrt())


def _rms_norm_by_length(s: Settings, w: Weights, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * w.get("weight", 1.0) / (length**2 / x.shape[-1] + s["eps"]).sqrt()


def _rms_norm_by_einsum(s: Settings, w: Weights, x: Tensor) -> Tensor:
    mean = torch.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    return w.get("weight", 1.0) * x * torch.rsqrt(mean + s["eps"])


def _group_norm_by_batch_norm(s: Settings, w: Weights, x: Tensor) -> Tensor:
    grouped = x.reshape(1, len(x) * s["groups"], -1)
    y = F.batch_norm(grouped, None, None, training=True, eps=s["eps"]).reshape(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    return y * w["weight"].reshape(shape) + w["bias"].reshape(shape) if w else y


def _written_group_norm(s: Settings, w: Weights, x: Tensor) -> Tensor:
    grouped = x.unflatten(1, (s["groups"], -1)).flatten(2)
    y = _written_norm({"eps": s["eps"]}, {}, grouped).reshape(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    return torch.addcmul(w["bias"].reshape(shape), y, w["weight"].reshape(shape)) if w else y


def _fill(module: nn.Module, w: Weights) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for name, value in w.items():
            getattr(module, name).copy_(value)
    return module


def _norm_settings(choose: Any, shape: tuple[int, ...], axis: int, **more: Any) -> Settings | None:
    if shape[axis] < 2:
        return None
    return {"size": shape[axis], "affine": choose.flag(), "eps": 1e-2, **more}


def _batch_norm(s: Settings, w: Weights, x: Tensor) -> Tensor:
    return F.batch_norm(x, w["running_mean"], w["running_var"], w["weight"], w["bias"], False, 0.1, s["eps"])


def _groups(choose: Any, shape: tuple[int, ...]) -> Settings | None:
    groups = [n for n in (1, 2, 3) if shape[0] % n == 0 and math.prod(shape) > n]
    return _norm_settings(choose, shape, 0, groups=choose.of(groups)) if groups else None


NORMS = {
    "layer_norm": Operation(
        lambda s, w, x: F.layer_norm(x, (s["size"],), w.get("weight"), w.get("bias"), s["eps"]), "norm",
        lambda choose, shape: _norm_settings(choose, shape, -1),
        {"written": _written_norm, "variance": _norm_by_variance, "var_mean": _norm_by_var_mean,
         "squares": _norm_by_squares},
        {"module": lambda s, w: _fill(nn.LayerNorm(s["size"], s["eps"], bool(w)), w)}, _norm_weights,
    ),
    "rms_norm": Operation(
        lambda s, w, x: F.rms_norm(x, (s["size"],), w.get("weight"), s["eps"]), "norm",
        lambda choose, shape: _norm_settings(choose, shape, -1),
        {"written": _written_rms_norm, "length": _rms_norm_by_length, "einsum": _rms_norm_by_einsum},
        {"module": lambda s, w: _fill(nn.RMSNorm(s["size"], s["eps"], bool(w)), w)},
        lambda s, *shapes: {"weight": (s["size"],)} if s["affine"] else {},
    ),
    "group_norm": Operation(
        lambda s, w, x: F.group_norm(x, s["groups"], w.get("weight"), w.get("bias"), s["eps"]), "norm", _groups,
        {"written": _written_group_norm, "batch_norm": _group_norm_by_batch_norm},
        {"module": lambda s, w: _fill(nn.GroupNorm(s["groups"], s["size"], s["eps"], bool(w)), w)}, _norm_weights,
    ),
    "batch_norm": Operation(
        _batch_norm, "batch_norm", lambda choose, shape: {"size": shape[0], "eps": 1e-3, "dims": len(shape)}, {},
        {"module": lambda s, w: _fill(getattr(nn, f"BatchNorm{max(s['dims'] - 1, 1)}d")(s["size"], s["eps"]), w)},
        lambda s, *shapes: dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (s["size"],)),
    ),
}  # fmt: skip


# --- two operands ----------------------------------------------------------------------------------------------------


def same_shape(choose: Any, *shapes: tuple[int, ...]) -> Settings | None:
    return {} if len(set(shapes)) == 1 else None


def _broadcast(choose: Any, a: tuple[int, ...], b: tuple[int, ...]) -> Settings | None:
    fits = len(a) == len(b) and all(n in (m, 1) for m, n in zip(a, b, strict=True))
    return {} if fits else None


def _part(choose: Any, *shapes: tuple[int, ...]) -> Settings | None:
    fits = len(set(shapes)) == 1 and shapes[0][0] > 1
    return {"k": choose.integer(1, shapes[0][0] - 1), "value": choose.of((0.0, 0.7, -1.2))} if fits else None


def into(change: Callable[..., Any], copies: bool = True) -> Callable[..., Tensor]:
    """Step that changes a part of its first operand, or of a copy."""

    def step(s: Settings, w: Weights, x: Tensor, *others: Tensor) -> Tensor:
        x = x.clone() if copies else x
        change(s, x, *others)
        return x

    return step


def _set(s: Settings, x: Tensor, y: Tensor) -> None:
    x[:, : s["k"]] = y[:, : s["k"]]


def _add_part(s: Settings, x: Tensor, y: Tensor) -> None:
    x[:, : s["k"]] += y[:, : s["k"]]


def _cat_settings(choose: Any, a: tuple[int, ...], b: tuple[int, ...]) -> Settings | None:
    return {} if a[1:] == b[1:] and len(a) == len(b) else None


def _gate(mode: str) -> Callable[..., Tensor]:
    return lambda s, w, x, g: {"mul": torch.mul, "multiply": torch.multiply}[mode](x, g)


def _positive(s: Settings, w: Weights, a: Tensor, b: Tensor) -> Tensor:
    return a / b


COMBINING = {
    "add": Operation(
        lambda s, w, a, b: a + b, "linear", _broadcast,
        {"torch": lambda s, w, a, b: torch.add(a, b), "method": lambda s, w, a, b: b.add(a),
         "sum": lambda s, w, a, b: sum([a, b]), "stack": lambda s, w, a, b: torch.stack([a, b]).sum(0),
         "add_": lambda s, w, a, b: a.add_(b), "iadd_": lambda s, w, a, b: a.__iadd__(b)},
        fits={"stack": lambda s, shapes: shapes[0] == shapes[1]},
    ),
    "sub": Operation(
        lambda s, w, a, b: a - b, "linear", _broadcast,
        {"alpha": lambda s, w, a, b: torch.add(a, b, alpha=-1), "neg": lambda s, w, a, b: -b + a,
         "rsub": lambda s, w, a, b: torch.rsub(b, a), "sub_": lambda s, w, a, b: a.sub_(b)},
    ),
    "cat": Operation(
        lambda s, w, a, b: torch.cat([a, b], 1), "linear", _cat_settings,
        {"tuple": lambda s, w, a, b: torch.concat((a, b), dim=1),
         "keyword": lambda s, w, a, b: torch.cat(tensors=[a, b], dim=1)},
    ),
    "stack": Operation(
        lambda s, w, a, b: torch.stack([a, b], 1), "linear",
        lambda choose, a, b: {} if a == b and len(a) < 3 else None,
        {"cat": lambda s, w, a, b: torch.cat([a[:, None], b.unsqueeze(1)], 1)},
    ),
    "replace": Operation(
        lambda s, w, a, b: torch.cat([b[:, : s["k"]], a[:, s["k"] :]], 1), "linear", _part,
        {"set": into(_set), "set_": into(_set, False),
         "scatter": lambda s, w, a, b: torch.slice_scatter(a, b[:, : s["k"]], 1, 0, s["k"])},
    ),
    "add_part": Operation(
        lambda s, w, a, b: torch.cat([a[:, : s["k"]] + b[:, : s["k"]], a[:, s["k"] :]], 1), "linear", _part,
        {"set": into(_add_part), "set_": into(_add_part, False)},
    ),
    "maximum": Operation(lambda s, w, a, b: torch.maximum(a, b), "maximum", same_shape,
                         {"max": lambda s, w, a, b: torch.max(a, b)}),
    "product": Operation(
        lambda s, w, a, b: a * b, "gate", _broadcast,
        {"swapped": lambda s, w, a, b: b * a, "torch": _gate("mul"), "multiply": _gate("multiply"),
         "einsum": lambda s, w, a, b: torch.einsum("n...,n...->n...", a, b),
         "addcmul": lambda s, w, a, b: torch.addcmul(torch.zeros_like(a), a, b),
         "mul_": lambda s, w, a, b: a.mul_(b), "imul_": lambda s, w, a, b: a.__imul__(b)},
    ),
    "quotient": Operation(_positive, "quotient", _broadcast,
                          {"torch": lambda s, w, a, b: torch.div(a, b), "div_": lambda s, w, a, b: a.div_(b)}),
    "outer": Operation(lambda s, w, a, b: a.flatten(2) @ b.flatten(2).mT, "weighted",
                       lambda choose, a, b: {} if a == b and len(a) > 1 else None,
                       {"einsum": lambda s, w, a, b: torch.einsum("ncl,ndl->ncd", a.flatten(2), b.flatten(2))}),
}  # fmt: skip
