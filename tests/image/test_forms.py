"""Forms of pictures: colours, opacity, crops, bars, graphs, and pictures as files hold them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from crp.errors import CRPError, InputError, InputTypeError
from crp.image import (
    AGAINST,
    FOR,
    FORMS,
    PictureNode,
    as_viewed,
    draw_contour,
    draw_crop,
    draw_form,
    draw_heatmap,
    draw_masked,
    draw_overlay,
    plot_form,
    plot_graph,
    relevant_box,
    vis_img_heatmap,
    vis_opaque_img,
)
from crp.image.colours import as_picture, blurred, clipped, colours_of, resized


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# --- colours


def test_relevance_is_divided_by_the_percentile_and_clipped():
    heatmap = np.linspace(-1, 1, 201).reshape(3, 67) * 4
    values, one = clipped(heatmap, 50)
    assert one == pytest.approx(np.percentile(np.abs(heatmap), 50))
    assert values == pytest.approx(np.clip(heatmap / one, -1, 1))


@pytest.mark.parametrize(("spike", "one"), [(3.0, 3.0), (0.0, 0.0)], ids=["a single spike", "zeros"])
def test_a_percentile_of_zero_falls_back_to_the_largest(spike, one):
    heatmap = torch.zeros(40, 40)
    heatmap[0, 0] = spike
    assert clipped(heatmap)[1] == one
    assert np.isfinite(clipped(heatmap)[0]).all()


@pytest.mark.parametrize("shape, share", [((224, 224), 0.02), ((40, 64), 0.05), ((5, 7), 0.9), ((1, 9), 0.2)], ids=str)
def test_smoothing_is_that_of_a_window_in_two_dimensions(shape, share):
    values, sigma = np.random.default_rng(0).normal(size=shape), share * max(shape)
    width = 2 * min(int(3 * sigma + 0.5), min(shape) - 1) + 1
    wanted = gaussian_blur(torch.from_numpy(values)[None, None], [width, width], [sigma, sigma])[0, 0]
    np.testing.assert_allclose(blurred(values, share), wanted.numpy(), rtol=0, atol=1e-12)


def test_a_smaller_map_is_averaged():
    """Lines between those that it has would be lost."""
    lines = np.repeat(np.arange(32)[:, None] % 8 == 0, 5, 1)
    np.testing.assert_allclose(resized(lines, (4, 5))[1:-1], 1 / 8)
    np.testing.assert_allclose(resized(lines.T, (5, 4))[:, 1:-1], 1 / 8)


def test_colours_that_are_none_are_refused():
    with pytest.raises(ValueError, match="has 1 of 4 values that are not finite"):
        clipped(torch.tensor([[0.0, 1.0], [float("nan"), 2.0]]))


DRAWN = [form for form in FORMS if form != "heatmap"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("heatmap", "message"),
    [
        (torch.full((6, 6), torch.nan), "the heatmap has 36 of 36 values that are not finite"),
        (torch.ones(6, 6) + 1j, "the heatmap must be real numbers to have a colour, not of torch.complex64"),
        (torch.zeros(0, 6), r"the heatmap is empty: its shape is \(0, 6\)"),
        (torch.ones(1, 1, 6, 6), r"a heatmap has the shape \(height, width\), not \(1, 6, 6\)|, not \(1, 1, 6, 6\)"),
    ],
    ids=["not finite", "complex", "empty", "axes"],
)
def test_what_is_no_heatmap_is_refused(form, heatmap, message):
    with pytest.raises(CRPError, match=message):
        draw_form(form, torch.rand(3, 6, 6), heatmap)


@pytest.mark.parametrize("form", DRAWN)
def test_pictures_that_are_none_are_refused(form):
    picture = torch.rand(3, 6, 6)
    with pytest.raises(InputError, match=r"a picture has the shape \(channels, height, width\), not \(6, 6\)"):
        draw_form(form, picture[0], torch.ones(6, 6))
    picture[1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="the picture has 1 of 108 values that are not finite"):
        draw_form(form, picture, torch.ones(6, 6))


@pytest.mark.parametrize("form", DRAWN)
def test_pictures_of_every_kind_are_drawn_alike(form):
    bytes_ = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    heatmap = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    wanted = pixels(draw_form(form, Image.fromarray(bytes_), heatmap))
    floats = torch.from_numpy(bytes_ / 255)
    for picture in (bytes_, torch.from_numpy(bytes_), floats, floats.movedim(-1, 0), bytes_.transpose(2, 0, 1)):
        assert (pixels(draw_form(form, picture, heatmap)) == wanted).all()
    grey = Image.fromarray(bytes_[..., 0].astype(np.uint16) << 8)
    assert (pixels(draw_form(form, grey, heatmap)) == pixels(draw_form(form, bytes_[..., :1], heatmap))).all()
    clear = Image.fromarray(np.concatenate([bytes_, np.zeros((6, 6, 1), np.uint8)], -1))
    assert (pixels(draw_form(form, clear, heatmap)) == pixels(draw_form(form, np.ones((6, 6, 3)), heatmap))).all()


@pytest.mark.parametrize("margin", [-1, float("nan"), "wide"])
def test_margins_that_are_none_are_refused(margin):
    with pytest.raises(InputError, match="margin must be a number of at least 0"):
        relevant_box(torch.ones(6, 6), margin=margin)


@pytest.mark.parametrize("share", [0, -1, 2, float("nan"), True])
def test_shares_of_relevance(share):
    with pytest.raises(InputError, match="share must be "):
        draw_crop(torch.rand(3, 6, 6), torch.ones(6, 6), share)


@pytest.mark.parametrize("draw", [vis_opaque_img, vis_img_heatmap])
def test_references_that_have_no_colour_are_refused(draw):
    image, heatmap = torch.rand(1, 3, 6, 6), torch.rand(1, 6, 6)
    with pytest.raises(InputError, match="the heatmap has 36 of 36 values that are not finite"):
        draw(image, heatmap * torch.nan)
    with pytest.raises(InputError, match="the image has 108 of 108 values that are not finite"):
        draw(image / 0, heatmap)
    with pytest.raises(InputTypeError, match="an image and its heatmap must be tensors, not ndarray and Tensor"):
        draw(image.numpy(), heatmap)
    with pytest.raises(InputError, match=r"\(height, width\), got \(6, 6\) and \(6,\)"):
        draw(image[:, 0], heatmap[:, 0])
    with pytest.raises(InputError, match="kernel_size must be a whole"):
        draw(image, heatmap, rf=True, kernel_size=3.0)


def test_images_of_8_bits_are_shown_as_they_are():
    image = torch.full((1, 3, 6, 6), 100, dtype=torch.uint8)
    image[..., 0, 0] = 1
    shown = pixels(vis_img_heatmap(image, torch.ones(1, 6, 6))[0][0])
    assert (shown == image[0].permute(1, 2, 0).numpy()).all()


def test_red_speaks_for_blue_against_and_zero_is_transparent():
    colour = colours_of(np.array([1.0, -1.0, 0.0, 0.25]))
    assert colour[0].tolist() == pytest.approx([*FOR, 1])
    assert colour[1].tolist() == pytest.approx([*AGAINST, 1])
    assert colour[2, 3] == 0
    assert colour[3, 3] == pytest.approx(0.25**0.7)
    on_white = pixels(draw_heatmap(np.array([[1.0, -1.0, 0.0]])))[0]
    assert on_white.tolist() == [[204, 23, 28], [33, 89, 191], [255, 255, 255]]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_values_of_pictures_in_0_to_1_are_shown_as_they_are(channels):
    image = torch.rand(channels, 4, 5) * 0.2
    shown = as_picture(image)
    expected = image if channels == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    assert shown == pytest.approx(expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("values", "wanted"), [([-2, 0, 2], [0, 0.5, 1]), ([-1, 0, 1], [0, 0.5, 1]), ([0, 2, 4], [0, 0.5, 1]), ([7], [0])]
)
def test_other_pictures_are_brought_there_by_their_range(values, wanted):
    assert as_picture(torch.tensor([[values]]))[0, :, 0].tolist() == wanted


@pytest.mark.parametrize("value", [0.0, 0.2, 1.0])
def test_flat_pictures_keep_their_grey_in_references(value):
    image, heatmap = torch.full((1, 3, 8, 8), value), torch.ones(1, 8, 8)
    for picture in (vis_img_heatmap(image, heatmap)[0][0], vis_opaque_img(image, heatmap)[0]):
        assert (pixels(picture) == round(255 * value)).all()


def test_a_crop_has_the_colours_of_the_whole_picture():
    image = torch.rand(1, 3, 16, 16)
    heatmap = torch.zeros(1, 16, 16)
    heatmap[0, 6, 6] = 1
    whole, crop = (vis_img_heatmap(image, heatmap, rf=rf, kernel_size=3)[0][0] for rf in (False, True))
    assert np.array_equal(pixels(whole)[5:8, 5:8], pixels(crop))


# --- forms


@pytest.fixture
def spot() -> torch.Tensor:
    """Relevance in the middle of the lower left quarter, and against in the upper right corner."""
    heatmap = torch.zeros(64, 64)
    heatmap[44:52, 12:20] = 1.0
    heatmap[:6, -6:] = -0.5
    return heatmap


def test_masked_keeps_what_is_relevant_and_whitens_the_rest(spot):
    image = torch.rand(3, 64, 64)
    shown, plain = pixels(draw_masked(image, spot)), pixels(draw_form("crop", image, torch.zeros(64, 64)))
    assert np.abs(shown[46:50, 14:18] - plain[46:50, 14:18]).max() <= 1
    assert shown[:6, -6:] == pytest.approx(255 * 0.92 + 0.08 * plain[:6, -6:], abs=1), "also what speaks against"


def test_overlay_has_the_colours_on_a_light_grey(spot):
    shown = pixels(draw_overlay(torch.full((3, 64, 64), 0.5), spot))
    background = 255 * (0.35 + 0.6 * 0.5)
    assert shown[30, 40] == pytest.approx([background] * 3, abs=1)
    assert shown[48, 16] == pytest.approx(0.85 * 255 * np.array(FOR) + 0.15 * background, abs=2)


def test_contour_surrounds_what_is_relevant_with_a_colour_for_each(spot):
    other = torch.zeros(64, 64)
    other[4:12, 4:12] = 1
    shown = pixels(draw_contour(torch.full((3, 64, 64), 0.8), [spot, other], [(1, 0, 0), (0, 1, 0)]))
    assert shown[30, 40] == pytest.approx([round(0.8 * 0.55 * 255)] * 3, abs=1)
    assert (shown == [255, 0, 0]).all(-1).sum() > 8 and (shown == [0, 255, 0]).all(-1).sum() > 8
    assert shown[48, 16].tolist() == [204] * 3
    whole = pixels(draw_contour(torch.full((3, 64, 64), 0.8), torch.ones(64, 64)))
    assert (whole == 204).all(), "the end of the picture is no outline"


def test_the_box_holds_the_share_of_the_relevance(spot):
    top, bottom, left, right = relevant_box(spot, 0.9)
    assert spot[top:bottom, left:right].clamp(min=0).sum() >= 0.9 * spot.clamp(min=0).sum()
    assert bottom - top < 20 and right - left < 20
    assert draw_crop(torch.rand(3, 64, 64), spot).size == (right - left, bottom - top)
    assert relevant_box(-spot.clamp(min=0)) == (0, 64, 0, 64)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_relevant_box_holds_its_share_and_little_more(share):
    heatmap = torch.rand(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    values = blurred(heatmap.numpy(), 0.02)
    top, bottom, left, right = relevant_box(heatmap, share, margin=0)
    assert values[top:bottom, left:right].sum() >= share * values.sum()
    for axis, first, last in ((1, top, bottom), (0, left, right)):
        along = values.sum(axis) / values.sum()
        for outside, side in ((first, along), (len(along) - last, along[::-1])):
            assert side[:outside].sum() <= (1 - share) / 4 + 1e-12
            assert side[: outside + 2].sum() >= (1 - share) / 4 - 1e-12  # (with the row that is left beside it)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (7, 30), (64, 48)])
def test_every_form_has_the_size_of_the_picture(form, size):
    drawn = draw_form(form, torch.rand(3, *size), torch.rand(4, 4))
    assert drawn.mode == "RGB"
    assert form == "crop" or drawn.size == size[::-1]


def test_an_unknown_form_names_the_others():
    with pytest.raises(ValueError, match=r"no form 'blob'; there are masked, heatmap, overlay, contour, crop"):
        draw_form("blob", torch.rand(3, 4, 4), torch.rand(4, 4))


def test_figures_take_axes_and_tell_the_scale():
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 2)
    heatmap = torch.full((8, 8), -3.0)
    figure = plot_form(torch.rand(3, 8, 8), heatmap, ax=axes[0])
    assert figure is axes[0].figure
    assert [tick.get_text() for tick in figure.axes[-1].get_yticklabels()] == ["-3\nagainst", "0", "+3\nfor"]
    assert len(axes[0].images) == len(plot_form(torch.rand(3, 8, 8), heatmap, "masked").axes) == 1
    nothing = plot_form(torch.rand(3, 8, 8), torch.zeros(8, 8))
    assert [tick.get_text() for tick in nothing.axes[-1].get_yticklabels()] == ["-1\nagainst", "0", "+1\nfor"]


# --- graphs


def test_graphs_show_nodes_and_edges_in_their_colours():
    columns = [{"y": PictureNode("US $1 to $5")}, {1: PictureNode("a", torch.rand(3, 4, 4)), 2: PictureNode("b")}]
    figure = plot_graph(columns, {("y", 1): 0.5, ("y", 2): -0.25}, titles=["class", "$layer_x"])
    strong, weak = figure.axes[0].patches[:2]
    assert strong.get_edgecolor()[:3] == FOR and weak.get_edgecolor()[:3] == AGAINST
    assert strong.get_linewidth() == pytest.approx(9.4) and weak.get_linewidth() == pytest.approx(4.9)
    figure.savefig(io.BytesIO(), format="svg")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["class", "US $1 to $5", "$layer_x", "a", "b"]
    assert len(plot_graph(columns, {}, titles=["class"]).axes[0].texts) == 4
    assert not plot_graph([], {}).axes[0].texts
    with pytest.raises(KeyError, match="names 7, which is in no column"):
        plot_graph(columns, {("y", 7): 0.5})
    with pytest.raises(InputError, match=r"the relevance of the edge \('y', 1\) must be a finite number, not nan"):
        plot_graph(columns, {("y", 1): float("nan")})


# --- pictures of files


def read_back(picture: Image.Image, form: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_a_picture_stored_sideways_is_upright():
    upright = Image.fromarray(np.repeat(np.arange(0, 240, 30, dtype=np.uint8)[:, None], 16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = read_back(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert np.array_equal(pixels(as_viewed(stored)), pixels(upright))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_kept(form):
    deep = Image.fromarray(np.array([[0, 1000, 3000, 65535]], np.uint16))
    assert pixels(as_viewed(read_back(deep, form))).tolist() == [[0, 3, 11, 255]]


@pytest.mark.parametrize(
    ("values", "shown"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([-1.0, 0.0, 3.0], [0, 64, 255])], ids=["0 to 1", "range"]
)
def test_floating_point_pixels(values, shown):
    assert pixels(as_viewed(Image.fromarray(np.array([values], np.float32)))).tolist() == [shown]


def test_transparent_parts_are_white_and_other_modes_rgb():
    assert pixels(as_viewed(Image.new("RGBA", (1, 1), (10, 20, 30, 0))))[0, 0].tolist() == [255] * 3
    assert as_viewed(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).mode == "RGB"
    assert as_viewed(Image.new("P", (2, 2))).mode == "RGB"
    assert as_viewed(Image.new("1", (2, 2), 1)).mode == "L"


def test_a_damaged_profile_is_left_out():
    stored = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    stored.info["icc_profile"] = b"no profile"
    assert np.array_equal(pixels(as_viewed(stored)), pixels(as_viewed(Image.new("CMYK", (2, 2), (0, 255, 255, 0)))))
