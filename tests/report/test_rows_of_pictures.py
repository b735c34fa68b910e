"""Heatmaps of a report are what each row gives alone, in whatever way rows share what is computed."""

from __future__ import annotations

import gc
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv
from PIL import Image
from text_cases import Bag, Letters, texts_of_ids
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, GradientTimesInput
from crp.concepts import AxisConcept, ChannelConcept, DirectionConcept, SubspaceConcept, mask_of
from crp.concepts.reading import LayerValues, relevance_sums
from crp.visualization import FeatureVisualization, Texts
from crp.visualization.references import OfConcept, heatmaps_of
from crp.visualization.report import picture_rows, unfinished
from crp.visualization.report.addresses import Addresses
from crp.visualization.report.drawing import Drawn, HeatmapFile, Row
from crp.visualization.report.maps import as_steps, square_map
from crp.visualization.report.options import ReportOptions
from crp.visualization.report.picture_drawing import PictureDrawer
from crp.visualization.report.picture_rows import PictureRows
from crp.visualization.report.text_drawing import TextDrawer
from crp.visualization.report.unfinished import Cell, Unfinished
from crp.visualization.text_references import TextRow, read_text, text_heatmaps

SAMPLES = range(2)


class Net(nn.Module):
    """Net with a layer that the output does not depend on, and a block that holds a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.aside = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3)
        self.block, self.out = Block(), nn.Linear(4, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x).relu()
        self.aside(first)
        return self.out(self.block(first).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.relu() + 0.1 * y.flip(1)


#: Two directions each, whose entries add up to less than 0, and what measures them, which is not their pseudo-inverse.
DIRECTIONS = torch.tensor([[1.0, -1.0, -0.5], [-2.0, 0.5, 0.25]]).double()
DUALS = torch.tensor([[0.5, -1.0, 1.0], [1.0, 1.0, -2.0]]).double()
LAYER_MAPS: dict[str, dict[str, Any]] = {
    "a layer aside": {"first": ChannelConcept(), "aside": ChannelConcept(), "block": ChannelConcept()},
    "a layer in a block": {"first": ChannelConcept(), "block": ChannelConcept(), "block.conv": ChannelConcept()},
    "directions": {"first": DirectionConcept(DIRECTIONS, DUALS), "block": ChannelConcept()},
    "subspaces": {"first": SubspaceConcept([DIRECTIONS[:1], DIRECTIONS[1:]]), "block.conv": ChannelConcept()},
}


def drawn(fv: Any, composite: Any, rows: list[Row], folder: Path) -> tuple[PictureDrawer, dict[int, Any]]:
    """Rows as a report draws them, by their places."""
    options = ReportOptions(map_size=6, batch_size=7, verbose=False)
    drawer = PictureDrawer(fv, composite, fv.in_call_order(list(fv.layer_map), 0), folder, "", options)
    parts = PictureRows(drawer, drawer.data).draw(rows)
    return drawer, {rows.index(row): found for some, part in parts for row, found in zip(some, part, strict=True)}


def alone(fv: Any, composite: Any, row: Row, below: str | None) -> tuple[Tensor, Tensor | None]:
    """Heatmap of one row, and shares of the concepts of the layer below."""
    data = fv.get_data_sample(row.sample)[0].detach()
    if row.layer is None:
        return fv.attribution(data, [{"y": [row.target]}], composite).heatmap[0], None
    concept = fv.layer_map[row.layer]
    if row.target < 0:
        chosen = OfConcept(concept, row.concept, row.layer)
        return heatmaps_of(fv.attribution, data, chosen, composite, None, None, 1, None)[0], None
    condition = {"y": [row.target], row.layer: [row.concept]}
    masks = {row.layer: mask_of(concept)}
    result = fv.attribution(data, [condition], composite, [below] if below else [], mask_map=masks)
    shares = below and relevance_sums(fv.layer_map[below], LayerValues.of(result, below), below)[0]
    return result.heatmap[0], shares


def predicted(fv: Any, row: Row) -> tuple[float | None, float | None, int | None, list[tuple[int, float]]]:
    """Probability of the target with a row's channel and without it, the predicted class, and the most probable ones.

    Where relevance starts in a layer, no class is explained, and none of it is known.
    """
    if row.target < 0:
        return None, None, None, []

    def probabilities() -> Tensor:
        with torch.no_grad():
            return fv.attribution.model(fv.get_data_sample(row.sample)[0]).softmax(1)[0]

    def switched_off(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor([row.concept]), 0)

    whole = probabilities()
    before, most = float(whole[row.target]), int(whole.argmax())
    if row.layer is None:
        order = whole.argsort(descending=True).tolist()
        return before, None, most, [(i, round(float(whole[i]), 4)) for i in order]
    handle = fv.attribution.model.get_submodule(row.layer).register_forward_hook(switched_off)
    try:
        return before, float(probabilities()[row.target]), most, []
    finally:
        handle.remove()


@pytest.mark.parametrize("composite", [EpsilonPlus(), GradientTimesInput()], ids=["epsilon_plus", "gradient"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("layer_map", LAYER_MAPS.values(), ids=LAYER_MAPS)
def test_each_row_is_what_it_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer_map: dict[str, Any], large: bool, composite: Any
) -> None:
    monkeypatch.setattr(picture_rows, "SMALL", 1 if large else 64)
    fv = make_fv(tmp_path, Images(4), net=Net(), layers=layer_map)
    rows = [Row(sample, sample % 3) for sample in SAMPLES]
    for layer in layer_map:
        for sample in SAMPLES:
            for concept in range(2):
                targets = (-1,) if layer == "aside" else (0, 2, -1)
                rows += [Row(sample, target, layer, concept) for target in targets]
    drawer, found = drawn(fv, composite, rows, tmp_path / "out")
    assert len(found) == len(rows)
    for place, row in enumerate(rows):
        below = drawer.below_of(row.layer)
        heatmap, shares = alone(fv, composite, row, below)
        expected = heatmap.detach().numpy()
        values, facts = found[place]
        np.testing.assert_allclose(values, expected / (np.abs(expected).sum() or 1), atol=1e-12, err_msg=str(row))
        assert isinstance(facts, Drawn)
        for concept, share in facts.below if shares is not None else ():
            assert share == pytest.approx(float(shares[concept]), abs=1e-4)
        before, after, most, top = predicted(fv, row)
        assert facts.before == pytest.approx(before) and facts.predicted == most and list(facts.top) == top, str(row)
        if row.layer is None or isinstance(fv.layer_map[row.layer], ChannelConcept):
            assert facts.after == pytest.approx(after), str(row)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_no_probability_is_told_of_classes_that_do_not_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(picture_rows, "SMALL", 1 if large else 64)
    fv = make_fv(tmp_path, Images(4), net=Net(), layers=LAYER_MAPS["a layer in a block"])
    monkeypatch.setattr(CondAttribution, "exclusive", False)
    rows = [Row(0, 1), *(Row(0, target, "first", concept) for target in (0, -1) for concept in range(3))]
    _, found = drawn(fv, EpsilonPlus(), rows, tmp_path / "out")
    assert [(facts.before, facts.after, facts.top) for _, facts in found.values()] == [(None, None, ())] * len(rows)


def by_its_largest(data: Tensor) -> Tensor:
    """Data divided by the largest value of all that is given, in place."""
    return data.div_(data.abs().max())


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_however_many_samples_are_drawn_no_more_tensors_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(picture_rows, "SMALL", 1 if large else 64)
    fv = make_fv(tmp_path, Images(40), net=Net(), layers=LAYER_MAPS["a layer in a block"])
    drawer = PictureDrawer(
        fv, EpsilonPlus(), fv.in_call_order(list(fv.layer_map), 0), tmp_path, "", ReportOptions(batch_size=4)
    )
    rows = [Row(i, target, layer, c) for i in range(40) for target in (0, -1) for layer in fv.layer_map for c in (0, 1)]
    data = [drawer.data(sample) for sample in range(40)]
    held = []
    for _ in PictureRows(drawer, data.__getitem__).draw(rows):
        gc.collect()
        held.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))  # (nobody is asked for its class)
    half = len(held) // 2
    assert half > 20 and max(held[half:]) <= max(held[:half])


def test_samples_are_prepared_one_by_one(tmp_path: Path) -> None:
    """As in mining: of a batch, each sample would be divided by the largest value of all."""
    fv = make_fv(tmp_path, Images(4), net=Net(), layers=LAYER_MAPS["a layer in a block"], preprocess_fn=by_its_largest)
    with pytest.warns(UserWarning, match="gives other numbers for a batch"):
        fv.run(EpsilonPlus(), 0, 4, batch_size=4, progress=False)
    rows = [Row(sample, 1, layer, 0) for sample in SAMPLES for layer in ("first", "block", None)]
    shown = fv.dataset.data.clone()
    drawer, found = drawn(fv, EpsilonPlus(), rows, tmp_path / "out")
    for place, row in enumerate(rows):
        expected = alone(fv, EpsilonPlus(), row, None)[0].detach().numpy()
        np.testing.assert_allclose(found[place][0], expected / np.abs(expected).sum(), atol=1e-12)
    samples, heatmaps = fv.get_max_reference(
        [0], "block", "activation", (0, 3), EpsilonPlus(), plot_fn=lambda *both: both[:2]
    )[0]
    for sample, heatmap in zip(samples, heatmaps, strict=True):
        data, chosen = by_its_largest(sample[None].clone()), OfConcept(ChannelConcept(), 0, "block")
        expected = heatmaps_of(fv.attribution, data, chosen, EpsilonPlus(), None, None, 1, None)[0]
        torch.testing.assert_close(heatmap, expected.detach())
    drawer.draw_mean(1, [1, 0, 3])
    assert torch.equal(fv.dataset.data, shown), "what is shown is not what is prepared"
    whole = [alone(fv, EpsilonPlus(), Row(sample, 1), None)[0].detach().numpy() for sample in (1, 0, 3)]
    mean = square_map(sum(one / np.abs(one).sum() for one in whole), 6)
    with Image.open(tmp_path / "out" / Addresses.label_maps(1)) as image:
        assert np.abs(np.asarray(image).astype(int) - as_steps(mean)).max() <= 1


def test_a_block_is_behind_the_layers_in_it(tmp_path: Path) -> None:
    """What a concept hands down goes to the layer that it is computed from."""
    layer_map = LAYER_MAPS["a layer in a block"]
    fv = make_fv(tmp_path, Images(4), net=Net(), layers=layer_map)
    rows = [Row(0, 1, "block.conv", concept) for concept in range(4)]
    drawer, found = drawn(fv, EpsilonPlus(), rows, tmp_path / "out")
    assert drawer.layers == ["first", "block.conv", "block"]
    assert drawer.below_of("block") == "block.conv" and drawer.below_of("block.conv") == "first"
    known = [facts.below for _, facts in found.values()]
    assert len(known) == 4 and known[0] != known[1], "each concept hands its own relevance down"


def test_texts_of_directions_show_how_active_they_are(tmp_path: Path) -> None:
    """Of a direction whose entries add up to less than 0, too."""
    concept = DirectionConcept(torch.tensor([[1.0, -2.0, 0.5, -1.0]]).double(), axis=-1)
    layers = {"embed": AxisConcept(-1), "features": concept}
    texts = Texts(texts_of_ids(4, "none"), Letters())
    fv = FeatureVisualization(CondAttribution(Bag()), texts, layers, path=tmp_path / "fv")
    fv.run(EpsilonPlus(), targets="prediction", progress=False)
    drawer = TextDrawer(fv, EpsilonPlus(), list(layers), tmp_path / "out", "", ReportOptions(verbose=False))
    rows = [Row(2, -1, "features", 0), Row(2, -1, "features", 1), Row(2, -1, "embed", 1), Row(2, 1, "features", 0)]
    assert sum(drawer.draw(drawer.files({"one": rows}, (0, 1)))) == len(rows)
    asked = read_text(fv.dataset, 2, fv.device)
    wanted = [TextRow((row.target,) if row.target >= 0 else (), row.layer, row.concept) for row in rows]
    expected = text_heatmaps(fv.attribution, asked, wanted, layers, EpsilonPlus()).numpy()
    content = json.loads((tmp_path / "out" / Addresses.text_maps(2)).read_text())
    found = {tuple(one[:4]): one[5] for one in content["rows"]}
    for row, heatmap in zip(rows, expected, strict=True):
        np.testing.assert_allclose(found[tuple(row)], heatmap, rtol=1e-6, atol=1e-9)


# --- heatmaps of files that are not complete -------------------------------------------------------------------------

JOBS = [HeatmapFile("maps/a.png", key, [Row(0, 0, "first", concept)] * 3, range(3)) for concept, key in enumerate("ab")]
CELL = Cell(np.full((6, 6), 7, np.uint8), Drawn((0, 0, 1), [], 0.5, None, 2))


def left_by_an_interruption(folder: Path) -> Path:
    """File that a report leaves that is interrupted after a heatmap."""
    with pytest.raises(KeyboardInterrupt), Unfinished(folder, JOBS, False) as unfinished:
        unfinished.add(1, 2, CELL)
        raise KeyboardInterrupt
    (file,) = folder.iterdir()
    return file


def with_about(about: Any) -> bytes:
    """Such a file that says something else about its heatmap."""
    buffer = io.BytesIO()
    np.savez(buffer, pixels=CELL.values[None], about=json.dumps(about))
    return buffer.getvalue()


def known(folder: Path) -> dict[tuple[int, int], Cell]:
    return Unfinished(folder, JOBS, False).read()


def test_a_damaged_file_is_as_none(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed, it is read as it was or not at all."""
    file = left_by_an_interruption(tmp_path)
    content = file.read_bytes()
    assert [*known(tmp_path)] == [(1, 2)]
    for end in range(0, len(content), 7):
        file.write_bytes(content[:end])
        assert known(tmp_path) == {}
    for at in range(0, len(content), 5):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        for place, cell in known(tmp_path).items():
            assert place == (1, 2) and (cell.values == CELL.values).all() and cell.facts.predicted == 2


