"""Pictures of every kind that data sets hold: each has the colours that a viewer shows, through the file and back."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crp.visualization.prepared import Prepared

#: Four colours, in blocks that JPEG keeps apart.
COLOURS = np.array([[[200, 30, 40], [20, 160, 60]], [[30, 50, 190], [230, 220, 210]]], np.uint8)
PICTURE = COLOURS.repeat(16, 0).repeat(16, 1)
#: The middle of each block.
MIDDLES = (slice(8, None, 16), slice(8, None, 16))


def shown(path: Path) -> np.ndarray:
    """Picture of a file as a model takes it, in 0..255."""
    with Image.open(path) as file:
        tensor = Prepared("RGB")(file)
    return (tensor.permute(1, 2, 0).numpy() * 255).round().astype(int)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_16_bits(values: np.ndarray, colour_type: int) -> bytes:
    """File of 16 bits a channel, which Pillow reads and does not write for colours."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("quality", [95, 100])
def test_a_cmyk_jpeg_has_its_colours(tmp_path, quality):
    """Ink without a profile is turned into light as by a viewer, and not taken for its opposite."""
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    cmyk.save(tmp_path / "a.jpg", quality=quality, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.mode == "CMYK"
    assert np.abs(shown(tmp_path / "a.jpg")[MIDDLES] - COLOURS).max() <= 12


def test_a_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path):
    """Adobe stores 255 less the ink, and says so in a marker of its own, which Pillow writes and reads."""
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    buffer = io.BytesIO()
    cmyk.save(buffer, "JPEG", quality=100, subsampling=0)
    content = buffer.getvalue()
    assert b"Adobe" in content
    (tmp_path / "adobe.jpg").write_bytes(content)
    black = shown(tmp_path / "adobe.jpg")[MIDDLES]
    assert black[1, 1].min() > 180, "the light block is light"
    assert black[0, 0].argmax() == 0 and black[0, 1].argmax() == 1 and black[1, 0].argmax() == 2


@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "a colour is transparent"])
def test_a_palette_png_has_its_colours(tmp_path, transparent):
    palette = Image.fromarray(PICTURE).quantize(4)
    index = palette.getpixel((8, 8))
    palette.save(tmp_path / "p.png", **({"transparency": index} if transparent else {}))
    with Image.open(tmp_path / "p.png") as file:
        assert file.mode == "P"
    expected = PICTURE.astype(int).copy()
    if transparent:
        expected[:16, :16] = 255
    assert np.array_equal(shown(tmp_path / "p.png"), expected)


@pytest.mark.parametrize("colour_type", [0, 2, 6], ids=["grey", "colours", "colours and opacity"])
def test_a_png_of_16_bits_has_the_upper_8(tmp_path, colour_type):
    values = PICTURE.astype(np.uint16) * 256 + 77
    if colour_type == 0:
        values = values[..., 0]
    elif colour_type == 6:
        values = np.concatenate([values, np.full((*values.shape[:2], 1), 65535, np.uint16)], -1)
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(values, colour_type))
    expected = PICTURE[..., :1].repeat(3, -1) if colour_type == 0 else PICTURE
    assert np.array_equal(shown(tmp_path / "deep.png"), expected)


def test_dark_16_bits_stay_dark(tmp_path):
    """A medical picture that uses 12 of 16 bits is dark to a viewer; it is not spread over the range without a word."""
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "dark.png")
    assert np.unique(shown(tmp_path / "dark.png")).tolist() == [15]
