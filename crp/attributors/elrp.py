r"""ε-LRP as DeepExplain defines it: a ratio at every activation, in place of its derivative."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from crp.composites import Composite, Functions
from crp.composites.base import Canonizers, LayerMap
from crp.notices import warn
from crp.rules import Layer, Rule, Term
from crp.rules.functions import names_with
from crp.rules.stabilizer import Stabilize, stabilizing


class ActivationRatio(Rule):
    r"""Send :math:`m_a = m_y \, f(a) / (a + \varepsilon \operatorname{sign} a)` back through an activation.

    Parameters
    ----------
    epsilon : float or callable
    """

    def __init__(self, epsilon: Stabilize = 1e-4) -> None:
        super().__init__(stabilizing(epsilon, name="epsilon"))

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """One term, the input itself."""
        return [Term(a)]


class ELRP(Composite):
    r"""ε-LRP by modified gradients: :math:`f(a) / (a + \varepsilon \operatorname{sign} a)` in place of :math:`f'(a)`.

    Ancona, Ceolini, Öztireli and Gross, "Towards better understanding of gradient-based attribution methods for deep
    neural networks" (ICLR 2018), proposition 1, with the ε of their DeepExplain. Everything else, max-pooling and
    biases too, is the ordinary chain rule. Conserves relevance, up to biases and ε. In nets of affine layers, each
    followed by an activation, it differs from the ε rule only in where ε is added; the last layer has no ε. In nets
    without activations it is gradient × input, as in DeepExplain, and a warning says so.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon : float or callable
    layer_map : list of (what, rule)
        Rules that come before that of the method.
    """

    def __init__(
        self, canonizers: Canonizers = None, epsilon: Stabilize = 1e-4, layer_map: LayerMap = ()
    ) -> None:  # fmt: skip
        activations = tuple(name for name in (*names_with("identity"), "relu", "leaky_relu") if name != "batch_norm")
        super().__init__(canonizers, layer_map=[*layer_map, (Functions(activations), ActivationRatio(epsilon))])

    def unreached(self, model: nn.Module) -> str | None:
        """Nothing, but a warning: without activations, the method is gradient × input by its definition."""
        warn(f"{type(model).__name__} calls no activation, for which elrp has its rule; the result is gradient × input")
        return None
