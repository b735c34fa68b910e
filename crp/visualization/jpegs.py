"""JPEGs decoded by torchcodec where it is installed, and by torchvision otherwise, which will give it up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

#: Bytes of JPEGs: of every marker, of EXIF data, and those behind which no length of a segment stands.
_MARKER, _APP1, _NO_SEGMENTS = 0xFF, 0xE1, (0x01, *range(0xD0, 0xDB), 0xFF)


def decode_jpegs(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    """Pictures in RGB, as they lie in the files; their orientation is not looked at."""
    current = _torchcodec()
    if current is not None:  # (which turns pictures by their EXIF data)
        found: list[Tensor] = current([_without_exif(one) for one in encoded], mode="RGB", device=device)
        return found
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # (torchvision 0.29 announces torchcodec, which installations may lack)
        warnings.simplefilter("ignore", DeprecationWarning)
        if device.type == "cpu":  # (torchvision 0.19 takes one at a time there)
            return [decode_jpeg(one, mode=ImageReadMode.RGB) for one in encoded]
        found = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return list(found)


@cache
def _torchcodec() -> Callable[..., Any] | None:
    """`decode_jpeg` of torchcodec 0.16 and later, which has taken the place of torchvision's; None where it is not."""
    try:
        from torchcodec.decoders import decode_jpeg
    except Exception:  # (ImportError; and RuntimeError, where its libraries do not fit to torch)
        return None
    return cast(Callable[..., Any], decode_jpeg)


def jpeg_library() -> str:
    """Name of the library that decodes."""
    return "torchvision" if _torchcodec() is None else "torchcodec"


def _without_exif(encoded: Tensor) -> Tensor:
    """JPEG without its segments of EXIF data, APP1."""
    content = encoded.numpy()
    kept, at = [content[:2]], 2
    while at + 4 <= len(content) and content[at] == _MARKER and content[at + 1] not in _NO_SEGMENTS:
        end = at + 2 + (int(content[at + 2]) << 8) + int(content[at + 3])
        if content[at + 1] != _APP1:
            kept.append(content[at:end])
        at = end
    return encoded if len(kept) == 1 else torch.from_numpy(np.concatenate([*kept, content[at:]]))
