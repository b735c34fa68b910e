"""DeepLIFT: relevance of the differences from a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from crp.checks import check_choice, check_number
from crp.composites.base import Canonizers, Composite, LayerMap
from crp.composites.keywords import _Setting
from crp.composites.registry import register
from crp.composites.selection import Functions, Having, Kind
from crp.errors import InputError, InputTypeError
from crp.layers import referencing
from crp.notices import warn
from crp.rules.deeplift import Affine, BatchNorm, Differences, MaxPool, Rescale, RevealCancel
from crp.rules.functions import Function
from crp.rules.products import (
    NormalizationDifference,
    ProductDifference,
    QuotientDifference,
    SelectionDifference,
    SoftmaxDifference,
    TakenApart,
)
from crp.rules.written_out import WRITTEN_OUT
from crp.values import check_form

Reference: TypeAlias = float | Tensor | Callable[[Tensor], Tensor] | Sequence[Any] | None


@register("deeplift")
class DeepLift(Composite):
    r"""DeepLIFT: what an input's difference from a reference is worth for the output's difference.

    With :math:`\Delta` for the difference from the reference and multipliers :math:`m` as in `crp.rules.deeplift`,
    the relevance is :math:`R = m \, \Delta x` (Shrikumar, Greenside, Kundaje, "Learning important features through
    propagating activation differences", ICML 2017, eq. 2 and 3), also in layers that are recorded, for which it is
    :math:`m \, \Delta a`. It explains saturated activations too, where gradients vanish, and has no jumps, which
    gradient × input has in nets with biases. The result depends on the reference: choose one that means "nothing is
    there". Explain logits, not probabilities (section 3.6).

    Conserves: summation-to-delta, :math:`\sum R = f(x) - f(x_0)` (eq. 1), up to rounding, at the input and in every
    layer through which everything flows. Biases cancel, so that no layer keeps relevance, and batch norm is not merged.

    Products, normalizations, softmax and attention are outside the paper: they are decomposed exactly
    (`crp.rules.products`), and one warning for each call names them, and operations that are not decomposed. In nets
    with layer norm, float64 or a reference that is not constant makes rounding errors smaller.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
        None by default, as none is needed.
    reference : float, Tensor, callable, or list
        A constant; a tensor of shape ``(*input shape)``, ``(1, *input shape)``, or ``(batch, *input shape)``, one for
        each sample; or a function of the data that returns such a tensor (a blurred or shuffled copy). A list of
        these (its tensors with a batch axis), or a tensor with one more axis in front, is a distribution: results of
        `crp.attribution.CondAttribution` are means over it. Nested lists of numbers stand for tensors.
    variant : "rescale" or "reveal_cancel"
        Rule for activations: `crp.rules.deeplift.Rescale`, or `crp.rules.deeplift.RevealCancel`, which sees where
        contributions cancel. (The paper's authors use the former after convolutions and the latter after dense layers
        of genomic nets.)
    layer_map : list of (what, rule)
        Rules that come before those of the method; map functions, as in ``(torch.nn.functional.relu, None)``.

    Raises
    ------
    ValueError
        If ``variant`` is no such word; before the model runs, if the reference does not fit the data.
    TypeError
        If ``reference`` is nothing of this kind.

    Notes
    -----
    Where other implementations differ: DeepExplain takes the gradient where :math:`|\Delta x| \le 10^{-5}`, and for
    max-pooling, so that sums are off there. captum takes the gradient at ``x`` where :math:`|\Delta x| < 10^{-10}`; it
    is wrong where windows of a max-pooling overlap, and where a ReLU and a max-pooling meet without an operation in
    between. Neither has RevealCancel, treats functions such as `F.relu`, or accepts a module that is used twice.

    In the variant ``"reveal_cancel"``, conditions and starts at an affine layer act on its output, where the flow of
    its positive and negative parts has been joined: the layer's own relevance is exact, but below it hands on by
    Rescale. Condition on the activation after it to keep the parts.

    Second derivatives are available, except through what is decomposed with a warning.
    """

    _attachment: Differences
    reference: Any = _Setting()
    variant: Any = _Setting()

    def __init__(
        self,
        canonizers: Canonizers = None,
        *,
        reference: Reference = 0.0,
        variant: Literal["rescale", "reveal_cancel"] = "rescale",
        layer_map: LayerMap = (),
    ) -> None:
        check_choice("variant", variant, Literal["rescale", "reveal_cancel"])
        self.reference = _tensor(reference)
        self.variant = variant
        elementwise = Rescale() if variant == "rescale" else RevealCancel()
        rules: LayerMap = [
            (Having("rescaled"), elementwise),
            (Having("maximum"), MaxPool()),
            (Functions(("batch_norm",)), BatchNorm()),
            (Kind("product"), ProductDifference()),  # (such as a linear layer whose weight depends on the input)
            (Having("bilinear"), ProductDifference()),
            (Having("quotient"), QuotientDifference()),
            (Having("statistics"), NormalizationDifference()),
            (Having("softmax"), SoftmaxDifference()),
            (Functions(("logsumexp",)), SoftmaxDifference()),
            (Having("selection"), SelectionDifference()),
            (Functions(("scaled_dot_product_attention",)), TakenApart()),
            *((Functions((name,)), TakenApart(written)) for name, written in WRITTEN_OUT.items()),
        ]
        if variant == "reveal_cancel":
            rules = [(Kind("convolution"), Affine()), (Kind("dense"), Affine()), *rules]
        super().__init__(canonizers, layer_map=[*layer_map, *rules])
        self._given = list(layer_map)
        self._attachment = Differences()
        self._samples: tuple[list[int], int] | None = None
        self._listed = False

    def members_for(self, data: Tensor) -> list[Composite]:
        """One composite for each reference of ``data``; the mean of their results is that of this one."""
        return [self._member(reference) for reference in self.reference] if self._has_several(data) else [self]

    def _has_several(self, data: Tensor) -> bool:
        """Whether there are several references of data, in a list or stacked in a tensor."""
        chosen = self.reference
        return isinstance(chosen, tuple) or (isinstance(chosen, Tensor) and chosen.dim() == data.dim() + 1)

    def _member(self, reference: Reference) -> DeepLift:
        canonizers = "auto" if self.auto else list(self.canonizers)
        member = DeepLift(canonizers, reference=reference, variant=self.variant, layer_map=self._given)
        member._listed = True
        return member

    def expect(self, samples: list[int], total: int) -> None:
        """Announce which of ``total`` samples the next forward pass has, for references that are given per sample."""
        self._samples = (samples, total)

    def reference_for(self, data: Tensor, number: int) -> Tensor:
        """Reference of the data, in its shape.

        Raises
        ------
        ValueError
            If it does not fit, or there are several references.
        TypeError
            If a callable returns no tensor.
        """
        chosen = self.reference
        if self._has_several(data):
            raise InputError(
                f"this DeepLift has {len(chosen)} references, whose results CondAttribution averages; "
                "within a context of your own, use one of composite.members_for(data) at a time"
            )
        if callable(chosen) and not isinstance(chosen, Tensor):
            chosen = chosen(data.detach())
            if not isinstance(chosen, Tensor):
                raise InputTypeError(f"the reference function must return a tensor, not {chosen!r}")
            if chosen.shape not in (data.shape, data.shape[1:], (1, *data.shape[1:])):
                raise InputError(
                    f"the reference function returned shape {tuple(chosen.shape)} for data of {tuple(data.shape)}"
                )
        if not isinstance(chosen, Tensor):
            return torch.full_like(data, chosen or 0.0).requires_grad_()
        check_form(chosen, "the reference")
        if chosen.is_complex() or not chosen.isfinite().all():
            raise InputError("the reference has NaN, infinite or complex values; give real numbers that are finite")
        reference = chosen.detach().to(data)
        if (
            self._samples is not None
            and len(self._samples[0]) == len(data)
            and len(reference) == self._samples[1]
            and reference.dim() == data.dim()
        ):
            reference = reference[self._samples[0]]
        if self._listed and reference.dim() < data.dim():
            raise InputError(
                f"references in a list have a batch axis; give this of {tuple(chosen.shape)} as {(1, *chosen.shape)}"
            )
        if reference.shape not in (data.shape, data.shape[1:], (1, *data.shape[1:])):
            advice = ""
            if reference.shape[1:] == data.shape[1:] and reference.dim() == data.dim():
                advice = "; for any part of the samples, give one reference for all, or a function of the data"
            raise InputError(
                f"reference of shape {tuple(chosen.shape)} for data of shape {tuple(data.shape)}: it must have that "
                f"shape, {(1, *data.shape[1:])} or {tuple(data.shape[1:])}{advice}"
            )
        return reference.expand(data.shape).requires_grad_()

    def is_method(self, known: Function) -> bool:
        """Whether the ordinary chain rule is the Linear rule for a function."""
        return known.has("linear")

    def unreached(self, model: nn.Module) -> str | None:
        """None: a model without a rule is linear, and DeepLIFT then is gradient times difference."""
        return None

    def _leave(self, module: nn.Module | None = None, args: Any = (), output: Any = None) -> None:
        super()._leave(module, args, output)
        if self._depth or referencing():
            return
        self._samples = None
        outside, self._attachment.outside = self._attachment.outside, {}
        differing, self._attachment.differing = self._attachment.differing, {}
        if output is not None and differing:
            warn(
                f"DeepLift finds other constants than for the reference in {', '.join(differing)}: they depend on the "
                "data by a mask, an index, a choice of layers, or other numbers through which no relevance flows. What "
                "they are worth is no input's, so that relevance need not sum to the output's difference. Choose a "
                "reference, such as a function of the data, for which they are the same"
            )
        if output is None or not outside:
            return
        message = f"outside DeepLIFT's rules: {', '.join(outside)}; differences are split evenly among factors there"
        inexact = [operation for operation, exact in outside.items() if not exact]
        if inexact:
            message += (
                f", and by the ordinary chain rule in {', '.join(inexact)}, so that they do not sum to the output's"
            )
        warn(message)


def _tensor(reference: Reference) -> Any:
    """Nested lists of numbers as tensors, lists of references as tuples, and nothing as zero."""
    if isinstance(reference, int | float | None):
        check_number("the reference", reference or 0.0)
        return float(reference or 0.0)
    if isinstance(reference, Tensor) or callable(reference):
        return reference
    if not isinstance(reference, Sequence) or isinstance(reference, str) or not reference:
        raise InputTypeError(
            f"a reference is a number, a tensor, a function of the data, or a list of these; not {reference!r}"
        )
    if _is_numeric(reference):
        try:
            return torch.tensor(reference, dtype=torch.float64)
        except (TypeError, ValueError):
            pass  # several references of different shapes
    return tuple(map(_tensor, reference))


def _is_numeric(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    return isinstance(value, int | float) and not isinstance(value, bool)
