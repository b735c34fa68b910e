"""Pictures: colours, crops, grids."""

from __future__ import annotations

import base64
import io
import math
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import zennit.image as zimage
from PIL import Image

from crp.errors import InputError
from crp.image import (
    draw_overlay,
    get_crop_range,
    imgify,
    max_norm,
    overlay,
    plot_grid,
    to_data_uri,
    to_png_bytes,
    vis_img_heatmap,
    vis_opaque_img,
)

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


def in_eight_bits(image: torch.Tensor) -> torch.Tensor:
    return (image.double() * 255).round().to(torch.uint8)


def blob(rows: slice, columns: slice, size: int = 12) -> torch.Tensor:
    heatmap = torch.zeros(size, size)
    heatmap[rows, columns] = 1
    return heatmap


# --- imgify ---------------------------------------------------------------------------------------------------------


def test_heatmap_has_the_colours_of_the_map():
    picture = imgify(np.array([[-2.0, 0.0, 2.0, 1.0]]), symmetric=True)
    assert picture.mode == "RGB" and picture.size == (4, 1)
    assert pixels(picture)[0].tolist() == zimage.palette("bwr")[[0, 127, 255, 191]].tolist()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("level", [1.0, 2.0])
@pytest.mark.parametrize("cmap", ["bwr", "coldnhot", "000,fff"])
def test_colours_are_those_of_zennit(symmetric, level, cmap):
    array = np.random.default_rng(0).normal(size=(5, 7))
    low, high = (-abs(array).max(), abs(array).max()) if symmetric else (array.min(), array.max())
    expected = zimage.palette(cmap, level)[((array - low) / (high - low) * 255).astype(np.uint8)]
    assert np.array_equal(pixels(imgify(array, cmap=cmap, symmetric=symmetric, level=level)), expected)


def test_range_may_be_given():
    array = np.array([[-9.0, 0.0, 1.0, 9.0]])
    assert pixels(imgify(array, cmap="gray", vmin=0, vmax=1))[0, :, 0].tolist() == [0, 0, 255, 255]
    assert pixels(imgify(array, cmap="gray", vmin=-9))[0, :, 0].tolist() == [0, 127, 141, 255]
    for bound in ({"vmax": 2}, {"vmin": -2}):
        assert pixels(imgify(array, cmap="gray", symmetric=True, **bound))[0, :, 0].tolist() == [0, 127, 191, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_has_a_picture(dtype):
    picture = imgify(torch.tensor([[0, 1], [1, 0]]).to(dtype), cmap="gray")
    assert pixels(picture)[..., 0].tolist() == [[0, 255], [255, 0]]


def test_bytes_are_shown_as_they_are():
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(pixels(imgify(array)), array)


@pytest.mark.parametrize(
    "draw",
    [
        lambda image, heatmap: imgify(image),
        overlay,
        draw_overlay,
        lambda image, heatmap: vis_opaque_img(image[None], heatmap[None])[0],
        lambda image, heatmap: vis_img_heatmap(image[None], heatmap[None])[1][0],
    ],
    ids=["imgify", "overlay", "draw_overlay", "vis_opaque_img", "vis_img_heatmap"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_that_require_grad_are_drawn(draw, dtype):
    image, heatmap = (torch.rand(shape, dtype=dtype, requires_grad=True) for shape in [(3, 4, 5), (4, 5)])
    assert draw(image, heatmap).size == (5, 4)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (torch.rand(3, 4, 5), (5, 4)),
        (torch.rand(4, 5, 3), (5, 4)),
        (torch.rand(1, 4, 5), (5, 4)),
        (torch.rand(3, 5, 3), (3, 5)),
        (torch.rand(3, 5, 1), (1, 5)),
        (RANDOM.random((4, 5, 1)), (5, 4)),
        (RANDOM.random((3, 5, 3)), (5, 3)),
        (RANDOM.random((3, 4, 5)), (5, 4)),
    ],
    ids=lambda value: str(getattr(value, "shape", "")),
)
def test_channels_are_first_or_last(image, size):
    assert imgify(image).size == size


def test_channels_stay_in_their_order():
    image = torch.zeros(3, 2, 2)
    image[0] = 1
    assert pixels(imgify(image))[0, 0].tolist() == [255, 0, 0]
    assert pixels(imgify(image.permute(1, 2, 0).numpy()))[0, 0].tolist() == [255, 0, 0]


def test_zero_has_the_middle_colour_even_alone():
    assert pixels(imgify(torch.zeros(2, 2), symmetric=True))[0, 0].tolist() == zimage.palette("bwr")[127].tolist()
    assert pixels(imgify(torch.ones(2, 2), cmap="gray"))[0, 0].tolist() == [0, 0, 0]


def test_grid():
    images = torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, 4).reshape(6, 1, 2, 2) + torch.tensor([0.0, 1.0])
    picture = imgify(images, cmap="gray", grid=True)
    assert picture.size == (4, 6)  # two columns, three rows of 2x2 images, each with its own range
    assert set(pixels(picture)[..., 0].ravel().tolist()) == {0, 255}
    assert imgify(images[:, 0], grid=(1, 7), gridfill=7).size == (14, 2)
    assert pixels(imgify(images[:, 0], cmap="gray", grid=(1, 7), gridfill=7))[0, -1, 0] == 7
    assert imgify(torch.rand(2, 3, 4, 5), grid=(2, 1)).size == (5, 8)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((1, 2), r"grid \(1, 2\) has 2 places for 4 images"),
        ((0, 4), "the number of rows in grid must be a whole number of at least 1, not 0"),
        ((2, 1.5), "the number of columns in grid must be a whole number of at least 1, not 1.5"),
        (("a", 4), "the number of rows in grid must be"),
        ((4,), r"grid must be \(rows, columns\), not \(4,\)"),
    ],
    ids=str,
)
def test_a_grid_has_a_place_for_every_image(grid, message):
    """Those that were too many were left out."""
    with pytest.raises(InputError, match=message):
        imgify(torch.rand(4, 5, 5), grid=grid)


