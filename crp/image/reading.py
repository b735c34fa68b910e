"""Pictures as files hold them, brought to what a viewer shows: upright, 8 bits a channel, grey or RGB."""

from __future__ import annotations

import io
import math
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from crp.errors import InputError, InputTypeError
from crp.kinds import check_kind
from crp.values import check_form

#: Modes of Pillow with more than 8 bits a channel.
_DEEP = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I", "F"})


def as_viewed(picture: Image.Image) -> Image.Image:
    """Picture as a viewer shows it.

    A camera stores pictures sideways and says so in the EXIF orientation: they are turned. Of 16 bits, the upper 8 are
    kept. Floating-point pixels within 0..1 are shown as they are, others by their range. Transparent parts are white.
    CMYK is converted by the picture's own colour profile, where it has one.

    Parameters
    ----------
    picture : PIL image

    Returns
    -------
    PIL image
        In mode L or RGB.

    Raises
    ------
    ValueError
        If floating-point pixels are NaN or infinite.
    """
    check_kind("picture", picture, Image.Image, "a PIL image")
    return _in_eight_bits(ImageOps.exif_transpose(picture))


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Picture as a viewer shows it, but for the orientation: a PIL image in mode L or RGB."""
    if picture.mode in _DEEP:
        return Image.fromarray(_eight_bits(np.asarray(picture), picture.mode))
    if picture.mode == "CMYK":
        return _by_profile(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture if picture.mode in ("L", "RGB") else picture.convert("L" if picture.mode == "1" else "RGB")


def as_shown(values: Any) -> Any:
    """Values of an image as they are where all are in 0..1 or of 8 bits, or else brought to 0..1 by their range."""
    _check_shown(values, "the image")
    if values.dtype in (torch.uint8, np.uint8):
        return values / 255
    low, high = float(values.min()), float(values.max())
    return values if low >= 0 and high <= 1 else (values - low) / ((high - low) or 1.0)


def _check_shown(values: Tensor | NDArray[Any], what: str) -> None:
    """Raise an error that begins with ``what`` if values are none, complex or not finite."""
    n_values = math.prod(values.shape)
    if not n_values:
        raise InputError(f"{what} is empty: its shape is {tuple(values.shape)}")
    if values.is_complex() if isinstance(values, Tensor) else values.dtype.kind not in "buif":
        raise InputTypeError(f"{what} must be real numbers to have a colour, not of {values.dtype}")
    if isinstance(values, Tensor):
        check_form(values, what)
    broken = (~torch.isfinite(values)).sum() if isinstance(values, Tensor) else (~np.isfinite(values)).sum()
    if broken:
        raise InputError(f"{what} has {int(broken)} of {n_values} values that are not finite, which have no colour")


def _eight_bits(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    if mode == "F":
        return np.asarray((as_shown(values) * 255).round(), np.uint8)
    # Pillow reads 16-bit files in mode I, too, whose values then do not exceed 16 bits.
    return np.asarray(values.astype(np.int64).clip(0, 65535) >> 8, np.uint8)


def _by_profile(picture: Image.Image) -> Image.Image:
    if profile := picture.info.get("icc_profile"):
        from PIL import ImageCms

        with suppress(ImageCms.PyCMSError, OSError):  # (a damaged profile, without which a viewer shows it, too)
            own, shown = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            return cast(Image.Image, ImageCms.profileToProfile(picture, own, shown, outputMode="RGB"))
    return picture.convert("RGB")
