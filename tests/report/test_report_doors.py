"""Reports and maximized pictures refuse what does not fit in our own words, before anything is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_net import make_fv
from zennit.composites import EpsilonPlus

from crp.attribution import CondAttribution
from crp.errors import CRPError
from crp.visualization import Table, keep_maximized, write_report
from crp.visualization.objectives import channel
from crp.visualization.report import Finding
from crp.visualization.synthesis import maximize


@pytest.fixture(scope="module")
def fv(tmp_path_factory):
    made = make_fv(tmp_path_factory.mktemp("mined"))
    made.run(EpsilonPlus(), 0, len(made.dataset), progress=False)
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_maximized": "a"}, "n_maximized must be a whole number of at least 0, not 'a'"),
        ({"n_maximized": 1.5}, "n_maximized must be a whole number of at least 0, not 1.5"),
        ({"n_maximized": True}, "n_maximized must be a whole number of at least 0, not True"),
        ({"steps": "a"}, "steps must be a whole number of at least 1, not 'a'"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, not 1.5"),
        ({"n_references": "a"}, "n_references must be a whole number of at least 1, not 'a'"),
        ({"n_active": "a"}, "n_active must be a whole number of at least 0, not 'a'"),
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, not 1.5"),
        ({"picture_size": None}, "picture_size must be a whole number of at least 1, not None"),
        ({"layers": "second"}, "layers must be a list, not 'second'"),
        ({"classes": 0}, "classes must be a list, not 0"),
        ({"classes": "0"}, "classes must be a list, not '0'"),
        ({"findings": ["x"]}, "findings must be of Finding, not 'x'"),
        ({"findings": "x"}, "findings must be a list, not 'x'"),
        ({"concept_names": {"a": "b"}}, r"concept_names must map \(layer, concept\) to a name"),
        ({"concept_names": {(0, "second"): "b"}}, r"concept_names must map \(layer, concept\) to a name"),
        ({"concept_names": {("absent", 0): "a"}}, "'absent'"),
        ({"concept_names": {("second", -1): "a"}}, "concept_names has .* -1.; layer 'second' has the concepts 0 to"),
        ({"findings": [Finding("A", concept=(0, "second", -1))]}, "a finding is about .* -1.; layer 'second' has the"),
        ({"findings": [Finding("A", concept=(0, "second", 99))]}, "a finding is about .* 99.; layer 'second' has the"),
        ({"concept_names": ["a"]}, r"concept_names must map \(layer, concept\) to a name"),
        ({"part": "a"}, r"part must be \(i, n\) with i from 0 to n - 1, not 'a'"),
        ({"part": (0,)}, r"part must be \(i, n\)"),
        ({"part": (0.0, 2)}, r"part must be \(i, n\)"),
        ({"part": (2, 2)}, r"part must be \(i, n\) with i from 0 to n - 1, not \(2, 2\)"),
        ({"part": (-1, 2)}, r"part must be \(i, n\)"),
        ({"part": (False, 2)}, r"part must be \(i, n\)"),
        ({"absent": 1}, "a report has no option 'absent'; there are class_names, concept_names"),
    ],
)
def test_options_of_a_report(fv, tmp_path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CRPError, match=message) as raised:
        fv.report(tmp_path / "out", EpsilonPlus(), verbose=False, **options)
    assert isinstance(raised.value, ValueError | TypeError | LookupError)


def test_what_a_dataset_calls_samples_need_not_be_files(fv, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fv.dataset, "samples", [(fv.dataset[0][0], 0)], raising=False)
    fv.report(tmp_path / "out", EpsilonPlus(), verbose=False, n_references=1)
    pages = list((tmp_path / "out" / "sample").glob("*.html"))
    assert pages and all(f"sample {page.name.partition('.')[0]}" in page.read_text() for page in pages)


class Opposite(CondAttribution):
    def heatmap_modifier(self, *arguments, **keywords):
        return -super().heatmap_modifier(*arguments, **keywords)


def test_heatmaps_of_another_attribution_are_drawn_again(fv, tmp_path, monkeypatch) -> None:
    def drawn() -> dict[str, bytes]:
        fv.report(tmp_path / "out", EpsilonPlus(), verbose=False, n_references=1)
        return {str(file): file.read_bytes() for file in (tmp_path / "out" / "maps" / "samples").iterdir()}

    usual = drawn()
    monkeypatch.setattr(fv, "attribution", Opposite(fv.attribution.model))
    own = drawn()
    assert own.keys() == usual.keys() and all(own[file] != usual[file] for file in usual)


def test_a_report_is_of_a_feature_visualization_in_a_folder(fv, tmp_path) -> None:
    for other, kind in ((None, "None"), ("fv", "a str"), (Table.open(fv.path), "a Table")):
        with pytest.raises(TypeError, match=f"fv must be a FeatureVisualization, not {kind}"):
            write_report(other, EpsilonPlus(), tmp_path / "out")
        with pytest.raises(TypeError, match=f"fv must be a FeatureVisualization, not {kind}"):
            keep_maximized(other, "second")
    for path in (None, 5):
        with pytest.raises(TypeError, match=r"path must be a folder or a file that ends in \.html, not"):
            fv.report(path, EpsilonPlus())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": "absent"}, "'absent' not found in layer_map; there are 'first', 'second'"),
        ({"layer": 2}, "2 not found in layer_map"),
        ({"layer": None}, "None not found in layer_map"),
        ({"concept_ids": 1.5}, "concept ids must be integers"),
        ({"concept_ids": [[0]]}, "concept ids must be integers"),
        ({"concept_ids": {0: 1}}, "concept ids must be integers"),
        ({"concept_ids": "a"}, "concept ids must be integers"),
        ({"seed": 2**70}, "seed must be a whole number of 64 bits"),
        ({"seed": None}, "seed must be a whole number of 64 bits"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"optimizer": "adam"}, "optimizer must be a function of a list of tensors, or None; not 'adam'"),
        ({"optimizer": lambda parameters: None}, "optimizer must give an optimizer of torch, not None"),
        ({"mean": "a"}, "mean must be a finite number, not 'a'"),
        ({"absent": 1}, "there is no setting 'absent'; there are l2, mean, tv"),
    ],
)
def test_settings_of_maximized_pictures(fv, changed: dict[str, Any], message: str) -> None:
    given = {"layer": "second", "steps": 2} | changed
    with pytest.raises((ValueError, TypeError, KeyError), match=message) as raised:
        keep_maximized(fv, **given)
    assert isinstance(raised.value, CRPError)
    assert not list((fv.path / "derived").glob("pictures-*"))


def test_a_layer_that_is_not_in_the_map_is_told_of(fv, tmp_path) -> None:
    one = type(fv)(fv.attribution, fv.dataset, ["second"], path=fv.path)
    with pytest.raises(KeyError, match="'first' not found in layer_map; there are 'second'"):
        keep_maximized(one, "first", steps=2)


@pytest.mark.parametrize("seed", ["a", 1.5, True, 2**64])
def test_seeds_of_synthesis(fv, seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number of 64 bits"):
        maximize(fv.attribution.model, channel("second", 1), (1, 1, 6, 6), seed=seed, steps=1, start=torch.ones(1))
