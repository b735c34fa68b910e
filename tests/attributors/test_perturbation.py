"""Meaningful perturbation: optima in closed form, the paper's terms, images that do not influence each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crp.attributors.backgrounds import blur, make_background, median
from crp.attributors.perturbation import BLACK_BOX, MeaningfulPerturbation, mix
from crp.attributors.target import Neuron
from crp.composites import BetaSmooth, GuidedBackprop
from crp.errors import CRPError

#: Settings for images of 16 x 16 pixels.
SMALL = {"sigma": 3.0, "levels": 4, "mask_size": 5, "mask_blur": 1.0, "jitter": 3, "steps": 6}
#: Each pixel has a mask of its own, and nothing but the mask's size counts besides the score.
BARE = {"mask_size": None, "mask_blur": 0.0, "jitter": 1, "tv": 0.0, "background": 0.0, "score": "output"}


@pytest.fixture
def linear() -> nn.Module:
    """(n, 2, 4, 5) -> (n, 3)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(40, 3)).double().eval()


@pytest.fixture
def small() -> Tensor:
    return torch.randn(3, 2, 4, 5, dtype=torch.float64)


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["deletion", "preservation"])
@pytest.mark.parametrize("start", [0.5, "ones", "zeros", "circle"])
@pytest.mark.parametrize("upsampling", ["bilinear", "nearest", "bicubic"])
def test_linear_optimum(linear, small, game, start, upsampling):
    # sum_u m_u c_u -+ l1 |m| is least where pixels that contribute more than l1 are gone (kept), and no others
    settings = {**BARE, "l1": 0.1, "steps": 60, "upsampling": upsampling}
    found = MeaningfulPerturbation(linear, game=game, start=start, **settings)(small, [0, 1, 2])
    contribution = (linear[1].weight.view(3, 2, 4, 5) * small).sum(1)
    assert torch.equal(found.heatmap, (contribution > 0.1).double())
    assert torch.equal(found.mask, found.heatmap if game == "preservation" else 1 - found.heatmap)
    kept = (contribution * found.mask).flatten(1).sum(1) + linear[1].bias
    assert torch.allclose(found.scores[:, -1], kept, rtol=1e-12)
    assert torch.allclose(found.limits[:, 0], linear(small).diagonal(), rtol=1e-12)
    assert torch.allclose(found.limits[:, 1], linear[1].bias, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_steps_in_half_precision(linear, small, dtype):
    """Adam's first step is as long as the rate says. Float16 takes squares of these gradients for 0, and divides."""
    linear[1].weight.data *= 1e-3
    found = MeaningfulPerturbation(linear.to(dtype), start=0.5, l1=1e-4, **BARE, steps=1)(small.to(dtype), [0, 1, 2])
    contribution = (linear[1].weight.double().view(3, 2, 4, 5) * small).sum(1)
    clear = (contribution - 1e-4).abs() > 2e-5
    wanted = (contribution > 1e-4).double() * 0.2 + 0.4
    assert torch.allclose(found.heatmap.double()[clear], wanted[clear], atol=4e-3)
    assert found.heatmap.dtype == dtype and clear.sum() > 30


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_objective_as_the_paper_writes_it(linear, game):
    mask, scores = torch.rand(2, 1, 3, 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    expected = []
    for m, score in zip(mask[:, 0].tolist(), scores.tolist(), strict=True):
        total = sum(abs(1 - v if game == "deletion" else v) for row in m for v in row)
        steps = [abs(m[i + 1][j] - m[i][j]) for i in range(2) for j in range(4)]
        steps += [abs(m[i][j + 1] - m[i][j]) for i in range(3) for j in range(3)]
        expected.append((score if game == "deletion" else -score) + 0.3 * total + 0.7 * sum(s**2.5 for s in steps))
    attributor = MeaningfulPerturbation(linear, game=game, l1=0.3, tv=0.7, beta=2.5)
    assert torch.allclose(attributor.objective(mask, scores), torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_black_box_settings_give_the_known_implementation(vgg_bn, images):
    found = MeaningfulPerturbation(vgg_bn, **{**BLACK_BOX, "steps": 8, "seed": 3})(images[:1], 2)
    generator = torch.Generator().manual_seed(3)
    blurred, mask = median(images[:1]), torch.ones(1, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mask], lr=0.1)
    for _ in range(8):
        torch.randint(1, (2,), generator=generator)  # the jitter
        up = F.interpolate(mask, (16, 16), mode="bilinear", align_corners=False)
        noise = torch.randn(images[:1].shape, generator=generator, dtype=torch.float64) * 0.2
        output = vgg_bn(images[:1] * up + blurred * (1 - up) + noise).softmax(1)[0, 2]
        rows, columns = mask[..., 1:, :] - mask[..., :-1, :], mask[..., 1:] - mask[..., :-1]
        loss = 0.01 * (1 - mask).mean() + output  # there abs(), whose gradient is 0 where the mask is 1
        loss = loss + 0.2 * (rows.abs().pow(3).mean() + columns.abs().pow(3).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mask.data.clamp_(0, 1)
    up = F.interpolate(mask, (16, 16), mode="bilinear", align_corners=False)
    assert torch.allclose(found.mask, up[:, 0].detach(), atol=1e-10)
    assert found.mask.min() < 0.9


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_the_smallest_circle_that_is_enough(linear, game):
    # only the pixels within a distance of 0.4 from the centre, of an image that spans [-1, 1], count
    axis = torch.linspace(-1, 1, 21, dtype=torch.float64)
    disc = torch.hypot(axis[:, None], axis) < 0.4
    data = disc.double()[None, None].repeat(2, 1, 1, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(441, 1, bias=False)).double().eval()
    nn.init.ones_(model[1].weight)
    settings = {**BARE, "l1": 0.0, "learning_rate": 0.0, "steps": 1}
    found = MeaningfulPerturbation(model, game=game, **settings)(data, 0).heatmap
    assert (found[:, disc] == 1).all()
    assert found[0].sum() < disc.sum() * 1.5
    assert found[:, torch.hypot(axis[:, None], axis) > 0.5].sum() == 0


@pytest.mark.parametrize("game", ["deletion", "preservation"])
@pytest.mark.parametrize("counts", ["nothing", "a corner", "the middle of a row"])
def test_circles_begin_with_nothing_and_end_with_everything(game, counts):
    axis = torch.linspace(-1, 1, 21, dtype=torch.float64)
    wanted = {"nothing": torch.zeros(21, 21), "a corner": torch.ones(21, 21)}.get(counts, (axis.abs() < 0.4)[None])
    weight = wanted.double().clone()
    if counts == "a corner":
        weight[1:], weight[:, 1:] = 0, 0
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.numel(), 1, bias=False)).double().eval()
    with torch.no_grad():
        model[1].weight.copy_(weight.view(1, -1))
    settings = {**BARE, "l1": 0.0, "learning_rate": 0.0, "steps": 1}
    data = torch.ones(2, 1, *weight.shape, dtype=torch.float64)
    found = MeaningfulPerturbation(model, game=game, **settings)(data, 0).heatmap
    assert torch.equal(found, wanted.double().expand_as(found))


def test_blur_is_gaussian():
    image = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    image[..., 15, 15] = 1
    distance = torch.arange(31.0, dtype=torch.float64) - 15
    weight = torch.exp(-(distance**2) / 2 / 2.0**2) * (distance.abs() <= 8)
    weight /= weight.sum()
    blurred = blur(image, 2.0)[0, 0]
    assert torch.allclose(blurred[8:23, 8:23], (weight[:, None] * weight)[8:23, 8:23], rtol=1e-12)
    assert torch.allclose(blur(torch.full((2, 3, 5, 9), 0.7), 10.0), torch.tensor(0.7))
    assert blur(image, 0.0) is image


def test_blur_is_as_exact_under_autocast():
    image = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = blur(image, 2.0)
    assert torch.equal(found, blur(image, 2.0))


def test_median_filter():
    image = torch.rand(1, 2, 6, 7)
    padded = F.pad(image, [1] * 4, mode="replicate")
    for row, column in ((0, 0), (3, 4), (5, 6)):
        expected = padded[..., row : row + 3, column : column + 3].flatten(2).median(2).values
        assert torch.equal(median(image, 3)[..., row, column], expected)
    for width in (0, 2, 1.5):
        with pytest.raises(ValueError, match=f"width must be an odd number of pixels, not {width}"):
            median(image, width)


def test_pixels_lie_between_levels():
    images = torch.tensor([0.0, 10.0, 40.0]).view(3, 1, 1, 1, 1)
    at = {0.0: 0.0, 0.25: 5.0, 0.5: 10.0, 0.75: 25.0, 1.0: 40.0}
    for where, expected in at.items():
        assert mix(images, torch.full((1, 1, 1, 1), where)).item() == expected
    mask = torch.full((1, 1, 1, 1), 0.75, requires_grad=True)
    mix(images, mask).sum().backward()
    assert mask.grad.item() == 60


def test_blur_has_a_width_for_each_pixel(linear, images):
    attributor = MeaningfulPerturbation(linear, sigma=4.0, levels=4)
    pyramid = attributor._pyramid(images, torch.Generator())
    assert len(pyramid) == 5
    for level, sigma in enumerate((4.0, 3.0, 2.0, 1.0, 0.0)):
        assert torch.allclose(pyramid[level], blur(images, sigma))


def test_jitter_moves_the_mask_and_not_on_average(linear, images):
    attributor = MeaningfulPerturbation(linear, jitter=5, mask_blur=0.0)
    mask, pyramid = torch.rand(1, 1, 16, 16).double(), images[None, :1].expand(2, -1, -1, -1, -1)
    moved = attributor._enlarge(mask, pyramid, [0, 4])
    assert torch.equal(moved[..., 2:, :-2], mask[..., :-2, 2:])  # two down, two to the left
    assert torch.equal(moved[..., 0, :-2], mask[..., 0, 2:])  # the border is repeated
    assert torch.equal(attributor._enlarge(mask, pyramid, [2, 2]), mask)
    offsets = [torch.randint(5, (2,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(50)]
    assert {o for pair in offsets for o in pair} == set(range(5))


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"game": "preservation"}, {"background": "noise", "noise": 0.1}, {"start": "ones", "reduction": "mean"}],
    ids=str,
)
def test_an_image_is_the_same_in_a_batch_as_alone(vgg_bn, images, options):
    attributor = MeaningfulPerturbation(vgg_bn, **{**SMALL, **options})
    together = attributor(images)
    assert torch.equal(together.target.ids, vgg_bn(images).argmax(1))
    for i in range(len(images)):
        alone = attributor(images[i : i + 1])
        for name in ("heatmap", "mask", "scores", "limits"):
            assert torch.allclose(getattr(alone, name)[0], getattr(together, name)[i], atol=1e-9), name


