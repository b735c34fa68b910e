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


# --- what a file says of itself ---------------------------------------------------------------------------------------

#: What a viewer does with a picture, by its EXIF orientation (Exif 2.32, table 5).
TURNED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", TURNED)
def test_a_picture_is_upright(tmp_path, orientation):
    exif, pixels = Image.Exif(), PICTURE[:20]
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "sideways.png", exif=exif)
    assert np.array_equal(shown(tmp_path / "sideways.png"), TURNED[orientation](pixels))


def profile_of_inks(lab: np.ndarray) -> bytes:
    """ICC profile of version 2.4 for CMYK (ICC.1:2001-04, 6.5.8): colours of the 16 mixtures of full inks, (16, 3).

    Colours are L, a, b in 8 bits, and those of other mixtures are interpolated.
    """
    ramp = bytes(range(256))
    unit = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unit + ramp * 4 + lab.astype(np.uint8).tobytes() + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 4) + b"ink\0" + bytes(79)
    tags, place, listed = [(b"desc", text), (b"wtpt", white), (b"A2B0", table)], 128 + 4 + 36, b""
    content = b""
    for name, data in tags:
        data += bytes(-len(data) % 4)
        listed += name + struct.pack(">II", place + len(content), len(data))
        content += data
    kind = b"prtrCMYKLab " + struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp"
    header = struct.pack(">I4sI", place + len(content), bytes(4), 0x02400000) + kind
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + listed + content


@pytest.mark.parametrize("kind", ["profile", "damaged profile", "no profile"])
def test_inks_have_the_colours_of_their_profile(tmp_path, kind):
    """By the profile, the first ink is red; without one, it is cyan, as is usual."""
    lab = np.tile([255, 128, 128], (16, 1))
    lab[8::2], lab[1::2] = [136, 208, 195], [0, 128, 128]  # (the last ink is black)
    profile = {"profile": profile_of_inks(lab), "damaged profile": b"no profile", "no profile": None}[kind]
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "ink.tif", icc_profile=profile)
    red, green, blue = shown(tmp_path / "ink.tif")[2, 2]
    if kind == "profile":
        assert red > 240 and green < 30 and blue < 30
    else:
        assert red < 30 and green > 200 and blue > 200


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.2, 0.6, (51, 153)), (0.0, 1.0, (0, 255)), (-1.0, 3.0, (0, 255)), (2.0, 4.0, (0, 255))],
    ids=["within", "all of it", "below and above", "above"],
)
def test_floats_within_0_and_1_are_shown_as_they_are(tmp_path, low, high, expected):
    values = np.full((4, 4), low, np.float32)
    values[2:] = high
    Image.fromarray(values).save(tmp_path / "deep.tif")
    found = shown(tmp_path / "deep.tif")
    assert (found[0] == expected[0]).all() and (found[3] == expected[1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_floats_that_are_not_finite_are_refused(tmp_path, value):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = value
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="1 of 16 values that are not finite"):
        shown(tmp_path / "deep.tif")
