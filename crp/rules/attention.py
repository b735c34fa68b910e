r"""Rules for attention, and for products of several operands that depend on the model's input.

A function that is linear in each of :math:`n` operands is homogeneous of degree :math:`n`: the ordinary chain rule
would give its relevance :math:`n` times, so that each operand gets the part :math:`1/n` (AttnLRP, Achtibat et al.,
"AttnLRP: attention-aware layer-wise relevance propagation for transformers", ICML 2024, eq. 13 to 15). Attention
:math:`\operatorname{softmax}(q k^\top + M) \, v` is such a product of probabilities and values, the logits are one of
queries and keys, and softmax has the ordinary chain rule, the first-order terms of its Taylor expansion (eq. 8). So
queries and keys get a quarter of their gradient each, and values half (``"split"``).

``"constant"`` holds the probabilities constant, so that the values take all relevance (CP-LRP: Ali et al., "XAI for
transformers: better explanations through conservative propagation", ICML 2022, section 4.1).

How relevance is split depends on how a model is written: :math:`(q k^\top) v` and :math:`q (k^\top v)` are one
function, but are split in different ways (arXiv:2510.18810). Constant attention does not have that problem, and
explains where information comes from, not why it was attended to.

The parts are taken of what flows back to the operands. The call itself is left as it is, so that fused kernels stay
fused, in both directions. These have no second derivative on the CPU: with ``create_graph=True`` run the model under
``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor

from crp.errors import InputError
from crp.rules.base import Rule
from crp.rules.functions import Function, _parameters_of, look_up
from crp.rules.layer import Layer, _no_rule, changed
from crp.rules.notes import Born, _Exponential, _Weighted
from crp.rules.operands import ADDED
from crp.rules.redirect import Redirect
from crp.rules.shared import Parts, _OfMethod, _Proportional, _Shared
from crp.trace.recorder import tensors_in

#: What becomes of attention's probabilities: held constant, or given half of the relevance.
Attention: TypeAlias = Literal["constant", "split"]


#: Functions that are exponential in an operand.
_EXPONENTIAL = frozenset({"exp", "exp2", "pow", "rpow"})


def _exponential_of(rule: Rule, layer: Layer) -> _Exponential | _Weighted | None:
    """What is remembered of an exponential that a call reads, or of values that it weights; None if it reads none."""
    notes = filter(None, map(rule._note_of, layer.inputs))
    return next((note.parts for note in notes if isinstance(note.parts, _Exponential | _Weighted)), None)


def _weighted(rule: Rule, layer: Layer) -> _Weighted | None:
    """What is remembered of a product, if one of its operands is made of exponentials."""
    exponential, attachment = _exponential_of(rule, layer), rule.attachment
    if not isinstance(exponential, _Exponential) or attachment is None:
        return None
    notes = [rule._note_of(tensor) for tensor in layer.inputs]
    position = next(i for i, note in enumerate(notes) if note is not None and note.parts is exponential)
    weights = layer.inputs[position]

    def attend(shares: Tensor) -> Tensor:
        other = layer.again()
        other.args, other.kwargs, other.inputs = changed(
            (layer.args, layer.kwargs, layer.inputs), lambda tensor: shares if tensor is weights else tensor
        )
        other.born = tuple(Born.SOFTMAX if i == position else born for i, born in enumerate(layer.born))
        attachment.notes.add(shares, Born.SOFTMAX)
        return cast(Tensor, rule.operate(other))

    return _Weighted(weights, exponential, attend)


def _log_base(layer: Layer) -> float | Tensor | None:
    """Logarithm of the base of an exponential function, ``b ** x``; None of others."""
    if layer.module is not None or layer.known.canonical not in _EXPONENTIAL:
        return None
    operands = [*layer.args, *layer.kwargs.values()]
    if layer.known.canonical == "pow" and operands[0] is layer.inputs[0]:  # a power, ``x ** b``
        return None
    base = {"exp": math.e, "exp2": 2}.get(layer.name) or next(v for v in operands if v is not layer.inputs[0])
    if isinstance(base, Tensor):
        return base.detach().log() if base.numel() == 1 else None
    return math.log(base) if isinstance(base, int | float) and base > 0 else None


def _as_softmax(rule: Rule, layer: Layer, made: _Exponential | _Weighted | None) -> Tensor | None:
    """Output of a call that is a softmax, or attention, in other words, with its chain rule; None if it is none.

    Parameters
    ----------
    rule : Rule
        In whose place the chain rule comes.
    layer : Layer
    made : _Exponential, _Weighted or None
        Of the logits of which the output may be the softmax, but for entries that are 0; or values that such weight.
    """
    if made is None or rule.attachment is None:
        return None
    y, is_softmax = layer.output.detach(), isinstance(made, _Exponential)
    weights, exponential, attend = made if isinstance(made, _Weighted) else (y, made, _itself)
    if exponential.source.shape != weights.shape:
        return None
    logits = (exponential.source.to(weights.dtype) * exponential.log_base).masked_fill(weights == 0, -torch.inf)
    rounding = max(1e-5, *(16 * torch.finfo(dtype).eps for dtype in (exponential.source.dtype, y.dtype)))
    # (values that are weighted may cancel out, but for rounding)
    size = y.to(torch.promote_types(y.dtype, torch.float32)).norm() / max(1, y.numel()) ** 0.5
    least = torch.finfo(y.dtype).tiny if is_softmax else rounding * float(size)
    for dim in (dim for dim in reversed(range(logits.dim())) if logits.shape[dim] > 1):
        softmax = Layer(torch.softmax, (logits, dim), {}, (logits,), look_up(torch.softmax), place=layer.place)
        shares = softmax.output.detach()
        with torch.no_grad():
            same = attend(shares)
        if same.shape == y.shape and torch.allclose(same, y, rounding, least):
            layer.gives |= Born.SOFTMAX if is_softmax else 0
            by_softmax = attend(_Proportional().attach(rule.attachment).operate(softmax))
            return cast(Tensor, Redirect.apply(y, None, 1, by_softmax, y.new_ones(())))  # (to the last bit as it was)
    return None


def _itself(shares: Tensor) -> Tensor:
    return shares


class _Attending(_Shared):
    """Base of rules for products of several operands.

    Parameters
    ----------
    mode : "constant" or "split"

    Raises
    ------
    ValueError
        If it is neither.
    """

    settings: ClassVar[tuple[str, ...]] = ("mode",)

    def __init__(self, mode: Attention = "constant") -> None:
        super().__init__()
        self.mode = _check_attention(mode)


class DotProductAttention(_Attending):
    """`torch.nn.functional.scaled_dot_product_attention`, and kernels that are registered as such; see the module.

    With ``"split"``, values and logits get half each; where only one of them depends on the model's input, it gets all.
    What the logits get is shared by queries and keys alike. A mask that depends on the input is a summand of the
    logits.

    Parameters
    ----------
    mode : "constant" or "split"
        Whether the probabilities are held constant.
    """

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Attention that a module without parts calls."""
        return alone and known.has("attention")

    def parts(self, layer: Layer) -> Parts:
        """Parts of queries, keys, values and mask."""
        names, mine = _parameters_of(layer.known, layer.function), {id(tensor) for tensor in layer.inputs}
        if not names:
            raise NotImplementedError(f"LRP has no rule for {layer}; call torch.nn.functional's attention instead")
        positional = names[: len(layer.args)]
        given = {**dict(zip(positional, layer.args, strict=True)), **layer.kwargs}
        operands = layer.known.operands or ("query", "key", "value", "attn_mask")
        q, k, v, mask = (id(given.get(name)) in mine for name in operands)
        values = 0.5 if (q or k or mask) and self.mode == "split" else 1.0
        logits = 1 - values if v else 1.0
        factor = logits / 2 if q and k else logits
        part = dict(zip(operands, (factor, factor, values, logits), strict=True))
        return [part.get(name, 1.0) for name in positional], {name: part.get(name, 1.0) for name in layer.kwargs}


