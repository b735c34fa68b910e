"""Commands that contradict themselves, or ask for what a model, a table or a folder cannot give: refused in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from command_cases import crp, place_with_module, write_pictures
from torch import nn

from crp.visualization import Table
from crp.visualization.mining.selection import list_layers, select_layers

MODULE = """
import torch
from torch import nn

class Returning(nn.Module):
    def __init__(self, change=lambda y: y, channels=3):
        super().__init__()
        self.conv, self.change = nn.Conv2d(3, channels, 3), change
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0, 1, generator=torch.Generator().manual_seed(0))
    def forward(self, x):
        return self.change(self.conv(x).mean((2, 3)))

def net(): return Returning()
def double(): return net().double()
def half(): return net().half()
def whole(): return Returning(lambda y: y.long())
def imaginary(): return Returning(lambda y: y.to(torch.complex64))
def empty(): return Returning(lambda y: y[:, :0])
def in_dict(): return Returning(lambda y: {"scores": y})
def scores(returned): return returned["scores"]
def same(y): return y
def raises(returned): raise ZeroDivisionError("of the user's own")

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.relu, self.pool, self.out = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(5, 3)
    def forward(self, x):
        return self.out(self.relu(self.high(self.pool(self.relu(self.low(x))))).mean((2, 3)))

def shared(): return Shared()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_pictures(tmp_path / "photos", 6, "abc", 12)
    return place_with_module(tmp_path, monkeypatch, "odd_nets", MODULE)


def attribute(*more: object, model: str = "odd_nets:net", out: str = "why.png") -> Result:
    return crp("attribute", "photos/a/0.png", "--model", model, "--method", "epsilon_plus", "--out", out, *more)


def mined(*more: object, model: str = "net", layers: str = "conv", out: str = "atlas") -> Result:
    fixed = ["--data", "photos", "--composite", "epsilon_plus", "--quiet", "--out", out]
    return crp("mine", "--model", f"odd_nets:{model}", "--layers", layers, *fixed, *more)


def told(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


# --- crp attribute ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--option", "target=1"), "--option target is no option of a method; give --target"),
        (("--option", "output=x"), "--option output is no option of a method; give --output"),
        (("--option", "method=x"), "--option method is no option of a method; give --method"),
        (("--option", "data=1"), "--option data is no option of a method; give a picture"),
        (("--option", "neuron=1"), "--option neuron is no option of a method; a class is explained"),
        (("--option", "explain=1"), "--option explain is no option of a method; the picture is explained"),
        (("--option", "layer=conv", "--layer", "conv"), "--option layer and --layer, or --concept, say both"),
        (("--option", 'condition={"conv":[0]}', "--layer", "conv", "--concept", 1), "say both what is explained"),
        (("--option", 'condition={"conv":[0]}', "--page", "--out", "a.html"), "a page shows the concepts of --layer"),
        (("--option", "layer=conv", "--page", "--out", "a.html"), "a page shows the concepts of --layer"),
    ],
)
def test_what_is_said_twice_or_elsewhere_is_refused(here, arguments, message):
    assert message in told(attribute(*arguments))
    assert not (here / "why.png").exists() and not (here / "a.html").exists()


@pytest.mark.parametrize(
    "words", [("--size", 8), ("--mean", 0, "--std", 1), ("--graph", "conv")], ids=["size", "mean", "graph"]
)
def test_options_of_pictures_are_refused_with_texts(here, words):
    result = crp("attribute", "--text", "a", "--model", "odd_nets:net", "--tokenizer", "x", "--out", "a.html", *words)
    assert f"{words[0]}{' and --std' if words[0] == '--mean' else ''}: for pictures alone" in told(result)


@pytest.mark.parametrize(
    "words",
    [("--tokenizer", "x"), ("--position", 1), ("--against", "a"), ("--scale-without-first",)],
    ids=lambda words: words[0],
)
def test_options_of_texts_are_refused_with_pictures(here, words):
    assert "give pictures, or --text, of which --tokenizer, --position, " in told(attribute(*words))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("double", "Returning computes in torch.float64, and samples are torch.float32; load the model in that"),
        ("half", "Returning computes in torch.float16"),
        ("whole", "scores of classes must be real numbers, not torch.int64 of shape (1, 3)"),
        ("imaginary", "scores of classes must be real numbers, not torch.complex64"),
        ("empty", "scores of classes must be real numbers, not torch.float32 of shape (1, 0)"),
    ],
)
def test_models_without_scores_are_told_of(here, model, message):
    assert message in told(attribute(model=f"odd_nets:{model}"))
    if model in ("double", "half"):
        assert message in told(mined(model=model))
    check = crp("check", f"odd_nets:{model}", "--image", "photos/a/0.png", "--composite", "epsilon_plus")
    assert message in told(check)


