"""Mistakes that are made in the first hour are told in words of this package, with what would be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import crp
from crp.attribution import CondAttribution
from crp.audit import (
    Clusters,
    audit,
    collect,
    embed_references,
    export_corelay,
    inside_boxes,
    intervene,
    part_of,
    redundancy,
    save_audit,
    save_clusters,
)
from crp.cache import ImageCache
from crp.canonizers import for_model
from crp.composites import DeepLift, EpsilonPlus
from crp.concept_graph import AttributionGraph
from crp.concepts import AxisConcept, ChannelConcept, Concept, mask_of, relevance_in
from crp.errors import CRPError
from crp.graph import trace_model_graph
from crp.helper import get_layer_names, load_maximization, load_receptive_field
from crp.image import (
    TextHeatmap,
    draw_contour,
    draw_heatmap,
    get_crop_range,
    imgify,
    max_norm,
    overlay,
    plot_form,
    plot_grid,
    text_html,
)
from crp.maximization import Maximization
from crp.metrics import sparseness
from crp.outputs import with_logits
from crp.visualization import FeatureVisualization, Table, maximize
from crp.visualization.mining.run import mine
from crp.visualization.objectives import logit

NET = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).eval()
PICTURES = torch.rand(2, 1, 6, 6)
RESULT = CondAttribution(NET)(PICTURES, [{"y": 0}], EpsilonPlus(), record_layer=["1"])
PICTURE = PICTURES[0]


class Forgetful(Concept):
    """A concept whose mask forgets to return the gradient."""

    def mask(self, row: int, ids: Any, layer_name: str | None = None) -> Callable[[Tensor], Tensor]:
        def keep(gradient: Tensor) -> Tensor:
            gradient[row] = 0
            return None  # type: ignore[return-value]

        return keep


MISTAKES: dict[str, tuple[Callable[..., Any], str]] = {
    "all relevances": (
        lambda: ChannelConcept().attribute(RESULT.relevances),
        "tensor of one layer, .*, not a dict",
    ),
    "a result": (lambda: AxisConcept(-1).attribute(RESULT), "such as result.relevances.*, not an AttributionResults"),
    "a mask of channels": (
        lambda: CondAttribution(NET)(PICTURES, [{"y": 0, "1": torch.ones(3, 9) > 0}]),
        r"layer '1': concept ids must be integers, not tensor\(\[\[True, .*…$",
    ),
    "a model for a method": (lambda: crp.explain(NET, "ig", PICTURES, 0), "must be a name, .* the order is explain"),
    "a composite for a method": (lambda: crp.explain(EpsilonPlus(), NET, PICTURES, 0), "takes a composite itself"),
    "no layer": (lambda: crp.explain("grad_cam", NET, PICTURES, 0), "needs layer=, .* such as the last convolution"),
    "a type's name": (lambda: get_layer_names(NET, ["Conv2d"]), "such as .nn.Conv2d, nn.Linear.; 'Conv2d' is none"),
    "two heatmaps": (lambda: imgify(RESULT.heatmap), r"or grid=True for several images; got \(2, 6, 6\)"),
    "a colour": (lambda: imgify(PICTURE, cmap="blues"), "cmap must be one of bwr, .*, not 'blues'"),
    "no colour": (lambda: imgify(PICTURE, cmap=3), "cmap must be one of bwr, .*, not 3"),
    "a size": (lambda: imgify(PICTURE, resize="big"), "resize must be a whole number of at least 1, not 'big'"),
    "pictures in a list": (lambda: plot_grid([imgify(PICTURE)]), "must be a dict of pictures, .*, not a list"),
    "pictures in a tensor": (lambda: plot_grid(PICTURES), "must be a dict of pictures, .*, not a Tensor"),
    "channels last": (
        lambda: CondAttribution(NET)(PICTURES.movedim(1, -1), [{"y": 0}]),
        r"takes 1 channels and gets .*\(2, 6, 6, 1\).*; its channels seem to be on the last axis: give data.movedim",
    ),
    "an array": (
        lambda: CondAttribution(NET)(PICTURES.numpy(), [{"y": 0}]),
        r"not ndarray \(torch.from_numpy makes a tensor of it\); samples of several shapes",
    ),
    "a picture": (
        lambda: crp.explain("gradient", NET, imgify(PICTURE[0]), 0),
        r"not Image \(prepare pictures as in training, such as by torchvision's transforms\)",
    ),
    "pictures in a list of them": (
        lambda: CondAttribution(NET)([imgify(PICTURE[0])], [{"y": 0}]),
        r"data\[0\] is Image \(prepare pictures as in training",
    ),
    "8 bits": (
        lambda: CondAttribution(NET)((255 * PICTURES).to(torch.uint8), [{"y": 0}]),
        r"not torch.uint8 \(prepare pictures as in training",
    ),
    "a model that has not run": (
        lambda: crp.explain("ig", nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), PICTURES, 0),
        r"'1.weight', '1.bias': no call has given these a shape; call the model once, model\(data\), first",
    ),
    "a name in place of a model": (
        lambda: EpsilonPlus().context("net").__enter__(),  # type: ignore[arg-type]
        "model must be a torch.nn.Module, not str",
    ),
    "edges of a graph": (
        lambda: CondAttribution(NET)((PICTURES, torch.ones(3, 9)), [{"y": 0}]),
        "are for .2, 3. samples; .* edges of a graph, belongs to a module around the model, whose forward adds it$",
    ),
    "data before the model": (lambda: EpsilonPlus().report(PICTURES, NET), "not Tensor; a sample comes after it"),
}


@pytest.mark.promise("Input", "Mistakes of the first hour are told in words, with what would be right")
@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_in_words(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(CRPError, match=message):
        call()


META = PICTURES.to("meta")
CONCEPT = ChannelConcept()
#: Things of another kind, which had raised errors of Python, numpy or torch.
OF_ANOTHER_KIND: dict[str, tuple[Callable[..., Any], str]] = {
    "no path of a cache": (lambda: ImageCache(None), "path must be a path, such as 'results', not None"),
    "no folder": (lambda: load_maximization(None, "1"), "path_folder must be a path, .*, not None"),
    "no table": (lambda: Table.discard(3), "a table is given as .*; not 3"),
    "no layer of a file": (lambda: load_receptive_field("x", None), "layer_name must be the name of a layer, not None"),
    "no folder of results": (lambda: Maximization(path=3), "path must be a path, .*, not an int"),
    "no references": (lambda: embed_references(None, "1", [0], len), "fv must be a FeatureVisualization, not None"),
    "no attribution": (
        lambda: audit(None, PICTURES, None, None, CONCEPT),
        r"must be CondAttribution\(model\), not None",
    ),
    "no concept": (lambda: part_of(None, PICTURES, [0]), "concept must be a concept, .*, not None"),
    "a class as concept": (lambda: mask_of(ChannelConcept), r"must be an instance: ChannelConcept\(\)"),
    "no method of a concept": (lambda: mask_of(CONCEPT, "x"), "method must be one of 'mask', 'mask_rf', not 'x'"),
    "no result": (lambda: relevance_in(CONCEPT, None, "1"), "result must be what an attribution gives, not None"),
    "no layer": (lambda: relevance_in(CONCEPT, RESULT, ["1"]), r"layer \['1'\] was not recorded"),
    "no scores": (lambda: CONCEPT.scores([1.0]), "what layer None gives must be a tensor, not a list"),
    "no clusters": (lambda: save_clusters("x", None, "1", 0), r"found must be what clusters\(.*\) gives, not None"),
    "no activation": (lambda: part_of(CONCEPT, None, [0]), "activation must be a tensor, not None"),
    "no audit": (lambda: save_audit("x", None, []), r"found must be what prototypes\(.*\) gives, not None"),
    "no list of layers": (lambda: trace_model_graph(NET, PICTURES, None), "layer_names must be a list of layers"),
    "no names of layers": (lambda: trace_model_graph(NET, PICTURES, [3]), "a layer must be named as in .*, not an int"),
    "no shape of boxes": (lambda: inside_boxes(torch.ones(1, 4), 3), "shape must be a height and a width, not an int"),
    "no map": (
        lambda: EpsilonPlus(layer_map=None),
        r"layer_map is a list of pairs \(what, rule\), .*; None is no pair",
    ),
    "an array of gates": (lambda: EpsilonPlus(gates=np.array(["split"])), "gates are held constant"),
    "no model": (lambda: for_model("net"), "model must be a torch.nn.Module, not a str"),
    "no detector": (lambda: with_logits(None), "detector must be a detector of torchvision, not None"),
    "no heatmap": (lambda: max_norm(None), "rel must be a tensor, not None"),
    "no threshold": (lambda: get_crop_range(PICTURE[0], None), "crop_th must be a finite number, not None"),
    "no colours": (lambda: draw_contour(PICTURE, PICTURE[0], []), "colours must be a list of .red, green, blue., not"),
    "a size": (lambda: draw_heatmap(PICTURE[0], 6), r"size must be \(height, width\), not an int"),
    "no axes": (lambda: plot_form(PICTURE, PICTURE[0], ax="ax"), "ax must be matplotlib Axes, or None, not a str"),
    "no words": (lambda: TextHeatmap(None), "words must be the words of a text, not None"),
    "a heatmap of a text": (lambda: text_html("a"), "text must be a TextHeatmap, not a str"),
    "a bound": (lambda: overlay(PICTURE, PICTURE[0], vmin=True), "vmin must be a finite number, not True"),
    "an image on meta": (lambda: imgify(META[0]), "the image is on the meta device, where tensors have no values"),
    "heatmaps on meta": (lambda: sparseness(META), "heatmaps is on the meta device"),
    "a target on meta": (lambda: crp.explain("gradient", NET, PICTURES, META[:, 0, 0, :2]), "is on the meta device"),
    "a start on meta": (
        lambda: CondAttribution(NET)(PICTURES, [{"y": 0}], init_rel=META[:, 0, 0, :2]),
        "init_rel is on the meta device",
    ),
    "a reference on meta": (
        lambda: CondAttribution(NET)(PICTURES, [{"y": 0}], DeepLift(reference=META)),
        "the reference is on the meta device",
    ),
    "ids on meta": (lambda: part_of(CONCEPT, PICTURES, META[0].long()), "concept ids is on the meta device"),
    "numbers on meta": (lambda: redundancy(META), "is on the meta device"),
    "a target of words": (
        lambda: crp.explain("gradient", NET, PICTURES, np.array(["a"])),
        "target must be a class, a list",
    ),
    "no decoder": (lambda: maximize(NET, logit(0), (1, 1, 6, 6), decoder="x"), "decoder must be a function of codes"),
}


@pytest.mark.parametrize(("call", "message"), OF_ANOTHER_KIND.values(), ids=OF_ANOTHER_KIND)
def test_what_is_of_another_kind_is_told_in_words(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(CRPError, match=message):
        call()


def test_a_table_and_pictures_are_asked_in_words(tmp_path: Path) -> None:
    fv = FeatureVisualization(CondAttribution(NET), [(x, 0) for x in PICTURES], ["1"], path=tmp_path / "fv")
    fv.run(EpsilonPlus(), progress=False)
    fv.Cache, table = ImageCache(tmp_path / "cache"), Table.open(fv.path)
    calls = {
        r"layer_c_ind must be a dict of concept ids by layer, .*, not None": lambda: fv.precompute_ref(
            None, EpsilonPlus()
        ),
        "composite must be None, or a composite": lambda: fv.get_max_reference([0], "1", composite=[]),
        "recipe must be a dict, not a str": lambda: fv.run(EpsilonPlus(), recipe="x"),
        "fingerprints must be a dict, not a str": lambda: mine(
            fv.attribution, PICTURES, fv.layer_map, None, tmp_path / "other", fingerprints="x"
        ),
        "batch_size must be a whole number": lambda: fv.run(EpsilonPlus(), batch_size=None),
        "stop must be a whole number": lambda: table.coverage(0, "all"),
        "samples must be numbers of samples, not an int": lambda: next(table.blocks("1", samples=3)),
        "the table in .*": lambda: table.n_concepts(np.array(["1", "2"])),
    }
    for message, call in calls.items():
        with pytest.raises(CRPError, match=message):
            call()


def test_clusters_are_written_to_a_path() -> None:
    pytest.importorskip("h5py")
    nothing = np.zeros(0)
    with pytest.raises(CRPError, match=r"path must be a path, .*, not None"):
        export_corelay(None, Clusters(nothing, nothing, nothing, nothing, 0.0, nothing, 0))  # type: ignore[arg-type]


NETS_IN_PLACE: dict[str, Callable[[], Any]] = {
    "mining": lambda: mine(NET, PICTURES, {"1": ChannelConcept()}, EpsilonPlus(), "index"),  # type: ignore[arg-type]
    "collecting": lambda: collect(NET, PICTURES, EpsilonPlus(), "1"),  # type: ignore[arg-type]
    "intervening": lambda: intervene(NET, PICTURES, "1", ChannelConcept(), [0], [0, 1]),  # type: ignore[arg-type]
    "a graph": lambda: AttributionGraph(NET, trace_model_graph(NET, PICTURES, ["1"]), {}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", NETS_IN_PLACE.values(), ids=NETS_IN_PLACE)
def test_a_model_in_place_of_an_attribution(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"attribution must be CondAttribution\(model\), not a Sequential"):
        call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preprocess_fn": "normalize"}, "preprocess_fn must be a function of samples, or None; not 'normalize'"),
        ({"layer_map": {("1", ChannelConcept())}}, "give a dict, such as {'features.40': ChannelConcept"),
        ({"path": "file"}, "file cannot be a folder, since it is, or is in, a file; give another path"),
        ({"path": "file/index"}, "index cannot be a folder, since it is, or is in, a file"),
        ({"attribution": NET}, r"attribution must be CondAttribution\(model\), not a Sequential"),
        ({"cache": "pictures"}, r"cache must be a Cache, such as ImageCache\(path\), or None; not 'pictures'"),
        ({"layer_map": {"1": Forgetful()}}, r"Forgetful.mask returns .* of \(1, 3, 4, 4\); it returns None"),
    ],
    ids=[
        "preprocess_fn",
        "a set of pairs",
        "a file",
        "in a file",
        "a model",
        "a folder as cache",
        "a mask that returns nothing",
    ],
)
def test_mistakes_of_mining(settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("", encoding="utf-8")
    usual = {"attribution": CondAttribution(NET), "layer_map": {"1": ChannelConcept()}, "path": tmp_path / "index"}
    dataset = [(picture, 0) for picture in PICTURES]
    with pytest.raises(CRPError, match=message):
        FeatureVisualization(dataset=dataset, **{**usual, **settings}).run(EpsilonPlus(), 0, 2, progress=False)


def test_a_file_is_no_folder_of_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(CRPError, match="cannot be a folder, since it is, or is in, a file"):
            ImageCache(path)


def test_layers_of_one_type() -> None:
    assert get_layer_names(NET, nn.Linear) == get_layer_names(NET, [nn.Linear]) == ["3"]