class MatrixProduct(_Attending):
    r"""A product of matrices or vectors, :math:`y = \sum_j u_j v_j`, of which several depend on the model's input.

    Each operand gets the same part of the relevance, and all together all of it. With ``"constant"``, operands that a
    softmax has made are held constant, or else those of squashing functions, or exponentials, whose sum may divide the
    product; so the others take all. Weights that a ReLU or the like has made cannot be told from values, and share.
    What chooses among experts is always held constant. What is only added, such as a bias, has the ordinary chain rule.

    Parameters
    ----------
    mode : "constant" or "split"
        Whether the probabilities are held constant.
    """

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Products of matrices that a module without parts calls."""
        return alone and kind == "product" and known.parse is not None

    def operate(self, layer: Layer) -> Any:
        """Return the product; what exponentials weight may be attention once it is divided by their sum."""
        if self.mode == "split":
            layer.parts = _weighted(self, layer)
        return super().operate(layer)

    def parts(self, layer: Layer) -> Parts:
        """Parts of all operands, by what has made their values."""
        position, names = ADDED.get(layer.known.canonical, (-1, ()))
        sources = dict(zip(map(id, layer.inputs), layer.born, strict=True))
        is_factor = [i != position for i in range(len(layer.args))]
        factors = [arg for arg, is_one in zip(layer.args, is_factor, strict=True) if is_one]
        factors += [value for name, value in layer.kwargs.items() if name not in names]
        born = [sources[id(tensor)] for tensor in tensors_in(factors) if id(tensor) in sources]
        held = _held_constant(born, self.mode)
        part = 1 / max(1, sum(not flags & held for flags in born))

        def share(tensor: Tensor) -> float:
            return 0.0 if sources[id(tensor)] & held else part

        return [share if is_one else 1.0 for is_one in is_factor], {
            name: 1.0 if name in names else share for name in layer.kwargs
        }


class _ConstantWeights(_OfMethod, MatrixProduct):
    """The same for methods without a rule for attention: one operand must be such probabilities, which are constant."""

    def operate(self, layer: Layer) -> Any:
        """Return the product.

        Raises
        ------
        NotImplementedError
            If not one of two operands can be told to be probabilities.
        """
        if len(layer.born) != 2 or not _held_constant(layer.born, "constant"):
            raise NotImplementedError(_no_rule(self.method, layer))
        return super().operate(layer)


#: What made values that are held constant in products, by precedence.
_HELD = (Born.ROUTED, Born.SOFTMAX, Born.SQUASHED, Born.EXPONENTIAL)


def _held_constant(born: Sequence[int], mode: Attention) -> int:
    """What factors of a product that are held constant have in common (`Born`), from what is known of all factors."""
    for flags in _HELD if mode == "constant" else _HELD[:1]:
        if 0 < sum(bool(one & flags) for one in born) < len(born):
            return flags
    return 0


def _check_attention(mode: Attention) -> Attention:
    """Raise a ValueError if ``mode`` is none."""
    if mode not in ("constant", "split"):
        raise InputError(f'attention is held constant ("constant") or takes half ("split"); got {mode!r}')
    return mode