def test_a_function_of_the_users_that_raises_is_named(here):
    message = "--output: raises raised ZeroDivisionError on what the model returned, a dict: of the user's own"
    for result in (attribute("--output", "odd_nets:raises", model="odd_nets:in_dict"),
                   mined("--output", "odd_nets:raises", model="in_dict")):  # fmt: skip
        assert message in told(result)


def test_random_weights_are_told_of(here):
    result = attribute("--size", 40, "--json", model="squeezenet1_1")
    assert result.exit_code == 0 and "squeezenet1_1 has random weights, which say nothing" in result.stderr
    assert json.loads(result.stdout)["out"] == "why.png"
    assert "random weights" not in attribute().output


# --- layers that are called several times -----------------------------------------------------------------------------


def test_a_layer_that_is_called_twice_must_say_which_call(here):
    message = "--layers: relu is called 2 times for each sample; name a call, of relu#0, relu#1"
    assert message in told(mined(model="shared", layers="relu"))
    assert message in told(mined(model="shared", layers="ReLU"))
    assert not (here / "atlas").exists()
    assert mined("--layers", "low", model="shared", layers="relu#1").exit_code == 0
    assert Table.open("atlas").layers == ("low", "relu#1")
    assert crp("report", "atlas", "--quiet", "--references", 1).exit_code == 0
    assert "there is no relu#2" in told(mined(model="shared", layers="relu#2", out="other"))


def test_calls_of_layers_are_chosen_by_patterns():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    assert select_layers(net, ["Conv2d#0", "1.input#1"]) == ["0#0", "1.input#1", "2#0"]


def test_what_is_called_twice_is_not_suggested(here):
    net = __import__("odd_nets").shared().eval()
    suggested = [one.name for one in list_layers(net, torch.rand(1, 3, 12, 12)) if one.suggested]
    assert suggested == ["low", "high"]
    assert mined(model="shared", layers="auto").exit_code == 0
    assert crp("report", "atlas", "--quiet", "--references", 1).exit_code == 0
    assert attribute("--page", model="odd_nets:shared", out="why.html").exit_code == 0


# --- crp mine and crp report ------------------------------------------------------------------------------------------


def test_nothing_is_written_into_the_data(here):
    message = "is in the folder of the data, photos, and would be read as data; name another"
    for out in ("photos", "photos/a", "photos/new/table"):
        assert message in told(mined(out=out))
    assert sorted(one.name for one in (here / "photos").iterdir()) == ["a", "b", "c"]
    assert mined(out="photos/.hidden").exit_code == 0
    assert mined().exit_code == 0
    assert "would be read as data" in told(crp("report", "atlas", "--quiet", "--out", "photos/pages"))


@pytest.mark.parametrize("targets", ["prediction", "all", "top-2"])
@pytest.mark.parametrize("model", ["imaginary", "empty"])
def test_targets_need_scores(here, model, targets):
    assert f"targets='{targets}' needs scores of classes that are real numbers" in told(
        mined("--targets", targets, model=model)
    )


def test_a_table_of_activation_alone_has_no_atlas(here):
    assert mined("--modes", "activation").exit_code == 0
    assert "an atlas shows relevance, and atlas has activation alone" in told(crp("report", "atlas", "--quiet"))


def test_a_table_of_largest_values_alone_has_an_atlas(here):
    assert mined("--kinds", "max").exit_code == 0
    assert crp("report", "atlas", "--quiet", "--references", 1).exit_code == 0


def test_pages_need_a_folder_and_a_part_has_none(here):
    assert mined().exit_code == 0
    for out in ("odd_nets.py", "odd_nets.py/pages"):
        assert f"{out} cannot be a folder, since it is, or is in, a file" in told(crp("report", "atlas", "--out", out))
    assert "--part writes no page that --open could show" in told(crp("report", "atlas", "--part", "0/2", "--open"))


def test_pictures_of_models_that_return_a_dict_are_made_up(here):
    assert mined("--output", "odd_nets:scores", model="in_dict").exit_code == 0
    result = crp("report", "atlas", "--quiet", "--references", 1, "--maximize", 1, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "pictures of layer 'conv'" in crp("status", "atlas").output


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("return y", "return 2 * y", "output"),
        ("manual_seed(0)\n        self.low", "manual_seed(1)\n        self.low", "model"),
    ],
    ids=["output", "model"],
)
def test_samples_are_not_audited_by_another_model(here, old, new, what):
    words = ["--output", "odd_nets:same", "--targets", "all"]
    assert mined(*words, model="shared", layers="high").exit_code == 0
    result = crp("prototypes", "atlas", "high", "--n", 1)
    assert result.exit_code == 0, result.output
    audit = ["audit", "atlas", "high", "--data", "photos/a"]
    assert crp(*audit).exit_code == 0
    assert old in MODULE
    (here / "odd_nets.py").write_text(f"# changed\n{MODULE.replace(old, new)}")
    sys.modules.pop("odd_nets")
    assert f"was mined with another {what}" in told(crp(*audit))
