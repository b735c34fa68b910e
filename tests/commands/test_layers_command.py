"""``crp layers``, ``--layers auto``, models of libraries, names as people type them, and many pictures in one call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import crp
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from crp.attributors.explaining import explain, find_method
from crp.composites import EpsilonPlusFlat, get
from crp.errors import LoadingError
from crp.visualization.mining.selection import list_layers
from crp.visualization.models import load_model

MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    ).eval()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module ``nets12``, names of classes, and pictures of two classes."""
    (tmp_path / "nets12.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets12", raising=False)
    (tmp_path / "names.txt").write_text("Cat\ndog\nship\n")
    for name in ("Cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (14, 14, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path


# --- layers


def test_layers_are_listed_with_their_shapes(here):
    result = crp("layers", "nets12:net", "--size", 14)
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.output.splitlines()[:5]] == [
        ["0", "Conv2d", "4", "x", "12", "x", "12"],
        ["*", "1", "ReLU", "4", "x", "12", "x", "12"],
        ["2", "MaxPool2d", "4", "x", "6", "x", "6"],
        ["3", "Conv2d", "6", "x", "4", "x", "4"],
        ["*", "4", "ReLU", "6", "x", "4", "x", "4"],
    ]
    found = json.loads(crp("layers", "nets12:net", "--size", 14, "--json").output)
    assert found[0] == {"name": "0", "kind": "Conv2d", "shape": [4, 12, 12], "suggested": False}


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg11", ["features.4", "features.9", "features.14", "features.19"]),
    ],
)
def test_the_last_layer_of_each_size_is_suggested(model, wanted):
    loaded = load_model(model)
    assert [one.name for one in list_layers(loaded.model, loaded.example()) if one.suggested] == wanted


def test_models_without_feature_maps_suggest_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    assert [one.suggested for one in list_layers(net, torch.zeros(1, 3, 2, 2))] == [False, False]
    assert all(not module._forward_hooks for module in net.modules())


def test_mine_takes_the_suggested_layers_and_report_shows_them(here):
    options = ["--model", "nets12:net", "--data", "pictures", "--composite", "EpsilonPlus", "--targets", "prediction"]
    result = crp("mine", *options, "--layers", "auto", "--size", 14, "--out", "atlas", "--quiet")
    assert result.exit_code == 0, result.output
    assert crp("report", "atlas", "--references", 2, "--quiet").exit_code == 0
    suggested = [
        one["name"]
        for one in json.loads(crp("layers", "nets12:net", "--size", 14, "--json").output)
        if one["suggested"]
    ]
    assert sorted(path.stem for path in Path("atlas/atlas/layer").iterdir()) == sorted(suggested)


def test_a_model_of_other_pictures_says_what_to_give(here):
    assert "--size says how large pictures are" in crp("layers", "nets12:net").output
    assert "--size" not in crp("layers", "nets12:nut").output


# --- names


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("LRP", "epsilon_plus_flat"),
        ("GradCAM", "grad_cam"),
        ("Grad-CAM++", "grad_cam_pp"),
        ("ig", "intgrad"),
        ("IntegratedGradients", "intgrad"),
        ("EpsilonPlusFlat", "epsilon_plus_flat"),
        ("Saliency", "saliency"),
        ("grad*input", "grad*input"),
    ],
)
def test_methods_go_by_the_names_that_people_type(typed, name):
    assert find_method(typed).name == name


def test_names_in_another_case_give_the_same_explanation():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    data = torch.rand(2, 3, dtype=torch.float64)
    assert torch.equal(explain("Epsilon", net, data, 1), explain("epsilon", net, data, 1))
    assert isinstance(get("EpsilonPlusFlat"), EpsilonPlusFlat)
    with pytest.raises(KeyError, match="nearest: 'epsilon_plus'"):
        get("epsilon_pluss")


# --- targets, many pictures


def test_a_target_is_named_and_several_pictures_are_explained(here):
    pictures = [Path("pictures/Cat/0.png"), Path("pictures/dog/0.png"), Path("pictures/dog/0-0.png")]
    pictures[2].write_bytes(Path("pictures/dog/1.png").read_bytes())
    options = ["--model", "nets12:net", "--method", "GradientXInput", "--classes", "names.txt"]
    result = crp("attribute", *pictures, *options, "--target", "SHIP", "--out", "explained")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("explained").iterdir()) == ["0-0-2.png", "0-0.png", "0-1.png"]
    assert result.output.count("predicted ") == 3
    for target, text in (("shop", "nearest: 'ship'"), ("x", "--target 'x' is no class")):
        assert text in crp("attribute", pictures[0], *options, "--target", target, "--out", "a.png").output
    assert "give --classes" in crp("attribute", pictures[0], *options[:-2], "--target", "ship", "--out", "a.png").output
    assert "name a folder" in crp("attribute", *pictures, *options, "--out", "a.png").output


