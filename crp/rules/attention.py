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

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor

from crp.errors import InputError
from crp.layers.nested import tensors_in
from crp.rules.base import Rule
from crp.rules.exponentials import _LOGARITHMS, _Arriving, _exponential, _OfExponentials, _softmax
from crp.rules.functions import Function, _parameters_of, look_up
from crp.rules.layer import Layer, _no_rule
from crp.rules.notes import Born
from crp.rules.operands import ADDED
from crp.rules.redirect import Redirect
from crp.rules.shared import Part, Parts, _OfMethod, _Shared

#: What becomes of attention's probabilities: held constant, or given half of the relevance.
Attention: TypeAlias = Literal["constant", "split"]


class _Chain(_Shared):
    """The ordinary chain rule, of which each operand gets a part."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__()
        self._parts = parts

    def parts(self, layer: Layer) -> Parts:
        """These parts."""
        return self._parts, {}


def _by_chain_rule(rule: Rule, layer: Layer) -> Tensor | None:
    """Output of a call that is a softmax, attention or the logarithm of a sum of exponentials; None of others.

    Its gradient is the chain rule's, on all of it. Of attention, logits and values get what its rule says.
    """
    made = _whole(rule, layer)
    if isinstance(layer.parts, _OfExponentials) and layer.parts.is_quotient:
        layer.parts = None
    if made is None or rule.attachment is None:
        return None
    if not made.is_unchanged():
        raise InputError(
            f"{layer} ends a softmax that is written out, and something that it is made of was overwritten since: what "
            "it was is gone. Write h = h + 1, say, in place of h += 1"
        )
    leaves, parts = [], list[Part]()
    for one in made.calls():
        copied = one.original
        leaves += one.leaves if copied is None else [cast(Tensor, _Arriving.apply(*one.leaves, copied))]
        of_values = 1.0 if made.share is None else 1 - made.share
        is_exponent = made.is_weighting and not one.below
        part = 1.0 if copied is not None and one.is_weighting else 1 - of_values if is_exponent else of_values
        parts += [part] * len(one.leaves)
    made.chain()
    again = Layer(made.again, leaves, {}, tuple(leaves), look_up(torch.softmax), place=layer.place)
    chain = _Chain(parts).attach(rule.attachment).operate(again)
    is_logarithm = layer.known.canonical in _LOGARITHMS
    born = layer.born or (rule.attachment.notes.born(layer.inputs[0]),)
    is_chosen = any(one & Born.ROUTED and not one & Born.SOFTMAX for one in born)  # (they are weights of experts)
    layer.gives |= 0 if made.is_weighting or is_chosen else Born.LOGARITHM if is_logarithm else Born.SOFTMAX
    y = layer.output.detach()
    output = cast(Tensor, Redirect.apply(y, None, 1, chain, y.new_ones(())))  # (to the last bit as it was)
    layer.parts = None if made.is_weighting or is_logarithm else _softmax(output)
    return output


def _whole(rule: Rule, layer: Layer) -> _OfExponentials | None:
    """The calls that such a function is made by, from the logits on."""
    if layer.module is not None:
        return None
    made: Any = layer.parts
    if isinstance(made, _OfExponentials):
        return made if made.is_quotient and (made.share is not None or not made.is_weighting) else None
    (x, *others), name = layer.inputs, layer.known.canonical
    note = None if others else rule._note_of(x)
    if note is None:
        return None
    made = note.parts
    if name in _LOGARITHMS and isinstance(made, _OfExponentials) and made.is_summed and not made.is_weighting:
        return _OfExponentials(layer.function, layer.args, layer.kwargs, {id(x): made}, [])
    return _exponential(layer) if note.flags & Born.LOGARITHM else None


def _weigh(layer: Layer, attention: Attention) -> None:
    """Note what becomes of exponentials that weight values in a product, if they are divided by their sum later."""
    if isinstance(layer.parts, _OfExponentials) and layer.parts.is_weighting:
        layer.parts.share = 0.5 if attention == "split" else 0.0


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
        self.mode = check_attention(mode)


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

    The operands share the relevance equally. With ``"constant"``, those that a softmax has made are held constant, then
    those of squashing functions, and exponentials, whose sum may divide the product, while others are left, which take
    all. Weights that a ReLU or the like has made cannot be told from values, and share. What chooses among experts, or
    is one over something, is always held constant, except for values that a softmax weights. What is only added, such
    as a bias, has the ordinary chain rule.

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
        _weigh(layer, self.mode)
        return super().operate(layer)

    def parts(self, layer: Layer) -> Parts:
        """Parts of all operands, by what has made their values."""
        position, names = ADDED.get(layer.known.canonical, (-1, ()))
        # (a softmax that is divided by its sum again, as behind a mask, is attention; experts are chosen by an index)
        known = [born & ~Born.ROUTED if born & Born.SOFTMAX else born for born in layer.born]
        sources = dict(zip(map(id, layer.inputs), known, strict=True))
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


class ConstantWeights(_OfMethod, MatrixProduct):
    """The same for methods without a rule for attention: one operand must be such probabilities, which are constant."""

    words = "MatrixProduct(mode='constant')"

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
_HELD = (Born.DIVISOR, Born.ROUTED, Born.SOFTMAX, Born.SQUASHED, Born.EXPONENTIAL)


def _held_constant(born: Sequence[int], mode: Attention) -> int:
    """What makes factors of a product constant (`Born`), from what is known of all factors: at least one is left."""
    held = 0
    if all(one & (Born.SOFTMAX | Born.DIVISOR) for one in born):  # (what a softmax weights are values)
        born = [one & ~Born.DIVISOR for one in born]
    for flags in _HELD if mode == "constant" else _HELD[:2]:
        others = [one & flags for one in born if not one & held]
        held |= flags if any(others) and not all(others) else 0
    return held


def check_attention(mode: Attention) -> Attention:
    """Raise a ValueError if ``mode`` is none."""
    if not isinstance(mode, str) or mode not in ("constant", "split"):
        raise InputError(f'attention is held constant ("constant") or takes half ("split"); got {mode!r}')
    return mode
