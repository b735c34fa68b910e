"""Maximized pictures: made as `maximize` does, kept beside the table, and shown on the pages of their concepts."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv
from PIL import Image
from report_cases import Parsed, report
from torch import nn
from zennit.composites import EpsilonPlus

from crp.visualization import keep_maximized
from crp.visualization.prepared import Normalized
from crp.visualization.table.derived import read_kept
from crp.visualization.table.store import Table

HOW = {"steps": 30, "l2": 0.0, "learning_rate": 0.05}


def made(path, **keywords):
    fv = make_fv(path, **keywords)
    fv.run(EpsilonPlus(), 0, len(fv.dataset), progress=False)
    return fv


def shown_of(page):
    """Addresses of maximized pictures on a page."""
    return [a["src"] for tag, a in Parsed(page).elements if tag == "img" and "as active as can be" in (a["alt"] or "")]


def test_pictures_stand_on_the_pages_of_their_concepts(tmp_path):
    fv = made(tmp_path)
    keep_maximized(fv, "second", [3, 1], batch_size=1, **HOW)
    found = read_kept(Table.open(fv.path), "pictures", "second").arrays
    assert found["concept"].tolist() == [3, 1] and found["picture"].shape == (2, 6, 6, 3)
    folder = report(fv, tmp_path / "out")
    for concept in range(5):
        page = folder / f"concept/second/{concept}.html"
        addresses = shown_of(page)
        assert len(addresses) == (concept in (1, 3))
        for address in addresses:
            with Image.open(page.parent / address) as picture:
                stored = np.asarray(picture.convert("RGB"))
            assert np.array_equal(stored, found["picture"][[3, 1].index(concept)])
    assert shown_of(folder / "concept/first/1.html") == []
    assert report(fv, folder) == folder and len(shown_of(folder / "concept/second/1.html")) == 1


def test_they_are_more_active_than_any_sample_within_the_bounds(tmp_path):
    class Bright(Images):
        def __getitem__(self, index):
            data, label = super().__getitem__(index)
            return data.sigmoid(), label

    fv = made(tmp_path, dataset=Bright(), preprocess_fn=Normalized([0.5], [0.25]))
    keep_maximized(fv, "second", steps=200, l2=0.0)
    found = read_kept(Table.open(fv.path), "pictures", "second").arrays
    net = fv.attribution.model
    data = torch.stack([(fv.dataset[i][0] - 0.5) / 0.25 for i in range(12)])
    activation = net.second(net.pool(net.relu1(net.first(data)))).flatten(2).sum(2)
    assert (found["score"] > activation.max(0).values.detach().numpy()).all()
    pictures = torch.from_numpy(found["picture"][..., 0] / 255)[:, None].double()
    again = net.second(net.pool(net.relu1(net.first((pictures - 0.5) / 0.25)))).flatten(2).sum(2).diagonal()
    np.testing.assert_allclose(again.detach().numpy(), found["score"], rtol=0.05)


def test_a_picture_does_not_depend_on_its_batch(tmp_path):
    fv, found = made(tmp_path), []
    for ids, size in (([0, 1, 2], 3), ([0, 1, 2], 1), ([2], 1)):
        keep_maximized(fv, "second", ids, batch_size=size, **HOW)
        found.append(read_kept(Table.open(fv.path), "pictures", "second").arrays["picture"][-1].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1 and np.array_equal(found[1], found[2])


def test_each_begins_with_noise_of_its_own(tmp_path):
    fv = made(tmp_path)
    keep_maximized(fv, "second", [0, 1], **HOW | {"steps": 1, "learning_rate": 1e-9})
    first, second = read_kept(Table.open(fv.path), "pictures", "second").arrays["picture"][..., 0].astype(float)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.6


class Colours:
    """Pictures of three colours."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(index)), index % 3


def test_colours_are_in_their_channels(tmp_path):
    """The concepts are how red, green and blue a picture is."""
    net = nn.Sequential(OrderedDict(colour=nn.Conv2d(3, 3, 1), flat=nn.Flatten(), out=nn.Linear(108, 3)))
    with torch.no_grad():
        net.colour.weight.copy_(2 * torch.eye(3)[..., None, None] - 1)
    fv = made(tmp_path, net=net.double().eval(), layers=["colour"], dataset=Colours())
    keep_maximized(fv, "colour", **HOW)
    pictures = read_kept(Table.open(fv.path), "pictures", "colour").arrays["picture"]
    assert pictures.mean((1, 2)).argmax(1).tolist() == [0, 1, 2]


def test_after_the_table_has_changed_they_are_not_shown(tmp_path):
    fv = make_fv(tmp_path)
    fv.run(EpsilonPlus(), 0, 6, progress=False)
    keep_maximized(fv, "second", [1], **HOW)
    fv.run(EpsilonPlus(), 6, 12, progress=False)
    folder = report(fv, tmp_path / "out")
    assert shown_of(folder / "concept/second/1.html") == []
    assert "The pictures of layer 'second' were made before the table changed" in Parsed(folder / "index.html").text


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [([], ValueError, "concept_ids is empty"), ([5], IndexError, "no concept 5|5")],
    ids=["none", "beyond"],
)
def test_what_is_wrong_is_said(tmp_path, ids, error, match):
    with pytest.raises(error, match=match):
        keep_maximized(made(tmp_path), "second", ids, **HOW)