def test_the_seed_decides(vgg_bn, images):
    run = partial(MeaningfulPerturbation, vgg_bn, **SMALL, noise=0.1)
    first = run(seed=1)(images).heatmap
    assert torch.equal(first, run(seed=1)(images).heatmap)
    assert not torch.equal(first, run(seed=2)(images).heatmap)
    generator = torch.Generator().manual_seed(1)
    attributor = run(generator=generator)
    assert torch.equal(first, attributor(images).heatmap)
    assert not torch.equal(first, attributor(images).heatmap)
    state = torch.get_rng_state()
    run(background="noise")(images)
    assert torch.equal(state, torch.get_rng_state())


def test_the_score_falls(vgg_bn, images):
    attributor = MeaningfulPerturbation(vgg_bn, **{**SMALL, "jitter": 1, "steps": 40, "start": "ones"})
    scores = attributor(images).scores
    assert scores.shape == (4, 41)
    assert (scores[:, -1] < scores[:, 0]).all()
    preserved = MeaningfulPerturbation(
        vgg_bn, **{**SMALL, "game": "preservation", "jitter": 1, "start": "zeros", "l1": 0.0}
    )
    scores = preserved(images, 1).scores
    assert (scores[:, -1] > scores[:, 0]).all()


@pytest.mark.parametrize("background", ["blur", "median", "mean", "noise", 0.5, torch.rand(3, 1, 1), torch.zeros_like])
@pytest.mark.parametrize("mask_size", [1, 3, (4, 20), None])
def test_any_background_and_resolution(vgg_bn, images, background, mask_size):
    settings = {**SMALL, "steps": 2, "background": background, "mask_size": mask_size}
    found = MeaningfulPerturbation(vgg_bn, **settings)(images[:2], 0)
    assert found.heatmap.shape == found.mask.shape == (2, 16, 16)
    assert found.heatmap.isfinite().all()
    assert found.heatmap.min() >= 0
    assert found.heatmap.max() <= 1