def test_resize_keeps_the_ratio():
    assert imgify(torch.rand(10, 20), resize=40).size == (40, 20)
    assert imgify(torch.rand(1, 100), resize=10).size == (10, 1)
    for side in range(1, 60):
        assert imgify(torch.rand(side, 1), resize=29).height == 29


def test_padding_is_transparent():
    picture = imgify(torch.rand(2, 4), padding=True)
    assert picture.mode == "RGBA" and picture.size == (4, 4)
    assert pixels(picture)[:, 0, 3].tolist() == [0, 255, 255, 0]
    assert imgify(torch.rand(2, 4), padding=True, resize=8).size == (8, 8)


@pytest.mark.parametrize("bounds", [{"vmin": math.nan}, {"vmax": math.inf}, {"vmin": "0"}, {"vmax": None, "vmin": 1j}])
def test_bounds_are_numbers(bounds):
    with pytest.raises(ValueError, match=r"(vmin|vmax) must be a finite number, not "):
        imgify(torch.rand(3, 4), **bounds)


def test_pil_images_are_only_resized_and_padded():
    given = Image.new("RGB", (4, 2), (1, 2, 3))
    assert imgify(given) is given
    padded = pixels(imgify(given, resize=8, padding=True))
    assert padded.shape == (8, 8, 4) and padded[4, 4].tolist() == [1, 2, 3, 255]
    deep = Image.fromarray(np.array([[0, 65535], [0x8000, 0x4000]], np.uint16))
    assert pixels(imgify(deep)).tolist() == [[0, 255], [0x80, 0x40]]
    assert imgify(given.convert("CMYK")).mode == "RGB"
    palette = given.convert("P")
    assert imgify(palette, padding=True).size == (4, 4)


