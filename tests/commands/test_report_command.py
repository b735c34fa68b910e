"""``crp report`` and `FeatureVisualization.open`: a table that says what it was mined of needs nothing else."""

from __future__ import annotations

import errno
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from command_cases import crp, mine_pictures
from mining_cases import Data, make_net, run
from PIL import Image

from crp.composites import EpsilonPlus
from crp.concepts import AxisConcept, ChannelConcept, DirectionConcept, SubspaceConcept
from crp.errors import LoadingError
from crp.visualization import FeatureVisualization, Table
from crp.visualization.report import picture_rows
from crp.visualization.table.lock import locked


@pytest.fixture
def mined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Table of a folder of pictures, mined by the command."""
    return mine_pictures(tmp_path, monkeypatch)


def test_a_report_needs_nothing_but_the_folder(mined: Path) -> None:
    result = crp("report", mined, "--quiet", "--references", "2")
    assert (result.exit_code, result.output) == (0, f"wrote {mined / 'atlas' / 'index.html'}\n")
    page = (mined / "atlas" / "concept" / "0" / "1.html").read_text()
    assert "cats" in page and "dogs" in page and page.count("cats/") + page.count("dogs/") > 3, "files have names"
    assert Table.open(mined).verify() == []


def test_a_report_may_be_one_file_and_elsewhere(mined: Path) -> None:
    assert crp("report", mined, "--quiet", "--single-file", "--references", "1").exit_code == 0
    assert "cats" in (mined / "atlas.html").read_text()
    for out in ("page.html", "pages"):
        assert crp("report", mined, "--quiet", "--references", "1", "--out", mined.parent / out).exit_code == 0
    result = crp("report", mined, "--single-file", "--out", mined.parent / "other")
    assert result.exit_code == 1 and "must end in .html with --single-file" in result.output


def test_a_table_that_cannot_be_written_is_reported_elsewhere(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("crp.commands.attribute.TemporaryFile", refuse)
    result = crp("report", mined, "--quiet")
    assert result.exit_code == 1
    assert result.output == f"Error: --out {mined / 'atlas'} cannot be written: Permission denied\n"


def test_an_interrupted_report_says_how_to_go_on(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("crp.visualization.report.write._draw", interrupt)
        result = crp("report", mined, "--quiet")
        alone = crp("report", mined, "--quiet", "--single-file")
    assert result.exit_code == 130 and "the same command goes on from there" in result.output
    assert alone.exit_code == 130 and "atlas.html is written as a whole, and not yet" in alone.output
    assert not (mined / "atlas.html").exists()
    assert crp("report", mined, "--quiet", "--active", "0").exit_code == 0


def pages(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def rows_drawn() -> Iterator[list[Any]]:
    """Rows of pictures that this process draws."""
    drawn: list[Any] = []
    draw = picture_rows.PictureRows.draw
    with pytest.MonkeyPatch.context() as context:
        context.setattr(
            picture_rows.PictureRows, "draw", lambda self, places: drawn.extend(places) or draw(self, places)
        )
        yield drawn


def test_processes_draw_at_the_same_time(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert crp("report", mined, "--quiet", "--references", "2").exit_code == 0
    whole = pages(mined / "atlas")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with rows_drawn() as drawn:
        out = ["--out", mined / "two"]
        result = crp("report", mined, "--quiet", "--references", "2", "--workers", "2", *out)
    assert (result.exit_code, result.stdout) == (0, f"wrote {mined / 'two' / 'index.html'}\n"), result.output
    together = pages(mined / "two")
    assert set(together) == set(whole)
    for name in together:  # (other batches round otherwise)
        if name.endswith(".png"):
            one, other = (np.asarray(Image.open(io.BytesIO(some[name])), int) for some in (together, whole))
            assert np.abs(one - other).max() <= 1, name
    with rows_drawn() as needed:
        assert crp("report", mined, "--quiet", "--references", "2", "--out", mined / "again").exit_code == 0
    assert 0 < len(drawn) < len(needed), "the other process has drawn its part"


def test_machines_draw_parts_of_a_report(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", opened.append)
    for i in range(3):
        result = crp("report", mined, "--quiet", "--references", "2", "--part", f"{i}/3")
        assert (result.exit_code, result.output) == (0, f"drew part {i}/3 into {mined / 'atlas'}\n")
        assert not (mined / "atlas" / "index.html").exists()
    with rows_drawn() as drawn:
        assert crp("report", mined, "--quiet", "--references", "2", "--open").exit_code == 0
    assert drawn == [] and opened == [(mined / "atlas" / "index.html").as_uri()]
    for options, message in (
        (["--part", "3/3"], "--part 3/3 must be I/N with I from 0 to N - 1"),
        (["--workers", "2", "--single-file"], "--workers and --part draw into a folder"),
        (["--workers", "2", "--out", "a.html"], "and a.html is one file, for small tables"),
        (["--workers", "2", "--part", "0/3"], "is drawn by one process, not --workers"),
    ):
        result = crp("report", mined, *options)
        assert result.exit_code == 1 and message in result.output


@pytest.mark.filterwarnings("ignore:the table in .* covers 4 of 8 samples")
def test_a_table_that_is_being_mined_is_shown_as_far_as_it_is(mined: Path) -> None:
    options = ["--model", "nets:net", "--data", "pictures", "--layers", "0", "--composite", "epsilon_plus", "--quiet"]
    options += ["--out", "growing", "--shard-size", "2", "--batch-size", "2"]
    assert crp("mine", *options, "--stop", "4").exit_code == 0
    growing = mined.parent / "growing"
    with locked(growing, "run"):  # (as by a process that goes on mining)
        assert crp("report", growing, "--quiet").exit_code == 0
    assert "4 of 8 samples were not mined yet: 4 to 7." in (growing / "atlas" / "index.html").read_text()
    assert crp("mine", "--out", "growing", "--quiet").exit_code == 0
    assert crp("report", growing, "--quiet").exit_code == 0
    assert "not mined yet" not in (growing / "atlas" / "index.html").read_text()


def test_opening_needs_nothing_but_the_folder(mined: Path) -> None:
    fv = FeatureVisualization.open(mined, max_target="max")
    assert list(fv.layer_map) == ["0"] and fv.RelMax.max_target == "max"
    samples, heatmaps = fv.get_max_reference(1, "0", "relevance", (0, 3), EpsilonPlus(), plot_fn=None)[1]
    assert samples.shape == (3, 3, 8, 8) and heatmaps.shape == (3, 8, 8)
    data, label = fv.get_data_sample(5, preprocessing=True)
    torch.testing.assert_close(data, (fv.dataset[5][0][None] - 0.5) / 0.25)
    assert label == 1
    assert fv.compute_stats(1, "0")[0].tolist() in ([0, 1], [1, 0])


def test_a_table_of_python_code_needs_its_objects(tmp_path: Path) -> None:
    run(tmp_path, Data(), composite=None)
    with pytest.raises(LoadingError, match=r"was not mined by crp mine, .*; give them"):
        FeatureVisualization.open(tmp_path)
    fv = FeatureVisualization.open(tmp_path, model=make_net(), dataset=Data())
    assert fv.compute_stats(0, "fc")[0].shape == (3,)
    with pytest.raises(ValueError, match="model, dataset, preprocess_fn and output are given together"):
        FeatureVisualization.open(tmp_path, model=make_net())
    result = crp("report", tmp_path)
    assert result.exit_code == 1 and result.output.startswith("Error: the table was not mined by crp mine")


def test_what_is_gone_is_named(mined: Path) -> None:
    for file in (mined.parent / "pictures" / "cats").iterdir():
        file.unlink()
    assert crp("report", mined, "--quiet").exit_code == 1
    (mined.parent / "pictures").rename(mined.parent / "moved")
    result = crp("report", mined, "--quiet")
    place = mined.parent / "pictures"
    assert result.exit_code == 1 and result.output.startswith(f"Error: {place} is gone, the --data of the table; if it")
    assert crp("report", mined.parent).output == (
        f"Error: nothing was mined into {mined.parent}: it has no manifest.json\n"
    )


def test_data_that_were_moved_are_found_where_mining_was_told(mined: Path) -> None:
    Path("pictures").rename("moved")
    assert crp("report", mined, "--quiet").exit_code == 1
    shutil.copytree("moved", "other")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("other/cats/0.png")
    result = crp("mine", "--out", mined, "--data", "other", "--quiet")
    assert result.exit_code == 1 and "with another dataset: sample 0 ('cats/0.png') is" in result.output
    before = Table.open(mined)
    assert crp("mine", "--out", mined, "--data", "moved", "--quiet").exit_code == 0
    after = Table.open(mined)
    assert after.header.recipe["dataset"]["named"] == str(Path("moved").resolve())
    assert (after.digest, after.shards) == (before.digest, before.shards)
    assert crp("report", mined, "--quiet", "--references", "1").exit_code == 0


@pytest.mark.parametrize(
    "concept",
    [
        ChannelConcept(),
        AxisConcept(-1),
        AxisConcept(1, groups=2),
        DirectionConcept(torch.eye(4)[:3] + 0.25, names=["a", "b", "c"]),
        DirectionConcept(np.eye(4), 2 * np.eye(4), rest=False),
        SubspaceConcept([torch.eye(4)[:2], torch.eye(4)[3:]], rest=False),
    ],
    ids=["channels", "axis", "groups", "directions", "dual", "subspaces"],
)
def test_concepts_of_ours_are_made_again(tmp_path: Path, concept: Any) -> None:
    run(tmp_path, Data(), layer_map={"relu": concept})
    fv = FeatureVisualization.open(tmp_path, model=make_net(), dataset=Data())
    assert type(fv.layer_map["relu"]) is type(concept) and getattr(concept, "names", None) == getattr(
        fv.layer_map["relu"], "names", None
    )
    assert len(fv.get_max_reference(1, "relu", "relevance", (0, 2), EpsilonPlus(), plot_fn=None)[1][0]) == 2


def test_a_concept_of_the_users_own_is_asked_for(tmp_path: Path) -> None:
    class Own(ChannelConcept):
        def __init__(self) -> None:
            self.strength = 3

    run(tmp_path, Data(), layer_map={"relu": Own()})
    with pytest.raises(
        LoadingError, match=r"'relu' was mined with .*Own, a concept of your own with the settings .*3.*give"
    ):
        FeatureVisualization.open(tmp_path, model=make_net(), dataset=Data())
    fv = FeatureVisualization.open(tmp_path, model=make_net(), dataset=Data(), layer_map={"relu": Own()})
    assert len(fv.get_max_reference(1, "relu", "relevance", (0, 2), EpsilonPlus(), plot_fn=None)[1][0]) == 2