@pytest.mark.parametrize("upsampling", ["bilinear", "bicubic", "nearest"])
def test_upsampling(vgg_bn, images, upsampling):
    start = torch.rand(1, 1, 4, 4).round()
    settings = {"mask_size": 4, "mask_blur": 0.0, "jitter": 1, "learning_rate": 0.0, "steps": 1}
    settings |= {"background": 0.0, "upsampling": upsampling, "start": start}
    found = MeaningfulPerturbation(vgg_bn, **settings)(images, 0)
    options = {} if upsampling == "nearest" else {"align_corners": False}
    expected = F.interpolate(start.double(), (16, 16), mode=upsampling, **options).clamp(0, 1)
    assert torch.allclose(found.mask, expected[:, 0].expand_as(found.mask))
    assert torch.allclose(found.scores[:, 0], vgg_bn(images * expected).softmax(1)[:, 0])


def test_a_mask_of_one_row_has_no_variation_between_rows(vgg_bn):
    attributor, mask = MeaningfulPerturbation(vgg_bn, reduction="mean", l1=0, tv=1, beta=1), torch.rand(2, 1, 1, 4)
    assert torch.equal(attributor.objective(mask, torch.zeros(2)), mask.diff(dim=-1).abs().mean((1, 2, 3)))


def test_the_mean_of_a_vector_is_that_of_its_features():
    vectors = torch.rand(2, 5)
    assert torch.equal(make_background("mean", vectors), vectors.mean(1, keepdim=True).expand(2, 5))


