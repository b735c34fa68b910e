"""``--output``: what is explained of models that return a dict, a segmentation, boxes or several outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from command_cases import crp, place_with_module, write_pictures
from PIL import Image
from report_cases import Parsed

import crp as package
from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.errors import LoadingError
from crp.outputs import detection, entry, segmentation
from crp.visualization import FeatureVisualization, Table
from crp.visualization.mining.run import mine
from crp.visualization.models import load_model
from crp.visualization.scored import load_output
from crp.visualization.table.fingerprint import fingerprint
from crp.visualization.table.store import TableMismatchError

MODULE = """
import torch
from torch import nn
from detectors import DETECTORS

class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.pixels, self.scores = nn.Conv2d(4, 3, 1), nn.Linear(4, 3)
        nn.init.uniform_(self.features[0].weight, 0, 1)  # (no concept is silent)
        nn.init.uniform_(self.pixels.weight, 0, 1)
    def forward(self, x):
        maps = self.features(x)
        return {"out": self.pixels(maps), "scores": self.scores(maps.mean((2, 3))), "maps": maps}

def net():
    torch.manual_seed(0)
    return Dense()

def detector():
    torch.manual_seed(0)
    return DETECTORS["fcos"]()

def several():
    net = Dense()
    net.forward = lambda x: tuple(Dense.forward(net, x).values())
    return net

def of_pixels(returned): return returned["out"].mean((2, 3))
def no_tensor(returned): return list(returned)
class Kind: pass
number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_pictures(tmp_path / "photos", 6, "abc", 64)
    return place_with_module(tmp_path, monkeypatch, "dense_nets", MODULE)


def attribute(output: str | None, *more: object, model: str = "net", out: str = "why.html") -> Result:
    given = [] if output is None else ["--output", output]
    fixed = ["photos/a/0.png", "--model", f"dense_nets:{model}", "--method", "epsilon_plus", "--out", out]
    return crp("attribute", *fixed, *given, *more)


def mined(output: str | None, *more: object, out: str = "atlas") -> Result:
    given = [] if output is None else ["--output", output]
    fixed = ["--data", "photos", "--layers", "features.1", "--composite", "epsilon_plus", "--quiet", "--size", 8]
    return crp("mine", "--model", "dense_nets:net", *fixed, "--out", out, *given, *more)


def read(name: str = "photos/a/0.png", size: int | None = None) -> torch.Tensor:
    picture = Image.open(name).resize((size, size), Image.Resampling.BILINEAR) if size else Image.open(name)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "function"),
    [
        ("segmentation", segmentation()),
        ("segmentation:where=all,positive=false,key=none", segmentation(None, "all", False)),
        ("detection", detection()),
        ("detection:box=0,score=log-odds", detection("log-odds", 0)),
        ("entry:key=scores", entry("scores")),
        ("entry:key=1", entry(1)),
    ],
)
def test_words_mean_the_functions_of_the_package(word, function):
    assert fingerprint(load_output(word)) == fingerprint(function)


def test_functions_of_ones_own_are_found(here):
    found = load_output("dense_nets:of_pixels")
    assert found is __import__("dense_nets").of_pixels


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("segmentatoin", "must be entry:key=NAME, segmentation, detection, or package.module:function; nearest: 'segm"),
        (" ", "must be entry:key=NAME"),
        ("segmentation:were=all", "'were=all' must be NAME=VALUE of key, where, positive; nearest: 'where'"),
        ("segmentation:where=some", "where must be one of 'own', 'all', not 'some'"),
        ("segmentation:positive=yes", "positive must be True or False, not 'yes'"),
        ("segmentation:where=all,where=own", "where is given twice"),
        ("segmentation:where=all,own", "'own' must be NAME=VALUE of"),
        ("detection:box=first", "box must be 'best', 'all' or the number of a box, not 'first'"),
        ("detection:box=all", "of all boxes, no class can be explained; name one, box=0, or box=best"),
        ("detection:box=1.5", "not '1.5'"),
        ("entry", "must say which: entry:key=NAME"),
        ("entry:", "must say which: entry:key=NAME"),
        ("nothing_here:function", "the module nothing_here cannot be imported"),
        ("dense_nets:of_pixel", "dense_nets has no 'of_pixel'; nearest: 'of_pixels'"),
        ("dense_nets:number", "must be a function of what the model returns, not 3"),
        ("dense_nets:Kind", "must be a function of what the model returns"),
    ],
)
def test_words_that_cannot_be_read_are_refused_before_any_work(here, word, message):
    with pytest.raises(LoadingError) as raised:
        load_output(word)
    assert message in str(raised.value)
    for result in (attribute(word), mined(word)):
        assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
    assert not (here / "why.html").exists() and not (here / "atlas").exists()


