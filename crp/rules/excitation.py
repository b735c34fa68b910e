r"""Excitation backprop: a probability that travels from winning neurons to those that excited them.

Zhang, Bargal, Lin, Brandt, Shen and Sclaroff, "Top-down neural attention by excitation backprop", IJCV 126 (2018),
first at ECCV 2016. A winner :math:`i` of the layer above picks input :math:`j` with the probability
:math:`P(j \mid i) = a_j w_{ij}^+ / \sum_{j'} a_{j'} w_{ij'}^+`, so that (eq. 10 is this in matrices)

.. math:: P_j = \sum_i P(j \mid i) P_i .

In the terms of this package :math:`P` is relevance, with an initial relevance of 1. The bias never takes part: no
input can be picked through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from crp.checks import check_choice
from crp.rules.layer import Layer, Modifier, negative, positive
from crp.rules.lrp import LRPRule
from crp.rules.stabilizer import Stabilize
from crp.rules.terms import Term

Signed = Literal["split", "as_is", "shift"]


class Excitation(LRPRule):
    r"""Excitation backprop, :math:`P_j = \sum_i \frac{a_j w_{ij}^+}{\sum_{j'} a_{j'} w_{ij'}^+} P_i`.

    Conserves relevance wherever an output has an excitatory input; one that has none (:math:`0/0`) hands nothing on.
    In ReLU nets without bias all of them do, and probabilities sum to 1 in every layer.

    The method is for inputs that are not negative, as behind a ReLU. For others, such as normalised pixels, there is
    no rule in the paper, and implementations differ; ``signed`` chooses one. The three are the same where no input is
    negative.

    Parameters
    ----------
    signed : "split", "as_is" or "shift"
        ``"split"`` counts negative inputs with negative weights as excitatory, :math:`a_j^+ w_{ij}^+ + a_j^- w_{ij}^-`
        (zennit). ``"as_is"`` leaves the formula as it is, so that there may be negative "probabilities", and
        denominators close to 0 (TorchRay). ``"shift"`` puts :math:`a_j - \min_{j'} a_{j'}` in place of :math:`a_j`
        where that minimum is negative (Greydanus' PyTorch port, which takes the minimum over the whole batch; here it
        is each sample's own, so that samples do not depend on each other).
    stabilizer : float or callable
        Not needed: denominators are not smaller than what they divide, except for ``signed="as_is"``.

    Raises
    ------
    ValueError
        If ``signed`` is something else, or the stabilizer is negative or not finite.
    """

    settings: ClassVar[tuple[str, ...]] = ("signed", "stabilizer")

    def __init__(self, signed: Signed = "split", stabilizer: Stabilize = 0.0) -> None:
        super().__init__(stabilizer)
        check_choice("signed", signed, Signed)
        self.signed = signed

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the excitatory contributions."""
        return self._contributions(layer, a, positive, negative)

    def _contributions(self, layer: Layer, a: Tensor, up: Modifier, down: Modifier) -> Tensor:
        """Contributions through weights ``up``, and of what is negative in the input, if taken apart, ``down``."""
        if self.signed == "split":
            above, below = layer.split_by_sign(a)
            z = layer(above, up, bias=False)
            return z if below is None else z + layer(below, down, bias=False)
        if layer.at_input:
            a = a * _shifted(layer.input)
        return layer(a, up, bias=False)

    def stands_at_input(self, layer: Layer) -> bool:
        """Whether the input is shifted: an input of 0 then has a share, which no multiplier expresses."""
        return self.signed == "shift" and _is_signed(layer.inputs[0])


class ContrastiveExcitation(Excitation):
    r"""Contrastive excitation backprop: what speaks for the outputs minus what speaks against them.

    .. math:: P_j = \sum_i \left( \frac{a_j w_{ij}^+}{\sum_{j'} a_{j'} w_{ij'}^+}
        - \frac{a_j w_{ij}^-}{\sum_{j'} a_{j'} w_{ij'}^-} \right) P_i

    Zhang et al. (2018), section 3.3: the second part is the excitation backprop of a dual output, whose weights have
    the opposite sign. Both parts are normalised; they sum to 0 where inputs speak for and against an output. For one
    layer, mostly the classifier; `Excitation` is for all others.

    Parameters
    ----------
    signed, stabilizer
        As in `Excitation`.
    """

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """Excitation through the weights, and minus that through their negatives."""
        against = self._contributions(layer, a, negative, positive)
        return [Term(self.surrogate(layer, a)), Term(against, -1.0)]


def _is_signed(a: Tensor) -> bool:
    return bool((a.detach() < 0).any())


def _shifted(a: Tensor) -> Tensor:
    """Input minus each sample's minimum, where that is negative."""
    least = a.flatten(1).amin(1).clamp(max=0)
    return a - least.reshape(-1, *(1,) * (a.dim() - 1))
