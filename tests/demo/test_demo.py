"""The demo: its data, its training, and that it finds the mark that was planted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.commands.cli import cli
from crp.composites import EpsilonPlus
from crp.demo import Box, DigitNet, Digits, DigitsData, Mark, accuracy, load_digits_data, predict, train, training
from crp.demo import run as demo_run
from crp.demo.folder import DemoError, DemoFolder
from crp.demo.run import Figures, run_demo
from crp.demo.shortcut import rank_by_box, switched_off
from crp.visualization.mining import run as engines


@pytest.fixture(scope="module")
def data() -> DigitsData:
    return load_digits_data(seed=0)


@pytest.fixture(scope="module")
def few(data: DigitsData) -> Digits:
    """130 training images."""
    return Digits(data.train.images[:130], data.train.labels[:130], data.train.marked[:130])


@pytest.fixture(scope="module")
def net(data: DigitsData) -> DigitNet:
    return train(data.train, verbose=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", epochs=3, verbose=False)


def weights(net: nn.Module) -> list[Tensor]:
    return list(net.state_dict().values())


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# ---- data


def test_images(data):
    assert (len(data.train), len(data.test)) == (899, 898)
    for half in (data.train, data.test):
        assert half.images.shape[1:] == (1, 32, 32)
        assert half.images.min() == 0
        assert half.images[~half.marked].max() == 1
        image, label = half[3]
        assert torch.equal(image, half.images[3])
        assert type(label) is int
        assert half.labels.unique().tolist() == list(range(10))


def test_halves_are_disjoint_and_make_the_whole():
    plain = load_digits_data(seed=5, mark=Mark(train_share=0, test_share=0))
    both = torch.cat([plain.train.images, plain.test.images]).flatten(1).sum(1).sort().values
    other = load_digits_data(seed=6, mark=Mark(train_share=0, test_share=0))
    again = torch.cat([other.train.images, other.test.images]).flatten(1).sum(1).sort().values
    assert torch.equal(both, again)
    assert not torch.equal(plain.train.images, other.train.images)
    assert not plain.train.marked.any()


def test_data_are_decided_by_the_seed(data):
    again, other = load_digits_data(seed=0), load_digits_data(seed=1)
    for half in ("train", "test"):
        for field in ("images", "labels", "marked"):
            assert torch.equal(getattr(getattr(data, half), field), getattr(getattr(again, half), field))
        assert not torch.equal(getattr(data, half).labels, getattr(other, half).labels)


@pytest.mark.parametrize("half", ["train", "test"])
def test_the_mark_is_on_a_share_of_one_digit_only(data, half):
    digits, mark = getattr(data, half), data.mark
    of_digit = digits.labels == mark.digit
    assert not (digits.marked & ~of_digit).any()
    share = mark.train_share if half == "train" else mark.test_share
    assert digits.marked.sum() == round(share * int(of_digit.sum()))
    pattern = mark.box.crop(mark.stamp(torch.zeros(1, 32, 32)))[0]
    there = (mark.box.crop(digits.images)[:, 0] == pattern).flatten(1).all(1)
    assert torch.equal(there, digits.marked)


def test_the_mark_changes_nothing_outside_of_its_box():
    mark = Mark(box=Box(2, 3, 5, 7))
    images = torch.full((2, 1, 8, 8), 0.5)
    stamped = mark.stamp(images)
    assert (images == 0.5).all()
    assert mark.box.crop(stamped)[0, 0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    mark.box.crop(stamped).fill_(0.5)
    assert torch.equal(stamped, images)


def test_share_of_a_heatmap_in_a_box():
    heatmap = torch.tensor([[[3.0, -1.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert Box(0, 0, 1, 2).share(heatmap).tolist() == [0.5, 0]


def test_missing_scikit_learn_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "concept-relevance\[demo\]"'):
        load_digits_data()
    with pytest.raises(DemoError, match=r"concept-relevance\[demo\]"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- training


def test_training_is_decided_by_the_seed(few):
    nets = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        nets.append(train(few, epochs=1, seed=seed, verbose=False))
    one, same, other = nets
    assert equal(one, same)
    assert not equal(one, other)
    assert not one.training


def test_training_leaves_the_global_generator_alone(few):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train(few, epochs=1, seed=9, verbose=False)
    assert torch.equal(torch.rand(3), expected)


def test_training_does_not_depend_on_the_number_of_threads(few):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = train(few, epochs=1, verbose=False)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        one = train(few, epochs=1, verbose=False)
    finally:
        torch.set_num_threads(before)
    assert equal(one, two)


def test_every_epoch_has_its_own_order_of_all_images():
    first, second = (torch.cat(list(training._batches(50, 8, 0, epoch))) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))


class StoppedError(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let training stop when an epoch more than ``after`` begins."""
    epochs: list[int] = []
    whole: Callable[..., float] = training._train_epoch

    def epoch(*arguments: Any) -> float:
        if len(epochs) == after:
            raise StoppedError
        epochs.append(1)
        return whole(*arguments)

    monkeypatch.setattr(training, "_train_epoch", epoch)