# --- one picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "output"),
    [("segmentation", segmentation()), ("entry:key=scores", entry("scores")), ("dense_nets:of_pixels", None)],
    ids=["segmentation", "entry", "own"],
)
def test_a_picture_is_explained_as_by_the_call(here, monkeypatch, word, output):
    from crp.commands import panel

    seen: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(panel, "draw", lambda image, heatmap, *_: seen.update(heatmap=heatmap))
    result = attribute(word, "--target", 2, "--json", out="why.png")
    assert result.exit_code == 0, result.output
    module = __import__("dense_nets")
    output, model = output or module.of_pixels, module.net().eval()
    expected = package.explain("epsilon_plus", model, read(), 2, output=output)[0].sum(0)
    torch.testing.assert_close(seen["heatmap"], expected)
    scores, facts = output(model(read()))[0].detach(), json.loads(result.output)
    told = scores if word == "segmentation" else scores.softmax(0)
    what = "score" if word == "segmentation" else "probability"
    assert facts["explained"] == {"class": 2, "name": "class 2", what: pytest.approx(float(told[2]), rel=1e-4)}
    assert facts["predicted"]["class"] == int(scores.argmax())


def test_a_segmentation_has_a_page_without_probabilities(here):
    result = attribute("segmentation", "--page", "--layer", "features.1", "--json")
    assert result.exit_code == 0, result.output
    text = Parsed(here / "why.html").text
    assert "score" in text and "Prediction" not in text
    assert len(json.loads(result.output)["concepts"]) == 4


def test_boxes_of_a_detector_of_torchvision_are_explained(here):
    result = attribute("detection", "--target", 1, "--json", model="detector", out="why.png")
    assert result.exit_code == 0, result.output
    loaded = load_model("dense_nets:detector", output=detection())
    assert json.loads(result.output)["explained"]["score"] == pytest.approx(float(loaded.scores(read())[0, 1]))
    told = " ".join(attribute("detection:box=9", model="detector").output.split())
    assert "box 9 is to be explained, but 4 boxes are found in sample 0" in told


@pytest.mark.parametrize(
    ("word", "model", "message"),
    [
        (None, "net", "the model returns a dict"),
        ("entry:key=out", "net", "shape (1, 3, 64, 64), and is no score of classes"),
        ("entry:key=logits", "net", "the model returns ['maps', 'out', 'scores'], and not 'logits'"),
        ("dense_nets:no_tensor", "net", "must take a tensor from what the model returns, not a list"),
        ("entry:key=3", "several", "the model returns 3 values, and there is none at 3"),
        ("entry:key=scores", "several", "the model returns a tuple, which has no 'scores'"),
        ("detection", "net", "'logits'"),
    ],
)
def test_an_output_that_the_model_does_not_have_is_told_of(here, word, model, message):
    result = attribute(word, model=model)
    assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
    assert not (here / "why.html").exists()


def test_models_of_torchvision_for_pixels_and_boxes_have_names():
    for name in ("lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"):
        loaded = load_model(name, output=segmentation())
        assert (loaded.prepared.resize, loaded.prepared.size) == (0, 0)
    assert "logits" in type(loaded.model).__name__.lower() or hasattr(loaded.model, "postprocess_detections")


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["segmentation", "entry:key=scores", "dense_nets:of_pixels"])
def test_a_table_knows_its_output(here, word):
    assert mined(word, "--stop", 3).exit_code == 0
    result = crp("mine", "--out", "atlas", "--quiet")
    assert (result.exit_code, result.output) == (0, "6 of 6 samples, 6 rows; complete\n"), result.output
    table = Table.open(here / "atlas")
    assert table.header.recipe["output"]["named"] == word
    assert f"output     {word}\n" in crp("status", "atlas").output
    fv = FeatureVisualization.open("atlas")
    function = load_output(word)
    assert fingerprint(fv.attribution.output) == fingerprint(function)
    assert fv.attribution.exclusive == (word != "segmentation")
    model = __import__("dense_nets").net().eval()
    samples = [(read(f"photos/{'abc'[i]}/{j}.png", 8)[0], i) for i in range(3) for j in (i, i + 3)]
    attribution = CondAttribution(model, output=function)
    same = mine(attribution, samples, {"features.1": ChannelConcept()}, EpsilonPlus(), here / "b", progress=False)
    expected, found = same.column("features.1", 2), table.column("features.1", 2)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-3, atol=1e-6)
    assert fv.get_max_reference([0], "features.1", "relevance", (0, 2), composite=EpsilonPlus(), rf=False)[0]
    report = crp("report", "atlas", "--quiet", "--references", 1)
    assert report.exit_code == 0, report.output


