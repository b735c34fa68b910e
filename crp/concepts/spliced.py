r"""Sparse autoencoders, transcoders and dictionaries within a model, so that their latents are concepts.

With :math:`z = \mathrm{encode}(a)` and :math:`\hat a = \mathrm{decode}(z)`, a layer's output :math:`a` is replaced by
:math:`\hat a + (a - \hat a)`, which is the same. Its multiplier :math:`m` then reaches every latent by the ordinary
chain rule: :math:`R_k = z_k\,(d_k \cdot m)` for a linear decoder with directions :math:`d_k` and bias :math:`b`.
Latents, error :math:`(a - \hat a) \cdot m` and bias :math:`b \cdot m` add up to the relevance of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, cast

from torch import Tensor, nn

from crp.checks import check_choice
from crp.concepts.ids import check_axis
from crp.errors import InputError, InputTypeError
from crp.layers import ByChainRule, Followed, put_behind
from crp.layers.interrupts import atomic


class _Coder(Protocol):
    """What `splice` needs of an autoencoder: functions of tensors whose last axis is that of channels."""

    def encode(self, activation: Tensor) -> Any:
        """Latents of shape (..., latents); of a tuple, the first entry."""

    def decode(self, latents: Tensor) -> Tensor:
        """Activation of shape (..., channels)."""


class Spliced(NamedTuple):
    """Names of layers that a splice has made.

    Attributes
    ----------
    code : str
        Latents, on axis 1 of (batch, latents, *space), or on the last axis where channels are.
    error : str
        What the autoencoder does not explain, with the layer's shape.
    decoder : str
        Its output, with the layer's shape.
    """

    code: str
    error: str
    decoder: str


@atomic
def splice(
    model: nn.Module, layer: str, code: _Coder, *, axis: int = 1, reads: Literal["output", "input"] = "output"
) -> Iterator[Spliced]:
    """Let an autoencoder's latents be a layer of the model, inside of the context.

    Predictions and heatmaps do not change. ``{layer}.code`` can be recorded, conditioned and mined as any other layer,
    with `ChannelConcept`; the heatmaps of all latents and of ``{layer}.error`` add up to the whole. No rule of a
    composite acts on the autoencoder. The layer itself is called ``{layer}.layer`` meanwhile.

    Parameters
    ----------
    model : nn.Module
    layer : str
    code : object with ``encode`` and ``decode``
        A sparse autoencoder or a dictionary; a module is moved nowhere and stays as it is.
    axis : int
        Axis of the channels in the layer's output: 1, or -1 for tokens of shape (batch, token, channel).
    reads : {"output", "input"}
        Whether it encodes the layer's output or, as a transcoder, the layer's input, from which it predicts the output.

    Yields
    ------
    Spliced

    Raises
    ------
    KeyError
        If the layer is not in the model.
    TypeError
        If ``code`` has no ``encode`` and ``decode``. Under a composite that propagates relevance itself, as those of
        zennit, attribution of a spliced model raises one as well.

    Examples
    --------
    >>> import torch
    >>> class Halves(nn.Module):
    ...     def encode(self, activation):
    ...         return torch.cat([activation.relu(), (-activation).relu()], -1)
    ...     def decode(self, latents):
    ...         return latents[..., :3] - latents[..., 3:]
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> with splice(net, "0", Halves()) as names:
    ...     print(names.code, net(torch.ones(1, 2)).shape)
    0.code torch.Size([1, 2])
    """
    for method in ("encode", "decode"):
        if not callable(getattr(code, method, None)):
            raise InputTypeError(f"code needs the methods encode and decode; {type(code).__name__} has no {method}")
    check_axis(axis)
    check_choice("reads", reads, Literal["output", "input"])
    with put_behind(model, layer, lambda inner: _SplicedLayer(inner, code, axis, reads)):
        yield Spliced(*(f"{layer}.{part}" for part in Spliced._fields))


def spliced_parts(model: nn.Module, layer: str) -> Spliced | None:
    """Names of a splice's layers where ``layer`` is its latents; None for any other layer."""
    name, _, last = layer.rpartition(".")
    modules = dict(model.named_modules())
    if last != "code" or not isinstance(modules.get(name), _SplicedLayer):
        return None
    return Spliced(*(f"{name}.{part}" for part in Spliced._fields))


class _SplicedLayer(Followed):
    """A layer with an autoencoder behind it."""

    def __init__(self, layer: nn.Module, coder: _Coder, axis: int, reads: str) -> None:
        parts = {"code": _Encode(coder, axis), "decoder": _Decode(coder, axis), "error": _Error(coder, axis)}
        super().__init__(layer, **parts, sum=_Sum())
        self.reads, self.axis = reads, axis
        if isinstance(coder, nn.Module):
            self.coder = coder

    def after(self, output: Tensor, *args: Any) -> Tensor:
        """Output of the layer, as a function of latents and error."""
        source = output if self.reads == "output" else args[0]
        explained = self.decoder(self.code(source))
        if explained.shape != output.shape:
            raise InputError(
                f"decode gives {tuple(explained.shape)} for an output of {tuple(output.shape)}; are its channels on "
                f"axis {self.axis}?"
            )
        return cast(Tensor, self.sum(explained, self.error(output, source)))


class _Coding(ByChainRule):
    """A part of an autoencoder, whose modules are not those of the model."""

    def __init__(self, coder: _Coder, axis: int) -> None:
        super().__init__()
        self._coder, self.axis = [coder], axis  # (a list, so that a module is a part of the model once)

    def encoded(self, activation: Tensor) -> Tensor:
        """Latents of a layer's output."""
        latents = self._coder[0].encode(activation.movedim(self.axis, -1))
        return cast(Tensor, latents[0] if isinstance(latents, tuple) else latents).movedim(-1, self.axis)

    def decoded(self, latents: Tensor) -> Tensor:
        """Activation that latents explain."""
        return self._coder[0].decode(latents.movedim(self.axis, -1)).movedim(-1, self.axis)


class _Encode(_Coding):
    def forward(self, activation: Tensor) -> Tensor:
        """Latents."""
        return self.encoded(activation)


class _Decode(_Coding):
    def forward(self, latents: Tensor) -> Tensor:
        """What the latents explain."""
        return self.decoded(latents)


class _Error(_Coding):
    def forward(self, output: Tensor, source: Tensor) -> Tensor:
        """What they do not; encoded anew, since the sum must depend on the latents of the one path only."""
        return output - self.decoded(self.encoded(source))


class _Sum(ByChainRule):
    def forward(self, explained: Tensor, error: Tensor) -> Tensor:
        """Output of the layer."""
        return explained + error
