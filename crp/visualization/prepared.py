"""Pictures as a model takes them: converted, resized, cut and normalized as its weights say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from crp.errors import InputError
from crp.image.reading import as_viewed


class Prepared:
    """A picture as a tensor in 0..1, resized and cut as the weights ask for; tensors and arrays are left alone.

    Pictures are taken as a viewer shows them, see `crp.image.as_viewed`.

    Parameters
    ----------
    mode : {"RGB", "L"}
        What pictures are converted to.
    resize, size : int
        Length of the shorter side, and side of the square in the middle; 0 to leave them.
    interpolation : torchvision.transforms.InterpolationMode, optional
        Bilinear by default.
    """

    def __init__(self, mode: str, resize: int = 0, size: int = 0, interpolation: Any = None) -> None:
        self.mode, self.resize, self.size, self.interpolation = mode, resize, size, interpolation

    def __call__(self, data: Any) -> Any:
        """Tensor of shape (channels, height, width)."""
        if not hasattr(data, "getbands"):
            return data
        from torchvision.transforms import functional as F

        return F.to_tensor(self._cut(as_viewed(data).convert(self.mode), F))

    def decoded(self, picture: Tensor) -> Tensor:
        """The same of a picture that is decoded already: uint8 of shape (channels, height, width), on any device."""
        from torchvision.transforms.v2 import functional as F

        cut: Tensor = self._cut(picture, F)
        return cut.float() / 255

    def _cut(self, picture: Any, F: Any) -> Any:
        """Picture resized and cut, by functions of torchvision that take its kind."""
        from torchvision.transforms import InterpolationMode

        if self.resize:
            picture = F.resize(picture, [self.resize], self.interpolation or InterpolationMode.BILINEAR, antialias=True)
        return F.center_crop(picture, [self.size]) if self.size else picture


class Normalized:
    """Samples of shape (samples, channels, ...) less ``mean``, divided by ``std``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __repr__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"less {mean}, divided by {std}"

    def __call__(self, data: Tensor) -> Tensor:
        """Samples as the model takes them."""
        if len(self.mean) not in (1, data.shape[1]):
            raise InputError(f"--mean has {len(self.mean)} values for {data.shape[1]} channels")
        mean, std = (data.new_tensor(values).view(-1, *[1] * (data.dim() - 2)) for values in (self.mean, self.std))
        return (data - mean) / std