@pytest.mark.parametrize(("name", "wrong"), [("resize", 0), ("resize", -1), ("level", float("nan")), ("level", "high")])
def test_settings_of_pictures_that_are_none_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be a "):
        imgify(torch.rand(4, 4), **{name: wrong})


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("cat.png", TypeError, "got str"),
        (torch.rand(2, 4, 5), ValueError, r"got \(2, 4, 5\)"),
        (torch.rand(4), ValueError, r"got \(4,\)"),
        (torch.rand(3, 0, 5), ValueError, r"empty: its shape is \(3, 0, 5\)"),
        (torch.tensor([[0.0, float("nan"), float("inf")]]), ValueError, "2 of 3 values that are not finite"),
        (
            torch.ones(2, 2) + 1j,
            TypeError,
            "image must be real numbers to have a colour, not of complex64",
        ),
        (np.array([["a"]]), TypeError, "must be real numbers to have a colour, not of <U1"),
    ],
)
def test_what_is_no_image_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        imgify(image)
    if isinstance(image, torch.Tensor) and image.numel():
        with pytest.raises(error):
            imgify(image.expand(2, *image.shape), grid=True)


def test_pictures_survive_everything_that_is_done_to_pictures(tmp_path):
    _, (heat,) = vis_img_heatmap(torch.rand(1, 3, 8, 8), torch.randn(1, 8, 8))
    heat.save(tmp_path / "heat.png")
    assert np.array_equal(pixels(Image.open(tmp_path / "heat.png")), pixels(heat))
    assert heat.resize((3, 3)).convert("RGBA").copy().size == (3, 3)


# --- normalisation and crops ----------------------------------------------------------------------------------------


def test_max_norm_never_changes_a_sign():
    assert max_norm(torch.tensor([2.0, -1.0])).tolist() == pytest.approx([1.0, -0.5])
    assert max_norm(torch.tensor([-4.0, -1.0])).tolist() == pytest.approx([-1.0, -0.25])
    assert max_norm(torch.zeros(2)).tolist() == [0, 0]
    assert max_norm(torch.zeros(2).half()).tolist() == [0, 0]


def test_crop_range_ends_are_exclusive():
    heatmap = blob(slice(2, 5), slice(3, 7))
    assert get_crop_range(heatmap, 0.5) == (2, 5, 3, 7)
    row1, row2, column1, column2 = get_crop_range(heatmap, 0.5)
    assert heatmap[row1:row2, column1:column2].shape == (3, 4)


@pytest.mark.parametrize(
    ("rows", "columns"), [(slice(4, 5), slice(6, 7)), (slice(0, 1), slice(2, 9)), (slice(3, 12), slice(11, 12))]
)
def test_crop_range_of_a_pixel_a_row_a_column(rows, columns):
    expected = rows.start, rows.stop, columns.start, columns.stop
    assert get_crop_range(blob(rows, columns), 0.5) == expected
    assert all(type(end) is int for end in get_crop_range(blob(rows, columns), 0.5))


@pytest.mark.parametrize("heatmap", [torch.zeros(5, 7), -torch.ones(5, 7)])
def test_crop_range_is_the_whole_image_where_nothing_is_above(heatmap):
    assert get_crop_range(heatmap, 0.1) == (0, 5, 0, 7)


def test_crop_range_wants_one_heatmap():
    with pytest.raises(ValueError, match=r"got \(1, 5, 7\)"):
        get_crop_range(torch.zeros(1, 5, 7), 0.1)


# --- references -----------------------------------------------------------------------------------------------------


def test_images_and_heatmaps_are_drawn_whole():
    images, heatmaps = torch.rand(2, 3, 12, 10), torch.randn(2, 12, 10)
    pictures, heats = vis_img_heatmap(images, heatmaps)
    for image, heatmap, picture, heat in zip(images, heatmaps, pictures, heats, strict=True):
        assert np.array_equal(pixels(picture), pixels(imgify(in_eight_bits(image))))
        assert np.array_equal(pixels(heat), pixels(imgify(heatmap, symmetric=True)))


def test_colour_options_reach_the_heatmaps_only():
    image, heatmap = torch.rand(1, 3, 4, 4), torch.randn(1, 4, 4)
    (picture,), (heat,) = vis_img_heatmap(image, heatmap, cmap="hot", vmin=-1, vmax=2, symmetric=False)
    assert np.array_equal(pixels(heat), pixels(imgify(heatmap[0], cmap="hot", vmin=-1, vmax=2)))
    assert np.array_equal(pixels(picture), pixels(imgify(in_eight_bits(image[0]))))