def test_interrupted_training_goes_on_to_the_same_weights(few, tmp_path, monkeypatch):
    uninterrupted = train(few, epochs=3, verbose=False)
    path = tmp_path / "new" / "net.safetensors"
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        with pytest.raises(StoppedError):
            train(few, epochs=3, checkpoint=path, verbose=False)
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        assert equal(train(few, epochs=3, checkpoint=path, verbose=False), uninterrupted)
    interrupt(monkeypatch, after=0)
    assert equal(train(few, epochs=3, checkpoint=path, verbose=False), uninterrupted)
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]


def test_checkpoint_of_other_settings(few, tmp_path):
    path = tmp_path / "net.safetensors"
    train(few, epochs=1, checkpoint=path, verbose=False)
    with pytest.raises(training.CheckpointError, match=r"was trained with \{'epochs': 1\}, not \{'epochs': 2\}"):
        train(few, epochs=2, checkpoint=path, verbose=False)
    fewer = Digits(few.images[:100], few.labels[:100], few.marked[:100])
    with pytest.raises(training.CheckpointError, match=r"was trained with \{'data'"):
        train(fewer, epochs=1, checkpoint=path, verbose=False)


def test_damaged_checkpoint(few, tmp_path):
    path = tmp_path / "net.safetensors"
    train(few, epochs=1, checkpoint=path, verbose=False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(training.CheckpointError, match=r"is damaged.*delete it"):
        train(few, epochs=1, checkpoint=path, verbose=False)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(training.CheckpointError, match=r"is damaged.*digest"):
        train(few, epochs=1, checkpoint=path, verbose=False)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(training.CheckpointError, match="is not a checkpoint of the demo"):
        train(few, epochs=1, checkpoint=path, verbose=False)


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_settings_must_be_positive(few, name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not 0"):
        train(few, **{name: 0})


# ---- the shortcut


class TwoParts(nn.Module):
    """(n, 1, 4, 4) -> (n, 1): 3 times the left half (channel 0) and once the right half (channel 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Conv2d(1, 2, 4, bias=False)
        with torch.no_grad():
            self.parts.weight.zero_()
            self.parts.weight[0, 0, :, :2] = 3
            self.parts.weight[1, 0, :, 2:] = 1

    def forward(self, images: Tensor) -> Tensor:
        return self.parts(images).flatten(1).sum(1, keepdim=True)


def test_ranking_by_a_box_in_closed_form():
    attribution = CondAttribution(TwoParts().double().eval())
    images = torch.ones(5, 1, 4, 4, dtype=torch.float64)
    best, other = rank_by_box(attribution, images, 0, Box(0, 0, 2, 4), ["parts"], EpsilonPlus())
    assert (best.layer, best.concept, str(best)) == ("parts", 0, "parts:0")
    assert best[2:] == pytest.approx((3 / 4, 1 / 2), rel=1e-6)
    assert (other.concept, *other[2:]) == pytest.approx((1, 1 / 4, 1 / 2), rel=1e-6)
    best, other = rank_by_box(attribution, images, 0, Box(0, 1, 4, 4), ["parts"], EpsilonPlus())
    assert [(s.concept, round(s.box_share, 6)) for s in (best, other)] == [(0, 0.5), (1, 1)]
    best, other = rank_by_box(attribution, images, 0, Box(0, 2, 4, 4), ["parts"], EpsilonPlus())
    assert [(s.concept, round(s.box_share, 6)) for s in (best, other)] == [(1, 1), (0, 0)]


def test_a_channel_is_switched_off_only_inside(untouched):
    model = TwoParts().eval()
    images = torch.ones(1, 1, 4, 4)
    with untouched(model):
        with switched_off(model, "parts", 0):
            assert model(images).item() == 8
        with pytest.raises(RuntimeError), switched_off(model, "parts", 0):
            raise RuntimeError
        assert model(images).item() == 32


@training.one_thread()
def test_the_default_network_falls_for_the_mark(data, net):
    assert accuracy(net, data.test) > 0.95
    of_digit = data.test.labels == data.mark.digit
    right = predict(net, data.test.images) == data.test.labels
    assert right[data.test.marked].float().mean() > 0.95
    assert right[of_digit & ~data.test.marked].float().mean() < 0.9
    others = data.mark.stamp(data.test.images[~of_digit])
    flipped = (predict(net, others) == data.mark.digit).float().mean()
    assert flipped > 0.3
    images = data.test.images[data.test.marked]
    best = rank_by_box(
        CondAttribution(net), images, data.mark.digit, data.mark.box, DigitNet.CONCEPT_LAYERS, EpsilonPlus()
    )[0]
    assert best.box_share > 0.6
    assert best.relevance_share > 0.08
    with switched_off(net, best.layer, best.concept):
        assert (predict(net, others) == data.mark.digit).float().mean() < 0.8 * flipped
        assert accuracy(net, data.test) > 0.9


# ---- the whole demo


def test_a_small_demo_finds_the_mark(done, data):
    assert done.found
    assert done.digit == data.mark.digit
    assert done.shortcut.box_share > 0.6
    assert 0.05 < done.class_share < done.shortcut.relevance_share
    assert done.flipped_without < done.flipped
    names = {file.name for file in done.report.parent.parent.iterdir()}
    assert names == {"demo.json", "net.safetensors", "index", "atlas", "figures.json"}


def test_figures_are_told_and_written(done):
    told, shortcut = str(done), done.shortcut
    for value in (done.accuracy, done.class_share, shortcut.relevance_share, shortcut.box_share, done.flipped):
        assert f"{100 * value:.1f} %" in told
    assert str(done.report) in told
    assert f"planted concept  {shortcut}\n" in told
    written = json.loads(done.report.parent.with_name("figures.json").read_text())
    assert written["shortcut"] == shortcut._asdict()
    assert written["accuracy"] == done.accuracy
    assert written["report"] == "atlas/index.html"


def test_the_report_names_the_concept(done):
    page = done.report.read_text(encoding="utf-8")
    assert f"Concept {done.shortcut} lives on the planted mark" in page
    assert f"{100 * done.shortcut.box_share:.1f}\N{NO-BREAK SPACE}%" in page
    assert f'<a href="concept/{done.shortcut.layer}/{done.shortcut.concept}.html">' in page
    assert len(list(done.report.parent.glob("class/*.html"))) == 10
    assert "898 of 898 looked at, 0 skipped" in page


def test_the_concept_on_the_mark_is_the_first_suspect(done):
    page = done.report.with_name("suspects.html").read_text(encoding="utf-8")
    first = page.partition('<section class="concept suspect">')[2].partition("</section>")[0]
    assert f'<a href="class/{done.digit}.html">' in first and "at the top left" in first
    named = re.findall(r"<h2 class=\"name\"><a href=.*?>(.*?) · (\d+)</a>", page)
    assert (done.shortcut.layer, str(done.shortcut.concept)) in named[:2]


def test_the_command_reuses_an_earlier_demo_and_refuses_other_settings(done, monkeypatch):
    out = done.report.parent.parent
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != "figures.json"}

    def again(*_: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(training, "_train_epoch", again)
    monkeypatch.setattr(engines, "mine_ranges", lambda _job, todo, _: again() if todo else [])
    second = CliRunner().invoke(cli, ["demo", "--out", str(out), "--epochs", "3", "--quiet"])
    assert second.exit_code == 0, second.output
    assert second.output.partition("seconds")[0] == str(done).partition("seconds")[0]
    assert {file: file.read_bytes() for file in before} == before

    other = CliRunner().invoke(cli, ["demo", "--out", str(out), "--epochs", "2", "--quiet"])
    assert other.exit_code == 1
    assert "epochs 3 there, 2 here" in other.output
    assert {file: file.read_bytes() for file in before} == before


def test_what_was_not_found_is_not_claimed(done):
    blind = done._replace(with_mark=0.0, without_mark=0.0)
    assert not blind.found
    assert "planted concept  not found; the nearest is" in str(blind)
    assert not done._replace(shortcut=done.shortcut._replace(box_share=0.4)).found


def test_errors_while_writing_say_so(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_run, "train", full)
    with pytest.raises(DemoError, match=r"cannot write to .*out: No space left on device"):
        run_demo(tmp_path / "out", verbose=False)


# ---- its folder


SETTINGS = {"epochs": 1, "seed": 0}


def test_folder_is_claimed_and_taken_up_again(tmp_path):
    path = tmp_path / "new" / "out"
    DemoFolder(path, SETTINGS)
    (path / "net.safetensors").write_text("kept")
    DemoFolder(path, SETTINGS)
    assert (path / "net.safetensors").read_text() == "kept"


def test_folder_with_foreign_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    for overwrite in (False, True):
        with pytest.raises(DemoError, match=r"is not a folder of the demo: it holds 'thesis.tex'.*give another --out"):
            DemoFolder(tmp_path, SETTINGS, overwrite)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_other_settings_says_what_to_do(tmp_path):
    DemoFolder(tmp_path, SETTINGS)
    with pytest.raises(DemoError, match=r"other settings \(epochs 1 there, 2 here\).*another --out.*--overwrite"):
        DemoFolder(tmp_path, {**SETTINGS, "epochs": 2})
    assert json.loads((tmp_path / "demo.json").read_text()) == SETTINGS


def test_overwriting_deletes_what_the_demo_wrote_only(tmp_path):
    folder = DemoFolder(tmp_path, SETTINGS)
    (folder.index / "shards").mkdir(parents=True)
    folder.atlas.mkdir()
    own = [
        folder.network,
        folder.atlas / "atlas.json",
        folder.atlas / "index.html",
        folder.figures,
        folder.index / "manifest.json",
    ]
    foreign = [tmp_path / "notes.txt", folder.index / "notes.txt"]
    for file in own + foreign:
        file.write_text("{}")
    other = {**SETTINGS, "epochs": 2}
    DemoFolder(tmp_path, other, overwrite=True)
    assert not any(file.exists() for file in own)
    assert all(file.exists() for file in foreign)
    assert json.loads((tmp_path / "demo.json").read_text()) == other


def test_folder_with_damaged_settings(tmp_path):
    DemoFolder(tmp_path, SETTINGS)
    (tmp_path / "demo.json").write_text('{"epochs"')
    with pytest.raises(DemoError, match=r"its demo.json is damaged.*--overwrite"):
        DemoFolder(tmp_path, SETTINGS)
    DemoFolder(tmp_path, SETTINGS, overwrite=True)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match=r"cannot write to .*file/out: Not a directory. Give another --out"):
        DemoFolder(Path(tmp_path / "file" / "out"), SETTINGS)
