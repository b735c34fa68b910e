"""Maximized pictures: made as `maximize` does, kept beside the table, and shown on the pages of their concepts."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from command_cases import crp, mine_pictures
from feature_net import Images, make_fv
from PIL import Image
from report_cases import Parsed, report
from torch import nn
from zennit.composites import EpsilonPlus

from crp.composites import GuidedBackprop
from crp.errors import InputError
from crp.visualization import FeatureVisualization, keep_maximized
from crp.visualization import maximized as maximizing
from crp.visualization.prepared import Normalized
from crp.visualization.table.derived import list_kept, read_kept
from crp.visualization.table.store import Table, TableMismatchError

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
            assert f"in {HOW['steps']} steps with seed 0;" in Parsed(page).text
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


@pytest.mark.filterwarnings("ignore:the table in .* covers 6 of 12 samples")
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


def test_another_model_than_that_of_the_table_is_refused(tmp_path):
    fv = made(tmp_path)
    with torch.no_grad():
        fv.attribution.model.second.weight.add_(1)
    with pytest.raises(TableMismatchError, match="another model"):
        keep_maximized(fv, "second", [1], **HOW)


# --- what is missing ------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Numbers of the pictures that are made in each batch."""
    batches, maximize = [], maximizing.maximize

    def count(model, objective, shape, **settings):
        batches.append(shape[0])
        return maximize(model, objective, shape, **settings)

    monkeypatch.setattr(maximizing, "maximize", count)
    return batches


def test_only_what_is_missing_is_made(tmp_path, counted):
    fv = made(tmp_path)
    keep_maximized(fv, "second", [0, 1, 2, 3], **HOW)
    whole = read_kept(Table.open(fv.path), "pictures", "second").arrays
    keep_maximized(fv, "second", [3], **HOW)
    assert read_kept(Table.open(fv.path), "pictures", "second").arrays["concept"].tolist() == [3]
    keep_maximized(fv, "second", [1, 3, 0, 2], add=True, batch_size=2, **HOW)
    keep_maximized(fv, "second", [2, 2, 1], add=True, **HOW)
    assert counted == [4, 1, 2, 1]
    found = read_kept(Table.open(fv.path), "pictures", "second").arrays
    order = found["concept"].tolist()
    assert order == [3, 1, 0, 2]
    assert np.abs(found["picture"].astype(int) - whole["picture"][order].astype(int)).max() <= 1
    np.testing.assert_allclose(found["score"], whole["score"][order], rtol=1e-6)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"steps": 31}, {"l2": 0.5}, {"composite": GuidedBackprop()}],
    ids=["seed", "steps", "penalty", "composite"],
)
def test_pictures_that_were_made_in_another_way_are_replaced(tmp_path, counted, other):
    fv = made(tmp_path)
    keep_maximized(fv, "second", [0, 1], **HOW)
    with pytest.warns(UserWarning, match=r"layer 'second' were made in another way \(seed=0, steps=30\)"):
        keep_maximized(fv, "second", [1], add=True, **HOW | other)
    assert counted == [2, 1]
    assert read_kept(Table.open(fv.path), "pictures", "second").arrays["concept"].tolist() == [1]


def test_an_interrupted_call_goes_on(tmp_path, counted, monkeypatch):
    fv, shown = made(tmp_path), maximizing._shown
    with monkeypatch.context() as context:

        def interrupt(image, ends):
            if len(counted) == 2:
                raise KeyboardInterrupt
            return shown(image, ends)

        context.setattr(maximizing, "_shown", interrupt)
        with pytest.raises(KeyboardInterrupt):
            keep_maximized(fv, "second", [0, 1, 2], add=True, batch_size=1, **HOW)
    keep_maximized(fv, "second", [0, 1, 2], add=True, batch_size=1, **HOW)
    assert counted == [1, 1, 1, 1]
    assert read_kept(Table.open(fv.path), "pictures", "second").arrays["concept"].tolist() == [0, 1, 2]


# --- by the report --------------------------------------------------------------------------------------------------


def strongest(fv, layer, n):
    """Concepts of the largest mean share, counted here: of relevance by its absolute sum over the layer."""
    block = [*Table.open(fv.path).blocks(layer, "relevance", "sum", normed=True)]
    return np.argsort(-np.concatenate([one.value for one in block]).mean(0), kind="stable")[:n].tolist()