def test_grey_images_are_drawn_grey():
    images, heatmaps = torch.rand(1, 1, 6, 6), torch.ones(1, 6, 6)
    for (picture,) in (vis_img_heatmap(images, heatmaps)[0], vis_opaque_img(images, heatmaps)):
        red, green, blue = np.moveaxis(pixels(picture), -1, 0)
        assert np.array_equal(red, green) and np.array_equal(red, blue)


def test_a_receptive_field_crops_both_to_the_blurred_heatmap():
    heatmap = blob(slice(4, 7), slice(2, 9))[None]
    images, heats = vis_img_heatmap(torch.rand(1, 3, 12, 12), heatmap, rf=True, kernel_size=1)
    assert images[0].size == heats[0].size == (7, 3)
    assert vis_opaque_img(torch.rand(1, 3, 12, 12), heatmap, rf=True, kernel_size=1)[0].size == (7, 3)
    blurred = vis_img_heatmap(torch.rand(1, 3, 12, 12), heatmap, rf=True, kernel_size=3)[0][0]
    assert blurred.size == (9, 5)


def test_a_relevant_border_is_not_cut_off():
    heatmap = torch.ones(1, 12, 12)
    assert vis_img_heatmap(torch.rand(1, 3, 12, 12), heatmap, rf=True)[0][0].size == (12, 12)


def test_only_what_is_relevant_is_bright():
    image = torch.rand(1, 3, 12, 12)
    heatmap = blob(slice(4, 7), slice(2, 9))
    (picture,) = vis_opaque_img(image, heatmap[None], alpha=0.5, kernel_size=1)
    expected = imgify(in_eight_bits(torch.where(heatmap > 0, image[0], image[0] * 0.5)))
    assert np.array_equal(pixels(picture), pixels(expected))


def test_negative_heatmaps_light_nothing_up():
    image = torch.rand(1, 3, 12, 12)
    (picture,) = vis_opaque_img(image, -torch.ones(1, 12, 12), alpha=0.5, rf=True)
    assert np.array_equal(pixels(picture), pixels(imgify(in_eight_bits(image[0] * 0.5))))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 3), (8, 8)])
def test_images_may_be_smaller_than_the_blur(size):
    images, heatmaps = torch.rand(1, 3, *size), torch.rand(1, *size)
    for values in (heatmaps, heatmaps.half(), heatmaps > 0.5):
        assert len(vis_opaque_img(images, values, rf=True)) == 1
        assert len(vis_img_heatmap(images, values, rf=True)) == 2


@pytest.mark.parametrize("draw", [vis_opaque_img, vis_img_heatmap])
def test_arguments_of_references_are_checked(draw):
    images, heatmaps = torch.rand(2, 3, 6, 6), torch.rand(2, 6, 6)
    with pytest.raises(ValueError, match=r"'crop_th' must be between \[0, 1\), got 1"):
        draw(images, heatmaps, crop_th=1)
    with pytest.raises(ValueError, match="'kernel_size' must be odd, got 4"):
        draw(images, heatmaps, rf=True, kernel_size=4)
    with pytest.raises(ValueError, match="2 images, 1 heatmaps"):
        draw(images, heatmaps[:1])
    with pytest.raises(ValueError, match=r"got \(3, 6, 6\) and \(1, 6, 6\)"):
        draw(images, heatmaps[:, None])


def test_arguments_of_opaque_images_are_checked():
    images, heatmaps = torch.rand(2, 3, 6, 6), torch.rand(2, 6, 6)
    with pytest.raises(ValueError, match=r"'alpha' must be between \[0, 1\], got -1"):
        vis_opaque_img(images, heatmaps, alpha=-1)
    with pytest.raises(ValueError, match=r"'vis_th'.*got -0\.1"):
        vis_opaque_img(images, heatmaps, vis_th=-0.1)


