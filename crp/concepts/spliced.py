r"""Sparse autoencoders, transcoders and dictionaries within a model, so that their latents are concepts.

With :math:`z = \mathrm{encode}(a)` and :math:`\hat a = \mathrm{decode}(z)`, a layer's output :math:`a` is replaced by
:math:`\hat a + (a - \hat a)`, which is the same. Its multiplier :math:`m` then reaches every latent by the ordinary
chain rule: :math:`R_k = z_k\,(d_k \cdot m)` for a linear decoder with directions :math:`d_k` and bias :math:`b`.
Latents, error :math:`(a - \hat a) \cdot m` and bias :math:`b \cdot m` add up to the relevance of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from crp.checks import check_choice
from crp.concepts.ids import check_axis
from crp.errors import InputError, InputTypeError
from crp.layers import ByChainRule, Followed, find_layers, modules_of, put_behind
from crp.layers.devices import is_recording
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
    ValueError
        If the layer is spliced already. While the model runs: if what ``encode`` and ``decode`` return has not the
        shape or the dtype that it must have, does not depend on what they are given, or is another one each time; or if
        they change it in place.
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
    if isinstance(code, type):
        raise InputTypeError(f"code must be an autoencoder, not the class {code.__name__}")
    for method in ("encode", "decode"):
        if not callable(getattr(code, method, None)):
            raise InputTypeError(f"code needs the methods encode and decode; {type(code).__name__} has no {method}")
    check_axis(axis)
    check_choice("reads", reads, Literal["output", "input"])
    find_layers(model, [layer])
    names = Spliced(*(f"{layer}.{part}" for part in Spliced._fields))
    if taken := [name for name in names if name in modules_of(model)]:
        raise InputError(f"the model has a layer {taken[0]!r}; what is spliced behind {layer!r} would have its name")
    with put_behind(model, layer, lambda inner: _SplicedLayer(inner, code, axis, reads)):
        yield names


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
        source = output if self.reads == "output" else next(iter(args), None)
        if not isinstance(source, Tensor):
            raise InputTypeError("the layer's first argument must be a tensor, and not given by name")
        explained = self.decoder(self.code(source))
        if explained.shape != output.shape:
            raise InputError(
                f"decode gives {tuple(explained.shape)} for an output of {tuple(output.shape)}; are its channels on "
                f"axis {self.axis}?"
            )
        if (explained.dtype, explained.device) != (output.dtype, output.device):
            raise InputError(
                f"decode gives {explained.dtype} on {explained.device}; the layer's output is {output.dtype} on "
                f"{output.device}"
            )
        return cast(Tensor, self.sum(explained, self.error(output, source)))


class _Coding(ByChainRule):
    """A part of an autoencoder, whose modules are not those of the model."""

    def __init__(self, coder: _Coder, axis: int) -> None:
        super().__init__()
        self._coder, self.axis = [coder], axis  # (a list, so that a module is a part of the model once)

    def _made(self, method: str, given: Tensor) -> Tensor:
        """What a method of the autoencoder makes of a tensor, with channels on the axis of the layer's."""
        if not -given.dim() < self.axis < given.dim():
            raise InputError(f"axis {self.axis} is none of channels in the shape {tuple(given.shape)}")
        given = given.movedim(self.axis, -1)
        version = None if given.is_inference() else given._version
        made = getattr(self._coder[0], method)(given)
        made = made[0] if isinstance(made, tuple) and made and method == "encode" else made
        if not isinstance(made, Tensor) or made.layout != torch.strided:
            raise InputTypeError(f"{method} must return a dense tensor, not {type(made).__name__}")
        if made.shape[:-1] != given.shape[:-1]:
            raise InputError(
                f"{method} gives {tuple(made.shape)} for {tuple(given.shape)}; only the last axis, that of channels, "
                "may have another size"
            )
        if version is not None and given._version != version:
            raise InputError(f"{method} changes its argument in place, which is the model's; use a copy")
        if given.requires_grad and torch.is_grad_enabled() and not made.requires_grad:
            raise InputError(
                f"what {method} gives, of {made.dtype}, has no gradient to its argument, so that no relevance would "
                "reach the latents; leave out torch.no_grad and detach"
            )
        return made.movedim(-1, self.axis)


class _Encode(_Coding):
    def forward(self, activation: Tensor) -> Tensor:
        """Latents."""
        return self._made("encode", activation)


class _Decode(_Coding):
    def forward(self, latents: Tensor) -> Tensor:
        """What the latents explain."""
        return self._made("decode", latents)


class _Error(_Coding):
    is_checked = False

    def forward(self, output: Tensor, source: Tensor) -> Tensor:
        """What they do not; encoded anew, since the sum must depend on the latents of the one path only."""
        explained = self._explained(source)
        if not self.is_checked and not is_recording():
            with torch.no_grad():
                again = self._explained(source)
            if not torch.allclose(again, explained, rtol=1e-3, atol=1e-3 * _largest(explained), equal_nan=True):
                raise InputError(
                    "the autoencoder gives other numbers for the same activation; is it in evaluation mode, and "
                    "without random numbers?"
                )
            self.is_checked = True
        return output - explained

    def _explained(self, source: Tensor) -> Tensor:
        return self._made("decode", self._made("encode", source))


class _Sum(ByChainRule):
    def forward(self, explained: Tensor, error: Tensor) -> Tensor:
        """Output of the layer."""
        return explained + error


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().nan_to_num().amax()) if values.numel() else 0.0