def test_a_report_makes_pictures_of_the_strongest_concepts(tmp_path, counted):
    fv = made(tmp_path)
    folder = report(fv, tmp_path / "out", n_maximized=2, steps=5)
    for layer, n in (("first", 4), ("second", 5)):
        wanted = strongest(fv, layer, 2)
        assert read_kept(Table.open(fv.path), "pictures", layer).arrays["concept"].tolist() == wanted
        shown = [bool(shown_of(folder / f"concept/{layer}/{concept}.html")) for concept in range(n)]
        assert [i for i in range(n) if shown[i]] == sorted(wanted)
    report(fv, folder, n_maximized=2, steps=5)
    assert counted == [2, 2]
    report(fv, folder, n_maximized=3, steps=5)
    assert counted == [2, 2, 1, 1]


def test_parts_of_a_report_share_the_layers(tmp_path, counted):
    fv = made(tmp_path)
    report(fv, tmp_path / "out", n_maximized=1, steps=5, part=(1, 2))
    assert [one.layer for one in list_kept(Table.open(fv.path))] == ["second"]
    report(fv, tmp_path / "out", n_maximized=1, steps=5)
    assert [one.layer for one in list_kept(Table.open(fv.path))] == ["first", "second"] and counted == [1, 1]


def scaled(data):
    return (data - 0.5) / 0.25


@pytest.mark.parametrize("prepare", [scaled, Normalized([0.5], [0.25])], ids=["function", "normalized"])
def test_a_scale_and_a_shift_are_undone(tmp_path, prepare):
    fv = made(tmp_path, preprocess_fn=prepare)
    black, white = maximizing._ends_of_range(fv)
    assert bool((black == -2).all()) and bool((white == 2).all())
    report(fv, tmp_path / "out", n_maximized=1, steps=5)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda data: data.square(),
        lambda data: data / data.abs().amax((1, 2, 3), keepdim=True),
        lambda data: data.flip(-1),
        lambda data: -data,
    ],
    ids=["square", "by the largest", "mirrored", "negative"],
)
def test_a_preparation_that_cannot_be_undone_is_refused(tmp_path, prepare, counted):
    fv = made(tmp_path, preprocess_fn=prepare)
    with pytest.raises(InputError, match=r"n_maximized \(--maximize\): what .* cannot be undone"):
        report(fv, tmp_path / "out", n_maximized=1)
    assert counted == []
    keep_maximized(fv, "second", [1], **HOW)  # (by their range)


def test_a_preparation_of_ones_own_class_counts(tmp_path):
    class Squared(FeatureVisualization):
        def preprocess_data(self, data):
            return data.square()

    with pytest.raises(InputError, match="cannot be undone"):
        report(made(tmp_path, cls=Squared), tmp_path / "out", n_maximized=1)


# --- by the command -------------------------------------------------------------------------------------------------


def test_the_command_makes_pictures_and_keeps_them(tmp_path, monkeypatch, counted):
    table = mine_pictures(tmp_path, monkeypatch)
    options = ["--maximize", 2, "--steps", 4, "--references", 1]
    result = crp("report", table, *options)
    assert result.exit_code == 0, result.output
    assert "Pictures 1 to 2 of 2, 0" in result.stderr
    (kept,) = list_kept(Table.open(table))
    assert kept.settings["seed"] == 0 and kept.settings["steps"] == 4 and len(kept.arrays["concept"]) == 2
    shown = [c for c in range(4) if shown_of(table / "atlas" / "concept" / "0" / f"{c}.html")]
    assert shown == sorted(kept.arrays["concept"].tolist())
    assert "pictures of layer '0'" in crp("status", table).output
    quiet = crp("report", table, "--quiet", *options)
    assert (quiet.exit_code, quiet.output) == (0, f"wrote {table / 'atlas' / 'index.html'}\n") and counted == [2]
    with pytest.warns(UserWarning, match="another way"):
        assert crp("report", table, "--quiet", *options, "--seed", 3).exit_code == 0
    assert counted == [2, 2]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--steps", 3], 1, "--steps say how --maximize makes up pictures; give it, too"),
        (["--steps", 3, "--seed", 1], 1, "--steps and --seed say how --maximize makes up pictures"),
        (["--maximize", 0], 2, "0 is not in the range x>=1"),
        (["--maximize", "all"], 2, "'all' is not a valid integer range"),
        (["--maximize", 1, "--seed", -1], 2, "-1 is not in the range"),
        (["--maximize", 1, "--steps", 0], 2, "0 is not in the range"),
    ],
)
def test_options_that_say_nothing_are_refused(tmp_path, monkeypatch, options, code, message):
    table = mine_pictures(tmp_path, monkeypatch)
    result = crp("report", table, *options)
    assert result.exit_code == code and message in " ".join(result.output.split()), result.output
    assert not (table / "atlas").exists()