# --- overlay and files ----------------------------------------------------------------------------------------------


def test_overlay_covers_what_is_relevant_and_shows_the_rest():
    image = torch.rand(3, 6, 6)
    heatmap = torch.zeros(6, 6)
    heatmap[0, 0], heatmap[0, 1] = 2.0, -1.0
    picture = pixels(overlay(image, heatmap, alpha=1.0))
    grey = pixels(imgify(image).convert("L"))
    assert picture[0, 0].tolist() == zimage.palette("bwr")[255].tolist()
    assert (picture[3, 3] == grey[3, 3]).all()
    other = pixels(overlay(image, heatmap, cmap="coldnhot", alpha=1.0))
    assert other[0, 0].tolist() == zimage.palette("coldnhot")[255].tolist()
    half = (zimage.palette("bwr")[63].astype(int) + grey[0, 1]) / 2
    assert np.abs(picture[0, 1] - half).max() <= 2
    assert np.abs(pixels(overlay(image, heatmap, alpha=1.0, vmin=-4, vmax=4))[0, 0, 0] - grey[0, 0] / 2) < 255 / 2 + 2


def test_overlay_of_nothing_is_the_grey_image():
    image = Image.new("RGB", (4, 4), (10, 10, 10))
    assert np.array_equal(pixels(overlay(image, np.zeros((4, 4)))), pixels(image))
    assert overlay(image, np.zeros((4, 4)), resize=8).size == (8, 8)


@pytest.mark.parametrize(
    ("values", "shown"), [([0, 0.2, 0.4], [0, 51, 102]), ([-1, 0, 1], [0, 127, 255]), ([0, 1, 2], [0, 127, 255])]
)
def test_overlay_shows_images_beyond_0_to_1_by_their_range(values, shown):
    image = torch.tensor(values, dtype=torch.float64).expand(1, 1, 3)
    assert pixels(overlay(image, np.zeros((1, 3))))[0, :, 0].tolist() == shown


def test_overlay_checks_its_arguments():
    with pytest.raises(ValueError, match="alpha must be a finite number, not 'half'"):
        overlay(torch.rand(3, 5, 4), torch.rand(5, 4), alpha="half")
    with pytest.raises(ValueError, match=r"\(4, 5\) and \(3, 3\)"):
        overlay(torch.rand(3, 5, 4), torch.rand(3, 3))
    with pytest.raises(ValueError, match=r"'alpha'.*got 2"):
        overlay(torch.rand(3, 5, 4), torch.rand(5, 4), alpha=2)