@pytest.mark.parametrize("name", ["blur", "median"])
def test_what_is_no_image_has_no_blur(name):
    with pytest.raises(ValueError, match=rf"'{name}' needs images of shape \(batch, channels, height, width\)"):
        make_background(name, torch.rand(2, 5))


def test_the_mean_background_is_each_channels_own(images):
    filled = make_background("mean", images)
    assert torch.allclose(filled[1, 2], images[1, 2].mean())
    noise = make_background("noise", images, generator=torch.Generator().manual_seed(0))
    standard = (noise - filled) / images.flatten(2).std(2, correction=0)[..., None, None]
    assert torch.allclose(standard[0], standard[3])
    assert abs(standard[0].std() - 1) < 0.1


def test_targets(vgg_bn, images):
    attributor = MeaningfulPerturbation(vgg_bn, **{**SMALL, "steps": 2})
    by_class = attributor(images, [-1, 0, 1, 2])
    by_function = attributor(images, lambda output: output.softmax(1)[torch.arange(4), [-1, 0, 1, 2]])
    assert torch.allclose(by_class.scores, by_function.scores)
    weights = torch.zeros(4, 5, dtype=torch.float64)
    weights[torch.arange(4), torch.tensor([4, 0, 1, 2])] = 1
    assert torch.allclose(by_class.scores, attributor(images, weights).scores)
    logarithm = MeaningfulPerturbation(vgg_bn, **{**SMALL, "steps": 2, "score": "log_softmax"})(images, 1).limits
    assert torch.allclose(logarithm[:, 0], vgg_bn(images).log_softmax(1)[:, 1])


@pytest.mark.parametrize("composite", [None, BetaSmooth()])
def test_images_that_depend_on_each_other_are_refused(linear, small, composite):
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    model = nn.Sequential(norm, nn.ReLU(), *linear).double().eval()
    with pytest.raises(CRPError, match="depends on the samples beside it"):
        MeaningfulPerturbation(model, composite, **SMALL)(small, 1)


def test_a_composite_changes_the_gradients(vgg_bn, images):
    plain = MeaningfulPerturbation(vgg_bn, **SMALL)(images)
    smooth = MeaningfulPerturbation(vgg_bn, BetaSmooth(beta=1.0), **SMALL)(images)
    assert torch.allclose(plain.limits, smooth.limits)
    assert not torch.allclose(plain.mask, smooth.mask)


def test_the_model_is_left_alone(vgg_bn, images, untouched):
    data = images.clone()
    with untouched(vgg_bn):
        MeaningfulPerturbation(vgg_bn, GuidedBackprop(), **SMALL)(data)
        with torch.no_grad():
            MeaningfulPerturbation(vgg_bn, **SMALL)(data)
        with pytest.raises(IndexError, match="target 9 is out of range: the model has outputs 0 to 4"):
            MeaningfulPerturbation(vgg_bn, **SMALL)(data, 9)
        with pytest.raises(ValueError, match="one score for each row"):
            MeaningfulPerturbation(vgg_bn, **SMALL)(data, lambda output: output)
    assert torch.equal(data, images)


def test_models_may_change_their_input(vgg_bn, images):
    found = [
        MeaningfulPerturbation(nn.Sequential(nn.ReLU(inplace=inplace), vgg_bn).eval(), **SMALL)(images)
        for inplace in (True, False)
    ]
    assert torch.equal(found[0].heatmap, found[1].heatmap)
    assert torch.equal(found[0].limits, found[1].limits)
    assert torch.equal(found[0].scores, found[1].scores)