@pytest.mark.parametrize("other", ["segmentation:where=all", "entry:key=scores", "dense_nets:of_pixels"])
def test_a_run_with_another_output_is_refused(here, other):
    assert mined("segmentation", "--stop", 3).exit_code == 0
    result = crp("mine", "--out", "atlas", "--quiet", "--output", other)
    assert result.exit_code == 1 and "was mined with another output" in " ".join(result.output.split()), result.output


def test_a_table_without_an_output_takes_none(here):
    net = "torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3))"
    (here / "plain_nets.py").write_text(
        f"import torch\ndef net():\n    torch.manual_seed(0)\n    return {net}\ndef same(y): return y\n"
    )
    fixed = ["--model", "plain_nets:net", "--data", "photos", "--layers", "0", "--quiet", "--size", 8, "--out", "plain"]
    assert crp("mine", *fixed, "--stop", 3).exit_code == 0
    result = crp("mine", *fixed, "--output", "plain_nets:same")
    assert result.exit_code == 1 and "was mined with another output" in " ".join(result.output.split()), result.output


# --- tables of Python code --------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(here: Path) -> tuple[Path, torch.nn.Module, list[tuple[torch.Tensor, int]]]:
    model = __import__("dense_nets").net().eval()
    data = [(read(f"photos/{'abc'[i]}/{i}.png", 8)[0], i) for i in range(3)]
    fv = FeatureVisualization(CondAttribution(model, output=segmentation()), data, ["features.1"], path=here / "hand")
    fv.run(EpsilonPlus(), progress=False)
    return here / "hand", model, data


def test_a_table_of_an_output_is_opened_with_it(by_hand):
    path, model, data = by_hand
    with pytest.raises(LoadingError, match=r"mined with output=crp.outputs.segmentation.*give output="):
        FeatureVisualization.open(path, model=model, dataset=data)
    fv = FeatureVisualization.open(path, model=model, dataset=data, output=segmentation())
    wanted = {"composite": EpsilonPlus(), "rf": False}
    assert fv.get_max_reference([0], "features.1", "relevance", (0, 2), **wanted)[0]
    for other in (segmentation(where="all"), entry("scores")):
        fv = FeatureVisualization.open(path, model=model, dataset=data, output=other)
        with pytest.raises(TableMismatchError, match="another output"):
            fv.get_max_reference([0], "features.1", "relevance", (0, 2), **wanted)
    plain = FeatureVisualization(CondAttribution(model), data, ["features.1"], path=path)
    with pytest.raises(TableMismatchError, match="another output"):
        plain.get_max_reference([0], "features.1", "activation", (0, 2), rf=False)
    with pytest.raises(ValueError, match="preprocess_fn and output are given together"):
        FeatureVisualization.open(path, output=segmentation())


# --- detectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
@pytest.mark.filterwarnings("ignore:the objective has no gradient at the start")
def test_a_table_of_boxes_goes_on_and_has_an_atlas(here, name):
    """What a model notes of its data, such as the scales of its maps, does not make it another one."""
    (here / "dense_nets.py").write_text(MODULE.replace('DETECTORS["fcos"]', f'DETECTORS["{name}"]'))
    words = ["--model", "dense_nets:detector", "--data", "photos", "--layers", "backbone.4", "--quiet"]
    words += ["--composite", "epsilon_plus", "--output", "detection", "--out", "boxes"]
    assert crp("mine", *words, "--stop", 3).exit_code == 0
    result = crp("mine", "--out", "boxes", "--quiet")
    assert (result.exit_code, result.output) == (0, "6 of 6 samples, 6 rows; complete\n"), result.output
    result = crp("report", "boxes", "--quiet", "--references", 1, "--maximize", 1, "--steps", 2)
    assert result.exit_code == 0, result.output
    # (the last maps of a detector are of its heads, through which no relevance of classes flows, or of regions)
    result = attribute("detection", "--target", 1, "--page", "--json", model="detector")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["layer"] and facts["concepts"]
