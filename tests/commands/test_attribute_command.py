"""``crp methods`` and ``crp attribute``: what they write, and what they say when something is wrong."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import crp
from crp.commands import attribute as attribute_command
from crp.commands.cli import cli
from crp.concepts import AxisConcept
from crp.trace.axes import channel_axes
from crp.visualization import models as loading
from crp.visualization.mining import axes
from crp.visualization.table import files

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers)

ready = net()
number = 3
one = lambda: nn.Sequential(ready[:4], nn.Linear(4, 1))
grey = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
tokens = lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())

class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.block, self.out = nn.Conv2d(3, 5, 4, 4), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.block(self.cut(x).flatten(2).mT).mean(1))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_mine.py").write_text(FACTORY)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_mine", raising=False)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def attribute(*arguments: object, model: str = "nets_of_mine:net", out: str = "out.png") -> Result:
    return run("attribute", "picture.png", "--model", model, "--out", out, *arguments)


def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What is drawn, in place of drawing it."""
    from crp.commands import panel

    seen: dict[str, object] = {}
    names = ("image", "heatmap", "title", "caption", "path")
    monkeypatch.setattr(panel, "draw", lambda *values: seen.update(zip(names, values, strict=True)))
    return seen


# --- methods ----------------------------------------------------------------------------------------------------------


def test_table_lists_every_method_with_its_options_and_paper():
    told = run("methods").output
    for method in crp.methods():
        assert f"  {method.name} " in told and method.paper in told
    assert "layer (required)" in told and "steps=100" in told


def test_table_of_one_family():
    told = run("methods", "--family", "cam").output
    assert "grad_cam_pp" in told and "intgrad" not in told
    result = run("methods", "--family", "cams")
    assert result.exit_code == 1
    assert "there is no family 'cams'; there are cam, gradient, perturbation, propagation" in result.output