# --- checkpoints and libraries


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_put_before_are_taken_off(here, prefix):
    net = load_model("nets12:net").model
    with torch.no_grad():
        net[0].bias.fill_(7)
    state = {prefix + name: value for name, value in net.state_dict().items()}
    save_file(state, "a.safetensors")
    torch.save({"state_dict": state}, "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert (load_model("nets12:net", checkpoint=Path(name)).model[0].bias == 7).all()


def test_weights_are_found_beside_what_else_a_training_kept(here):
    net = load_model("nets12:net").model
    with torch.no_grad():
        net[0].bias.fill_(7)
    kept = {"model": net.state_dict(), "epoch": 3, "optimizer": torch.optim.SGD(net.parameters(), 0.1).state_dict()}
    torch.save(kept, "kept.pt")
    assert (load_model("nets12:net", checkpoint=Path("kept.pt")).model[0].bias == 7).all()
    torch.save({**kept, "ema": net.state_dict()}, "two.pt")
    with pytest.raises(LoadingError, match=r"two.pt holds weights under 'model' and 'ema'; save those that are meant"):
        load_model("nets12:net", checkpoint=Path("two.pt"))


def test_a_whole_model_is_no_checkpoint(here):
    torch.save(load_model("nets12:net").model, "whole.pt")
    with pytest.raises(LoadingError, match=r"whole.pt is no .*, or of a whole model; save its state_dict\(\)$"):
        load_model("nets12:net", checkpoint=Path("whole.pt"))


def test_a_checkpoint_of_another_model_names_a_few_entries(here):
    save_file({f"other.{i}": torch.zeros(1) for i in range(99)}, "b.safetensors")
    with pytest.raises(LoadingError, match=r"b.safetensors does not fit the model: it lacks 0.bias, .* and 3 more"):
        load_model("nets12:net", checkpoint=Path("b.safetensors"))


def test_a_model_of_timm_has_its_preparation_and_names(here):
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    save_file(state, "r.safetensors")
    loaded = load_model("timm:resnet18", checkpoint=Path("r.safetensors"))
    assert (loaded.prepared.resize, loaded.prepared.size) == (236, 224)
    assert loaded.normalized.mean == pytest.approx((0.485, 0.456, 0.406))
    assert len(loaded.classes) == 1000 and "tench" in loaded.classes[0]
    with pytest.raises(LoadingError, match="no model 'resnet1818' in timm; nearest: 'resnet"):
        load_model("timm:resnet1818")


def test_a_model_of_hugging_face_gives_scores(here):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", id2label={0: "cat", 1: "dog"}
    )
    transformers.ResNetForImageClassification(config).save_pretrained("small")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained("small")
    loaded = load_model("hf:small")
    assert loaded.classes == ["cat", "dog"] and loaded.prepared.size == 32
    assert loaded.normalized.mean == pytest.approx((0.1,) * 3)
    assert loaded.model(loaded.example()).shape == (1, 2)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "resnet18", "timm:resnet18"])
def test_a_model_is_made_for_the_classes_of_its_checkpoint(here, name):
    library = pytest.importorskip("timm" if name.startswith("timm") else "torchvision")
    make = library.create_model if name.startswith("timm") else library.models.get_model
    state = make("resnet18", num_classes=5).state_dict()
    save_file({f"module.{key}": value for key, value in state.items()}, "five.safetensors")
    loaded = load_model(name, checkpoint=Path("five.safetensors"))
    assert loaded.model.fc.out_features == 5 and torch.equal(loaded.model.fc.weight, state["fc.weight"])
    assert not loaded.classes
    state["conv1.weight"] = torch.zeros(7, 3, 7, 7)
    save_file(state, "other.safetensors")
    with pytest.raises(LoadingError, match=r"other.safetensors does not fit the model: .* size mismatch for conv1"):
        load_model(name, checkpoint=Path("other.safetensors"))
