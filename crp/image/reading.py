"""Pictures as files hold them, brought to what a viewer shows: upright, 8 bits a channel, grey or RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crp.errors import InputError
from crp.image.colours import as_shown

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
    turned = ImageOps.exif_transpose(picture)
    if turned.mode in _DEEP:
        return Image.fromarray(_eight_bits(np.asarray(turned), turned.mode))
    if turned.mode == "CMYK":
        return _by_profile(turned)
    if turned.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in turned.info:
        layered = turned.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return turned if turned.mode in ("L", "RGB") else turned.convert("L" if turned.mode == "1" else "RGB")


def _eight_bits(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    if mode == "F":
        if broken := int((~np.isfinite(values)).sum()):
            raise InputError(
                f"a picture has {broken} of {values.size} values that are not finite, which have no colour"
            )
        return np.asarray((as_shown(values) * 255).round(), np.uint8)
    # Pillow reads 16-bit files in mode I, too, whose values then do not exceed 16 bits.
    return np.asarray(values.astype(np.int64).clip(0, 65535) >> 8, np.uint8)


def _by_profile(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if profile:
        import io

        from PIL import ImageCms

        try:
            converted = ImageCms.profileToProfile(
                picture, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):  # a damaged profile, without which a viewer shows the picture, too
            return picture.convert("RGB")
        if converted is not None:
            return converted
    return picture.convert("RGB")