# --- one picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_picture_is_written(place, suffix):
    result = attribute("--method", "grad_cam", "--layer", "1", out=f"new/out{suffix}")
    assert result.exit_code == 0, result.output
    assert "picture.png: predicted class " in result.output and f"wrote new/out{suffix}" in result.output
    with Image.open(place / "new" / f"out{suffix}") as picture:
        assert picture.size == (1200, 468)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--method", "epsilon"), {}),
        (("--method", "epsilon", "--layer", "0", "--concept", 1, "--concept", 3), {"condition": {"0": [1, 3]}}),
        (
            ("--method", "intgrad", "--option", "steps=4", "--option", "quadrature=middle"),
            {"steps": 4, "quadrature": "middle"},
        ),
        (
            ("--method", "occlusion", "--option", "window_shape=[1, 4, 2]", "--option", "step=[1, 4, 2]"),
            {"window_shape": (1, 4, 2), "step": (1, 4, 2)},
        ),
        (
            ("--method", "occlusion", "--option", "window_shape=4", "--option", "per_feature=true"),
            {"window_shape": 4, "per_feature": True},
        ),
        (("--method", "epsilon", "--layer", "1"), {"layer": "1"}),
    ],
)  # fmt: skip
def test_heatmap_is_that_of_the_call(place, monkeypatch, arguments, options):
    seen = drawn(monkeypatch)
    assert attribute(*arguments, "--target", 2).exit_code == 0
    model = __import__("nets_of_mine").net().eval()
    with Image.open("picture.png") as file:
        image = torch.from_numpy(np.asarray(file).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(seen["image"], image)
    torch.testing.assert_close(seen["heatmap"], crp.explain(arguments[1], model, image[None], 2, **options)[0].sum(0))
    assert seen["caption"].startswith(arguments[1])


def test_axes_of_concepts_are_looked_for_once(place, monkeypatch):
    seen = []
    monkeypatch.setattr(axes, "channel_axes", lambda *given: seen.append(given) or channel_axes(*given))
    (place / "other.png").write_bytes((place / "picture.png").read_bytes())
    result = attribute("other.png", "--method", "epsilon", "--layer", "0", "--concept", 1, out="out")
    assert result.exit_code == 0 and result.output.count("wrote") == 2, result.output
    assert len(seen) == 1


@pytest.mark.parametrize("n", [2, 4])
def test_as_many_classes_are_named_as_the_model_has(place, n):
    (place / "names.txt").write_text("".join(f"name {i}\n" for i in range(n)))
    result = attribute("--classes", "names.txt")
    assert result.exit_code == 1 and not (place / "out.png").exists()
    assert f"--classes names.txt names {n} classes, and the model has 3 outputs" in result.output


def test_a_single_output_is_no_probability(place, monkeypatch):
    seen = drawn(monkeypatch)
    result = attribute("--json", model="nets_of_mine:one")
    facts = json.loads(result.output)
    assert facts["predicted"].keys() == {"class", "name", "score"} == facts["explained"].keys()
    assert seen["title"] == f"predicted: class 0 (score {facts['predicted']['score']:.4g})"


def test_a_picture_is_written_as_a_whole_or_not_at_all(place, monkeypatch):
    def full(handle: int, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write_all", full)
    result = attribute()
    assert result.exit_code == 1 and "No space left on device: " in result.output and "'out.png'" in result.output
    assert sorted(one.name for one in place.iterdir() if one.is_file()) == ["nets_of_mine.py", "picture.png"]


def test_channels_of_tokens_come_last(place, monkeypatch):
    seen = drawn(monkeypatch)
    words = "--method", "epsilon", "--layer", "block", "--concept", -1, "--target", 2
    result = attribute(*words, model="nets_of_mine:Patches")
    assert result.exit_code == 0, result.output
    options = {"condition": {"block": [-1]}, "mask_map": AxisConcept(-1).mask}
    model = __import__("nets_of_mine").Patches().eval()
    found = crp.explain("epsilon", model, seen["image"][None], 2, **options)
    torch.testing.assert_close(seen["heatmap"], found[0].sum(0))


def test_occlusion_takes_windows_that_end_at_the_edge(place, monkeypatch):
    seen = drawn(monkeypatch)
    result = attribute("--method", "occlusion", "--target", 2, "--size", 32)
    assert result.exit_code == 0 and "no window covers" not in result.output, result.output
    model = __import__("nets_of_mine").net().eval()
    options = {"window_shape": (4, 4), "step": (2, 2)}
    expected = crp.explain("occlusion", model, seen["image"][None], 2, **options)[0, 0]
    torch.testing.assert_close(seen["heatmap"], expected)
    assert seen["caption"] == "occlusion, windows of 4 x 4 pixels"


@pytest.mark.untraced
def test_windows_cover_every_pixel():
    for side in range(1, 400):
        ((length,), (step,)) = attribute_command._windows(side)
        assert (side - length) % step == 0 and 1 <= step <= length <= max(1, side // 4), side
        assert (side - length) // step + 1 <= 24, side


def test_a_class_activation_map_without_a_layer_names_one(place):
    result = attribute("--method", "GradCAM")
    assert result.exit_code == 1
    assert "method 'grad_cam' needs layer=, such as --layer 1" in result.output


@pytest.mark.parametrize(("norm", "told"), [((), True), (("--mean", 0.5, "--std", 1), False)], ids=["not", "is"])
def test_pictures_that_are_not_normalised_are_told_of(place, norm, told):
    result = attribute("--method", "epsilon", *norm)
    assert result.exit_code == 0 and ("pictures were not normalised" in result.output) == told


@pytest.mark.parametrize(
    ("arguments", "options", "caption"),
    [
        (
            ("grad_cam", "--layer", "1", "--concept", 2),
            {"layer": "1", "condition": {"1": [2]}},
            "grad_cam through channels [2] of 1",
        ),
        (
            ("occlusion", "--option", "window_shape=[4, 2]", "--option", "step=[4, 2]"),
            {"window_shape": (4, 2), "step": (4, 2)},
            "occlusion",
        ),
        (
            ("shapley_sampling", "--option", "sampling_dims=[2, 3]", "--option", "samples=1"),
            {"sampling_dims": (2, 3), "samples": 1},
            "shapley_sampling",
        ),
    ],
    ids=["grad_cam", "occlusion", "shapley_sampling"],
)
def test_maps_of_positions_are_not_summed_over_channels(place, monkeypatch, arguments, options, caption):
    seen = drawn(monkeypatch)
    result = attribute("--method", *arguments, "--target", 0)
    assert result.exit_code == 0, result.output
    model = __import__("nets_of_mine").net().eval()
    expected = crp.explain(arguments[0], model, seen["image"][None], 0, **options)[0]
    assert torch.equal(expected[0], expected[2])
    torch.testing.assert_close(seen["heatmap"], expected[0])
    assert seen["caption"] == caption


def test_preparation_classes_and_checkpoints(place, monkeypatch):
    seen = drawn(monkeypatch)
    model = __import__("nets_of_mine").net().eval()
    nn.init.constant_(model[4].weight, 0.0)
    model[4].bias.data = torch.tensor([0.0, 9.0, 0.0])
    torch.save({"state_dict": model.state_dict()}, "net.pt")
    save_file(model.state_dict(), "net.safetensors")
    Path("names.txt").write_text("cat\ndog\nship\n")
    norm = ["--mean", "0.5,0.5,0.5", "--std", 0.25, "--std", "0.25,0.25"]
    for checkpoint in ("net.pt", "net.safetensors"):
        result = attribute(
            "--method", "epsilon", "--checkpoint", checkpoint, "--classes", "names.txt", "--size", 8, *norm
        )
        assert result.exit_code == 0, result.output
        assert "predicted dog (100.0 %)" in result.output
        assert seen["image"].shape == (3, 8, 8)
    expected = crp.explain("epsilon", model, ((seen["image"] - 0.5) / 0.25)[None], 1)
    torch.testing.assert_close(seen["heatmap"], expected[0].sum(0))
    result = attribute("--checkpoint", "net.pt", "--classes", "names.txt", "--target", -1)
    assert "predicted dog (100.0 %); explained: ship (0.01 %)" in result.output


def test_models_of_torchvision_without_a_download(place, monkeypatch):
    seen = drawn(monkeypatch)
    result = attribute("--size", 40, "--method", "grad_cam", "--layer", "features.9", model="squeezenet1_1")
    assert result.exit_code == 0, result.output
    assert seen["image"].shape == (3, 40, 40)


def test_weights_say_how_pictures_are_prepared(place, monkeypatch):
    from torchvision import models

    squeezenet = models.squeezenet1_1()
    monkeypatch.setattr(models, "get_model", lambda name, weights: squeezenet)
    loaded = loading.load_model("squeezenet1_1", "DEFAULT")
    assert loaded.normalized is not None
    assert (loaded.prepared.resize, loaded.prepared.size, loaded.normalized.mean[0]) == (256, 224, 0.485)
    assert loaded.class_name(1) == "goldfish" and loaded.class_name(1000) == "class 1000"
    shown, data = loaded.read(place / "picture.png")
    assert shown.shape == (3, 224, 224) and shown.min() >= 0 and shown.max() <= 1
    torch.testing.assert_close(data[0] * 0.229 + 0.485, shown, rtol=0.1, atol=0.1)


def test_grey_models_get_grey_pictures(place, monkeypatch):
    seen = drawn(monkeypatch)
    assert attribute("--size", 8, "--method", "gradient", model="nets_of_mine:grey").exit_code == 0
    assert seen["image"].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        ((), "squeezenet", "there is no model 'squeezenet' in torchvision; nearest: 'squeezenet1_"),
        (("--weights", "IMAGENET"), "squeezenet1_1", "has no weights 'IMAGENET'; it has IMAGENET1K_V1, DEFAULT"),
        (("--weights", "DEFAULT", "--checkpoint", "net.pt"), "squeezenet1_1", "are both given; one fills the model"),
        (("--weights", "DEFAULT"), "nets_of_mine:net", "are those of torchvision's models"),
        ((), "nets_of_yours:net", "No module named 'nets_of_yours'; modules are looked for in"),
        ((), "nets_of_mine:nets", "nets_of_mine has no 'nets'; nearest: 'net'"),
        ((), "builtins:dict", "builtins:dict gives a dict, not a torch.nn.Module"),
        ((), "nets_of_mine:tokens", "is no score of classes"),
        (("--size", 9), "nets_of_mine:grey", "takes 72 features and gets a tensor of shape (1, 98)"),
        (("--size", 9), "nets_of_mine:grey", "; --size says how large pictures are"),
        (("--checkpoint", "picture.png"), "nets_of_mine:net", "picture.png is no checkpoint that can be read"),
        (("--checkpoint", "net.pt"), "nets_of_mine:ready", "net.pt does not fit the model"),
        (("--checkpoint", "broken.safetensors"), "nets_of_mine:net", "is no checkpoint that can be read"),
        (("--checkpoint", "words.pt"), "nets_of_mine:net", "no checkpoint that can be read: not by torch.save"),
        (("--method", "grad_can"), "nets_of_mine:net", "no method 'grad_can'; nearest: 'grad_cam'"),
        (("--method", "grad_cam"), "nets_of_mine:net", "needs layer="),
        (("--method", "grad_cam", "--layer", "4"), "nets_of_mine:net", "has no positions"),
        (("--method", "epsilon", "--layer", "4"), "nets_of_mine:net", "layer '4' has no positions to draw"),
        (("--concept", 1), "nets_of_mine:net", "--concept needs the --layer that it is in"),
        (("--layer", "0", "--concept", 9), "nets_of_mine:net", "there is no channel 9"),
        (("--layer", "O"), "nets_of_mine:net", "<--layer> 'O' not found in model; there are '0', '1'"),
        (("--target", 5), "nets_of_mine:net", "target 5 is out of range"),
        (("--option", "steps"), "nets_of_mine:net", "must be NAME=VALUE"),
        (("--option", "steps=3"), "nets_of_mine:net", "no option 'steps'"),
        (("--mean", 0.5), "nets_of_mine:net", "--mean has 1 values and --std 0"),
        (("--mean", 0.5, "--std", 1, "--mean", 0.5, "--std", 1), "nets_of_mine:net", "2 values for 3 channels"),
        (("--classes", "picture.png"), "nets_of_mine:net", "picture.png cannot be read"),
    ],
)  # fmt: skip
def test_errors_are_words(place, arguments, model, message):
    torch.save(nn.Linear(2, 2).state_dict(), "net.pt")
    Path("broken.safetensors").write_bytes(b"no")
    Path("words.pt").write_text("hello\n")
    result = attribute(*arguments, model=model)
    assert result.exit_code == 1, result.output
    assert message in result.output.replace("\n", " ")
    assert not (place / "out.png").exists()


def test_numbers_of_channels_have_commas_between(place):
    result = attribute("--mean", "0.5;0.5")
    assert result.exit_code == 2
    assert "could not convert string to float: '0.5;0.5'; give a number for each channel, such as" in result.output


def test_pictures_that_cannot_be_read_or_written(place):
    Path("words.png").write_text("words")
    result = run("attribute", "words.png", "--model", "nets_of_mine:net", "--out", "out.png")
    assert result.exit_code == 1 and "words.png is no picture that can be read" in result.output
    result = attribute(out="out.txt")
    assert result.exit_code == 1 and "must end in .png, .jpg, .pdf or .svg, or .html for a page" in result.output
    result = run("attribute", "a text", "--model", "x", "--out", "out.png")
    assert result.exit_code == 2 and "'a text' does not exist. Texts are given by --text" in result.output


def test_pictures_that_cannot_be_read_do_not_keep_others_from_being_explained(place):
    for name in ("cut.png", "words.png"):
        Path(name).write_bytes(Path("picture.png").read_bytes()[:100])
    result = run("attribute", "cut.png", "picture.png", "words.png", "--model", "nets_of_mine:net", "--out", "maps")
    assert result.exit_code == 1
    assert [path.name for path in Path("maps").iterdir()] == ["picture.png"]
    assert "picture.png: predicted class" in result.stdout
    assert "Error: 2 of 3 pictures left out: cut.png is no picture that can be read" in result.stderr
    assert "words.png is no picture that can be read" in result.stderr