def test_png_bytes_and_data_uris_hold_the_picture():
    picture = imgify(torch.rand(3, 4, 5))
    content = to_png_bytes(picture)
    assert np.array_equal(pixels(Image.open(io.BytesIO(content))), pixels(picture))
    head, body = to_data_uri(picture).split(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == content


# --- plot_grid ------------------------------------------------------------------------------------------------------


def drawn(figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def test_grid_of_references():
    references = {concept: vis_img_heatmap(torch.rand(4, 3, 8, 8), torch.randn(4, 8, 8)) for concept in (3, 17)}
    figure = plot_grid(references, figsize=(3, 3))
    assert len(figure.axes) == 2 * 2 * 4 and tuple(figure.get_size_inches()) == (3, 3)
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["3", "17"]
    figure.canvas.draw()


@pytest.mark.parametrize("cmap_dim", [0, 1, None])
def test_one_row_of_a_tuple_is_drawn_as_heatmaps(cmap_dim):
    rows = torch.randn(2, 6, 6), torch.randn(2, 6, 6)
    figure = plot_grid({0: rows}, cmap_dim=cmap_dim, cmap="hot", vmin=-1, vmax=1, padding=False)
    for number, picture in enumerate(drawn(figure)):
        options = {"cmap": "hot", "vmin": -1, "vmax": 1} if number // 2 == cmap_dim else {}
        assert np.array_equal(picture, pixels(imgify(rows[number // 2][number % 2], **options)))


def test_heatmaps_are_symmetric_by_default():
    rows = torch.rand(1, 3, 6, 6), torch.rand(1, 6, 6)
    assert np.array_equal(drawn(plot_grid({0: rows}, padding=False))[1], pixels(imgify(rows[1][0], symmetric=True)))


def test_a_single_row_of_pictures_tensors_or_arrays():
    for row in (
        torch.rand(3, 1, 6, 6),
        [RANDOM.random((6, 6, 3))] * 3,
        vis_opaque_img(torch.rand(3, 3, 6, 6), torch.rand(3, 6, 6)),
    ):
        figure = plot_grid({"a concept": row})
        assert len(figure.axes) == 3
    grey = drawn(plot_grid({0: torch.rand(1, 1, 6, 6)}, padding=False))[0]
    assert (grey[..., 0] == grey[..., 2]).all()


def test_rows_may_have_different_lengths():
    assert len(plot_grid({0: torch.rand(3, 3, 6, 6), 1: torch.rand(1, 3, 6, 6), 2: []}).axes) == 4


def test_scripts_save_the_grid_by_pyplot(tmp_path):
    figure = plot_grid({0: torch.rand(1, 3, 6, 6)})
    plt.savefig(tmp_path / "by_pyplot.png")
    figure.savefig(tmp_path / "by_figure.png")
    assert plt.gcf() is figure
    saved = [np.asarray(Image.open(tmp_path / f"by_{name}.png")) for name in ("pyplot", "figure")]
    assert np.array_equal(*saved)


def test_nothing_is_shown_where_there_is_no_window(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(plt.Figure, "show", lambda figure: shown.append(figure))
    assert plot_grid({0: torch.rand(1, 3, 6, 6)}) is plt.gcf()
    assert shown == []


def test_a_window_of_an_interactive_session_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(plt.Figure, "show", lambda figure: shown.append(figure))
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.required_interactive_framework", "qt")
    plot_grid({0: torch.rand(1, 3, 6, 6)})
    assert shown == []
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    figure = plot_grid({0: torch.rand(1, 3, 6, 6)})
    assert shown == [figure]


@pytest.mark.parametrize("cmap_dim", [-1, "heatmap", 0.5])
def test_wrong_cmap_dim(cmap_dim):
    with pytest.raises(ValueError, match="'cmap_dim' must be 0, 1 or None"):
        plot_grid({0: torch.rand(1, 3, 6, 6)}, cmap_dim=cmap_dim)


@pytest.mark.parametrize("value", [3, "cats", torch.rand(6, 6), Image.new("RGB", (3, 3)), (torch.rand(2, 3, 6, 6), 5)])
def test_wrong_references_leave_no_figure(value):
    with pytest.raises(ValueError, match=r"'ref_c'\[7\] must be a sequence"):
        plot_grid({7: value})
    with pytest.raises(ValueError, match="not finite"):
        plot_grid({7: torch.full((1, 3, 6, 6), torch.nan)})
    assert plt.get_fignums() == []


def test_no_references():
    with pytest.raises(ValueError, match="'ref_c' is empty"):
        plot_grid({})


def test_a_notebook_shows_a_grid_once():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    plot = "plot_grid({0: torch.rand(1, 3, 6, 6)})"
    sources = ["import torch; from crp.image import plot_grid", plot, f"figure = {plot}\n1", "figure"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    shown = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in notebook.cells]
    assert shown == [0, 1, 1, 1]


# --- what scripts import --------------------------------------------------------------------------------------------


def test_star_import_gives_the_names_that_scripts_use():
    names: dict[str, object] = {}
    exec("from crp.image import *", names)
    expected = {"imgify", "plot_grid", "vis_img_heatmap", "vis_opaque_img", "get_crop_range", "max_norm"}
    assert expected | {"Image", "torch", "np", "plt", "gridspec", "zimage", "gaussian_blur"} <= set(names)
    assert {"Any", "Dict", "Iterable", "List", "Tuple", "Union"} <= set(names)
    assert names["plt"] is plt and callable(names["gaussian_blur"])


def test_unknown_names_are_attribute_errors():
    import crp.image

    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        crp.image.nope  # noqa: B018