def test_progress_is_shown_on_demand(vgg_bn, images, capsys):
    MeaningfulPerturbation(vgg_bn, **SMALL)(images[:1])
    assert capsys.readouterr().err == ""
    MeaningfulPerturbation(vgg_bn, **SMALL, verbose=True)(images[:1])
    assert "6/6" in capsys.readouterr().err


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "delete"}, "game must be one of 'deletion', 'preservation', not 'delete'"),
        ({"background": "black"}, "background must be one of 'blur', 'median', .*not 'black'"),
        ({"background": True}, "not True"),
        ({"start": "disc"}, "start must be one of 'circle'"),
        ({"upsampling": "linear"}, "upsampling must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"score": "logit"}, "score must be one of 'softmax'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"jitter": 0}, "jitter must be a whole number of at least 1"),
        ({"levels": 0}, "levels must be"),
        ({"beta": 0.5}, "beta must be a number of at least 1, not 0.5"),
        ({"l1": -1.0}, "l1 must be"),
        ({"noise": float("nan")}, "noise must be"),
        ({"mask_size": 0}, "mask_size must be"),
        ({"mask_size": (3, 0)}, "mask_size must be"),
        ({"mask_size": (3, 4, 5)}, r"mask_size must be a number or \(height, width\), not \(3, 4, 5\)"),
        ({"start": float("nan")}, "start must be a finite number, not nan"),
        ({"start": True}, "start must be a finite number, not True"),
        ({"start": torch.tensor([0.5, torch.inf])}, "start must be finite, without NaN"),
        ({"seed": 0.5}, "seed must be a whole number of at least 0"),
    ],
    ids=str,
)
def test_settings_are_checked(linear, options, message):
    with pytest.raises(ValueError, match=message):
        MeaningfulPerturbation(linear, **options)


def test_arguments_are_checked(linear, small):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not function"):
        MeaningfulPerturbation(lambda x: x)
    with pytest.raises(TypeError, match="composite must be None"):
        MeaningfulPerturbation(linear, "guided")
    attributor = MeaningfulPerturbation(linear, **{**BARE, "steps": 1})
    with pytest.raises(ValueError, match=r"images of shape \(batch, channels, height, width\), not \(2, 4, 5\)"):
        attributor(small[0])
    with pytest.raises(ValueError, match="2 classes for 3 samples"):
        attributor(small, [0, 1])
    with pytest.raises(TypeError, match="it is in layer '1'"):
        attributor(small, Neuron("1", 0))
    with pytest.raises(ValueError, match="NaN"):
        attributor(small.clone().fill_(float("nan")))
    handle = linear.register_forward_hook(lambda module, args, output: output + float("inf"))
    with pytest.raises(ValueError, match=r"score is NaN or infinite for samples \[0, 1, 2\]"):
        attributor(small, 0)
    handle.remove()
    with pytest.raises(ValueError, match=r"start has shape \(7,\), which does not broadcast to .*\(3, 1, 4, 5\)"):
        MeaningfulPerturbation(linear, **{**BARE, "steps": 1}, start=torch.zeros(7))(small, 1)
    with pytest.raises(ValueError, match=r"background has shape \(9,\)"):
        MeaningfulPerturbation(linear, **{**BARE, "background": torch.zeros(9)})(small, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float(), r"layer '1' \(Linear\) has weights of torch.float64 and gets torch.float32"),
        (lambda x: x[..., :3], r"layer '1' \(Linear\) takes 40 features and gets a tensor of shape \(3, 24\)"),
        (lambda x: x.long(), "data must be a floating-point tensor, .*, not torch.int64"),
    ],
    ids=["dtype", "size", "whole numbers"],
)
def test_images_that_do_not_fit_are_told_in_our_words(linear, small, change, message):
    with pytest.raises(CRPError, match=message):
        MeaningfulPerturbation(linear, **{**BARE, "steps": 1})(change(small), 1)


def test_predictions_have_classes(images):
    model = nn.Conv2d(3, 2, 3).double().eval()
    with pytest.raises(ValueError, match=r"output has shape \(4, 2, 14, 14\), of which no class is the predicted one"):
        MeaningfulPerturbation(model, **SMALL)(images)
    found = MeaningfulPerturbation(model, **SMALL)(images, lambda output: output.flatten(1).mean(1))
    assert found.heatmap.shape == (4, 16, 16)
