"""The atlas of an object detector: its pages, with prototypes and an audit of what it detects."""

from __future__ import annotations

import re

import pytest
import torch
from detectors import DETECTORS
from report_cases import Parsed

from crp.attribution import CondAttribution
from crp.audit import audit_table, prototypes, save_audit
from crp.composites import EpsilonPlus
from crp.outputs import detection, with_logits
from crp.visualization import FeatureVisualization, Table, write_report

LAYER = "backbone.4"


class Pictures:
    def __init__(self) -> None:
        self.data = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.data[index], 1 + index % 2


@pytest.mark.parametrize("name", ["fcos"])
def test_a_detector_has_an_atlas(tmp_path, name):
    torch.manual_seed(0)
    attribution = CondAttribution(with_logits(DETECTORS[name]().eval()), output=detection())
    fv = FeatureVisualization(attribution, Pictures(), [LAYER], path=tmp_path / "table")
    fv.run(EpsilonPlus(), 0, 8, batch_size=4, progress=False)
    table = Table.open(fv.path)
    found = prototypes(table, LAYER, (1,))
    found.save(table)
    save_audit(table, found, audit_table(table, found, k=2))
    names = {0: "background", 1: "cat", 2: "dog"}
    folder = write_report(
        fv, EpsilonPlus(), tmp_path / "atlas", n_references=2, class_names=names, verbose=False
    ).parent
    for page in folder.rglob("*.html"):
        for href in Parsed(page).all("href"):
            assert (page.parent / href.partition("#")[0]).exists(), (page, href)
    assert (folder / f"audit/{LAYER}.html").is_file() and (folder / f"prototypes/{LAYER}.html").is_file()
    first = Parsed(folder / "index.html").text
    for page in (folder / "sample").iterdir():
        text = Parsed(page).text
        assert "explained for" in text and "(" not in text.partition("explained for")[2].partition(".")[0]
        assert "Prediction" not in text and not re.search(r"[✓✗] \w+ \d+%", text), "boxes have no softmax over classes"
    assert "switched off" not in Parsed(folder / f"concept/{LAYER}/0.html").text
    assert "cat" in first and "dog" in first and "the 8 least usual of 8 samples" in first