FACTS = [[0, 0, 1], [], 0.5, None, 2]


@pytest.mark.parametrize(
    "about",
    [[["b", 2]], [["b", 2, FACTS[:4]]], [5], {"b": 2}, [["b", "2", FACTS]], [["b", 3, FACTS]], [["b", -1, FACTS]], None]
    + [[["c", 2, FACTS]], [["b", 2, FACTS]] * 2],
    ids=str,
)
def test_a_file_of_another_form_is_as_none(tmp_path: Path, about: Any) -> None:
    (tmp_path / "0.unfinished.npz").write_bytes(with_about(about))
    assert known(tmp_path) == {}
    (tmp_path / "0.unfinished.npz").write_bytes(with_about([["b", 2, FACTS]]))
    assert [*known(tmp_path)] == [(1, 2)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere.npz").write_bytes(with_about([["b", 2, FACTS]]))
    (tmp_path / "out/0.unfinished.npz").symlink_to(tmp_path / "elsewhere.npz")
    os.mkfifo(tmp_path / "out/1.unfinished.npz")
    assert known(tmp_path / "out") == {}


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_what_is_drawn_is_written_every_minute_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    seconds, folder = [0.0], tmp_path / "out" / "maps"  # (which is not there yet)
    monkeypatch.setattr(unfinished, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def sizes() -> list[int]:
        return sorted(len(np.load(file)["pixels"]) for file in folder.glob("*.unfinished.npz"))

    with Unfinished(folder, JOBS, shared) as kept:
        for second, place, expected in ((59, 0, []), (61, 1, [2]), (62, 2, [2]), (120, 0, [2]), (122, 1, [2, 3])):
            seconds[0] = second
            kept.add(int(second > 100), place, CELL)
            assert sizes() == expected
        kept.add(1, 2, CELL)
    assert sizes() == ([1, 2, 3] if shared else [])
    assert len(known(folder)) == (6 if shared else 0)
