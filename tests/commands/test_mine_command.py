"""``crp mine``, ``crp status`` and ``crp merge``, as they are typed."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from command_cases import crp
from mining_cases import files_of, shards_of
from PIL import Image
from torch import nn

from crp.attribution import CondAttribution
from crp.commands.errors import CommandError
from crp.commands.mine import _check_outputs
from crp.commands.processes import _device, _part
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.errors import InputError, LoadingError
from crp.visualization import models
from crp.visualization.mining.run import mine
from crp.visualization.models import Loaded, find_class, load_model
from crp.visualization.prepared import Normalized, Prepared
from crp.visualization.sources import MULTI_LABEL, load_source
from crp.visualization.table.lock import get_owners, locked
from crp.visualization.table.store import Table

MODULE = """
import os, time
import torch
from torch import nn
from PIL import Image
import numpy as np

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

class Rows:
    def __init__(self, seconds=0): self.seconds = seconds
    def __len__(self): return 12
    def __getitem__(self, index):
        time.sleep(self.seconds)
        generator = torch.Generator().manual_seed(index)
        return {"pixels": torch.randn(1, 6, 6, generator=generator), "label": index % 3, "id": str(index)}

class Items(Rows):
    def __init__(self, make): super().__init__(); self.make = make
    def __getitem__(self, index): return self.make(*list(super().__getitem__(index).values())[:2])

alone = Items(lambda x, y: x)
single = Items(lambda x, y: (x,))
ragged = Items(lambda x, y: (x, list(range(y))))
hot = Items(lambda x, y: (x, torch.arange(3) < y))
smooth = Items(lambda x, y: (x, [0.9, 0.05, 0.05]))
sizes = Items(lambda x, y: (x[:, :4 + y], y))
nan = Items(lambda x, y: (x / (y - 2), y))
def pooled():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
rows = Rows()
def slow(): return Rows(0.15)
number = 3
"""
NET = ["--model", "words:net", "--layers", "1", "--composite", "epsilon_plus", "--quiet"]
ROWS = ["--data", "words:rows", "--fields", "pixels,label", "--shard-size", "2", "--batch-size", "2"]
SLOW = [word if word != "words:rows" else "words:slow" for word in ROWS]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "words.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "words", raising=False)
    return tmp_path


def mined(out: str, *more: object) -> Result:
    return crp("mine", *NET, *ROWS, "--out", out, *more)


# --- mining ---------------------------------------------------------------------------------------------------------


def test_the_command_mines_what_the_function_mines(here: Path) -> None:
    result = mined("a", "--modes", "relevance", "--kinds", "sum", "--targets", "0,2", "--set", "epsilon=0.01")
    assert result.exit_code == 0, result.output
    assert result.output == "12 of 12 samples, 24 rows; complete\n"
    import words  # type: ignore[import-not-found]

    rows = [(words.rows[i]["pixels"], None) for i in range(12)]
    settings: dict[str, Any] = {"modes": ["relevance"], "kinds": ["sum"], "targets": [0, 2], "progress": False}
    attribution, layer_map = CondAttribution(words.net().eval()), {"1": ChannelConcept()}
    table = mine(attribution, rows, layer_map, EpsilonPlus(epsilon=0.01), here / "b", batch_size=2, **settings)
    expected, found = table.column("1", 2), Table.open(here / "a").column("1", 2)
    assert found.sample.tolist() == expected.sample.tolist() and found.target.tolist() == expected.target.tolist()
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-6)


def test_a_run_goes_on_with_nothing_but_the_folder(here: Path) -> None:
    options = ["--targets", "top-2", "--set", "epsilon=0.01", "--modes", "relevance", "--storage", "float16"]
    assert mined("whole", *options).exit_code == 0
    assert mined("out", *options, "--stop", "4").output.endswith("incomplete: 8 samples are missing\n")
    result = crp("mine", "--out", "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "12 of 12 samples, 24 rows; complete\n"), result.output
    assert files_of(here / "out") == files_of(here / "whole")
    other = crp("mine", "--out", "out", "--set", "epsilon=0.5").output
    assert "with another composite (composite epsilon_plus(epsilon=0.01) there, epsilon_plus(epsilon=0.5) here" in other
    other = crp("mine", "--out", "out", "--targets", "prediction", "--layers", "0").output
    assert "layers 1 there, 0 here" in other and "targets top-2 there, prediction here; mined with crp" in other
    none = crp("mine", "--out", "none", "--layers", "1")
    assert (none.exit_code, none.output) == (
        1,
        "Error: --model, --data must be given: none holds no table that says it\n",
    )


def test_status_says_what_a_table_is(here: Path) -> None:
    assert mined("out", "--set", "epsilon=0.01", "--stop", "4").exit_code == 0
    told = crp("status", "out").output
    assert "model      words:net\ndataset    words:rows\ncomposite  epsilon_plus(epsilon=0.01" in told
    assert "targets    label; preprocessing: none\n" in told
    result = crp("status", "out", "--json", "--verify")
    facts = json.loads(result.output)
    assert result.exit_code == 1 and facts["missing"] == [[4, 12]] and facts["damaged"] == [] and not facts["complete"]
    assert facts["layers"] == {"1": 4} and facts["recipe"]["command"]["model"] == "words:net"


def test_parts_and_their_merge_equal_the_whole(here: Path) -> None:
    assert mined("whole").exit_code == 0
    first = mined("parts", "--shard", "1/2")
    assert first.exit_code == 0
    assert first.output == "part 1/2 is done; 6 of 12 samples, 6 rows; incomplete: 6 samples are missing\n"
    assert crp("status", "parts").exit_code == 1
    assert crp("merge", "parts").exit_code == 1
    assert mined("more", "--shard", "0/2").exit_code == 0
    result = crp("merge", "parts", "more")
    assert (result.exit_code, result.output) == (0, "parts: 12 of 12 samples, 12 rows; complete\n")
    assert files_of(here / "parts") == files_of(here / "whole")


@pytest.mark.parametrize(
    ("share", "environment", "expected"),
    [
        (None, {}, None),
        ("3/8", {}, (3, 8)),
        ("3/8", {"RANK": "1", "WORLD_SIZE": "4"}, (3, 8)),  # of another launcher
        (None, {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ("3/8", {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4"}, (13, 32)),
    ],
)
def test_the_share_of_a_process(share: str | None, environment: dict[str, str], expected: Any) -> None:
    assert _part(share, environment) == expected


def test_processes_of_a_machine_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _device(None) == ("cuda:0" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, device in ((None, "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert _device(None) == device


def test_torchrun_whose_rank_is_killed_goes_on(here: Path) -> None:
    assert mined("whole").exit_code == 0
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    command = [sys.executable, *run, "-m", "crp", "mine", *NET, *SLOW, "--out", "out"]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)
    wait_for_shards(here / "out")
    os.kill(get_owners(here / "out")[0]["pid"], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "exitcode: -9" in errors.replace("exitcode  :", "exitcode:")
    Table.open("out").clean()
    assert shards_of(files_of(here / "out")) == shards_of(files_of(here / "whole"))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.slow  # (beside other tests, mining may end before it is interrupted)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interruption_keeps_whole_shards_and_says_how_to_go_on(here: Path, number: int) -> None:
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # (ignored where tests run in the background)
        result = crp("mine", *NET, *SLOW, "--out", "out")
        (here / "told").write_text(result.output)
        os._exit(result.exit_code)
    wait_for_shards(here / "out")
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    told = (here / "told").read_text()
    assert told == "\nInterrupted. All whole shards are kept in out; the same command goes on from there.\n"
    assert not list(here.glob("out/lock-*"))
    left = Table.open("out").coverage().missing
    assert left and left[0][0] >= 2
    assert crp("mine", *NET, *SLOW, "--out", "out").exit_code == 0
    mined("whole")
    assert shards_of(files_of(here / "out")) == shards_of(files_of(here / "whole"))


@pytest.mark.parametrize(
    ("more", "again"), [([], "the same command"), (["--overwrite"], "the same command without --overwrite")], ids=str
)
def test_an_interruption_says_which_command_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], again: str
) -> None:
    """With ``--overwrite`` once more, what is kept would be discarded."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crp.commands.mine._run", interrupted)
    result = mined("out", *more)
    assert result.exit_code == 130
    assert f"All whole shards are kept in out; {again} goes on from there." in result.output


@pytest.mark.parametrize(("share", "shown"), [(None, True), ("0/2", True), ("1/2", False)], ids=str)
def test_one_process_shows_the_progress(
    here: Path, monkeypatch: pytest.MonkeyPatch, share: str | None, shown: bool
) -> None:
    settings: dict[str, Any] = {}

    def run(*_: Any, **given: Any) -> None:
        settings.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("crp.commands.mine._run", run)
    words = [word for word in NET if word != "--quiet"]
    crp("mine", *words, "--data", "words:rows", "--out", "out", *(["--shard", share] if share else []))
    assert settings["progress"] is shown


def wait_for_shards(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(path.glob("shards/*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "conv"], "<layers> 'conv' not found in model"),
        (["--composite", "epsilon_pus"], "there is no composite 'epsilon_pus'"),
        (["--set", "epsilon"], "--set 'epsilon' must be KEY=VALUE"),
        (["--set", "epsilonn=1"], "epsilonn"),
        (
            ["--composite", "epsilon_gamma_box"],
            "epsilon_gamma_box: EpsilonGammaBox: missing a required argument: 'low'",
        ),
        (["--multi-label", "list", "--targets", "all"], "single_targets is about labels"),
        (["--composite", "none", "--set", "a=1"], "--set is for a composite"),
        (["--targets", "0,99"], "--targets 99: the model has 3 outputs, 0 to 2"),
        (["--targets", "labels"], "targets must be 'label', 'prediction'"),
        (["--modes", "relevances"], "modes must be among"),
        (["--shard", "2/2"], "--shard 2/2 must be I/N with I from 0 to N - 1"),
        (["--shard", "0/2", "--overwrite"], "--overwrite does not go with several processes"),
        (["--device", "cuda9x"], "--device is 'cuda9x', which is no device of this machine"),
        (["--data", "words:nothing"], "words has no 'nothing'"),
        (["--data", "words:number"], "--data words:number: the dataset needs __len__ and __getitem__; int lacks one"),
        (["--data", "nowhere"], "--data nowhere is neither a folder nor package.module:factory"),
        (["--data", "."], "--fields is for datasets"),
        (["--fields", "a,b,c"], "--fields names data and label, not 3 fields"),
        (["--fields", "image"], "has no data at 'image'; it has the keys 'pixels', 'label', 'id'"),
        (["--fields", "pixels"], "label None is no integer class"),
        (["--mean", "0.5", "--std", "0.2"], "--mean: this dataset gives tensors, which are taken as they are"),
        (["--size", "8"], "--size: this dataset gives tensors"),
        (["--stop", "13"], "the range 0 to 13 must be within the dataset"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_told_in_a_line(here: Path, more: list[str], message: str) -> None:
    result = mined("out", *more)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and message in result.output, result.output
    assert not list(here.glob("out/shards/*"))


def of_items(name: str, out: str, *more: str) -> Result:
    return crp("mine", *NET, "--data", f"words:{name}", "--out", out, *more)


@pytest.mark.parametrize("label", [[0.05, 0.9, 0.05], [1, 0, -1], [[1, 0]], 2, [0, 1, 2]], ids=str)
def test_labels_of_several_classes_are_0_or_1(label: Any) -> None:
    """Smoothed labels and marks for "unknown" name no classes."""
    assert MULTI_LABEL["hot"]([0, 1, 1]) == MULTI_LABEL["hot"](torch.tensor([False, True, True])) == [1, 2]
    with pytest.raises(InputError, match=r"must have 0 or 1 for each class \(--multi-label hot\), not \["):
        MULTI_LABEL["hot"](label)


def test_items_with_smoothed_labels_are_named(here: Path) -> None:
    told = of_items("smooth", "smooth", "--multi-label", "hot")
    assert told.exit_code == 1 and "sample 0: " in told.output and "must have 0 or 1 for each class" in told.output


def test_items_without_labels_and_with_several(here: Path) -> None:
    plain = warnings.formatwarning
    for name in ("alone", "single"):
        assert "label None is no integer class" in of_items(name, name).output
        result = of_items(name, name, "--targets", "top-2")
        assert (result.exit_code, result.output) == (0, "12 of 12 samples, 24 rows; complete\n")
    told = of_items("ragged", "ragged").output
    assert "label [] is no integer class" in told and "--multi-label" in told
    assert of_items("ragged", "ragged", "--multi-label", "list").exit_code == 0
    assert of_items("hot", "hot", "--multi-label", "hot").exit_code == 0
    targets = [target for i in range(12) for target in range(i % 3)]
    assert warnings.formatwarning is plain  # that of the command is gone
    for name in ("ragged", "hot"):
        assert Table.open(name).rows().target.tolist() == targets


def test_a_run_that_mined_nothing_binds_the_folder_to_nothing(here: Path) -> None:
    sized = ["--model", "words:pooled", "--batch-size", "2"]
    told = of_items("sizes", "out", *sized).output
    assert "sample 1: its shape is (1, 5, 6)" in told and "(--mixed-shapes) mines them, too" in told
    assert Table.open("out").is_empty
    assert of_items("sizes", "out", *sized, "--mixed-shapes").exit_code == 0
    assert "another shapes" in of_items("sizes", "out", *sized).output


def test_warnings_are_told_in_a_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "crp", "mine", *NET, "--data", "words:nan", "--out", "out"]
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0
    assert re.fullmatch(r"Warning: 4 samples were skipped \(sample 2: its data is not finite\); .*\n", found.stderr)


def test_another_composite_is_refused_unless_told_otherwise(here: Path) -> None:
    assert mined("out").exit_code == 0
    refused = mined("out", "--set", "epsilon=0.5")
    assert refused.exit_code == 1 and "mined with another composite" in refused.output
    assert mined("out", "--set", "epsilon=0.5", "--overwrite").exit_code == 0
    with locked(here / "out"):
        busy = mined("out", "--set", "epsilon=0.5")
        assert busy.exit_code == 1 and f"written by process {os.getpid()}" in busy.output


# --- pictures -------------------------------------------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size)


@pytest.mark.parametrize("name", ["ResNet18", "EfficientNet_B0"])
def test_pictures_are_prepared_as_the_weights_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``crp mine`` and ``crp attribute`` alike; those of EfficientNet ask for bicubic interpolation."""
    from torchvision import models as of_torchvision

    weights = getattr(of_torchvision, f"{name}_Weights").DEFAULT
    net = nn.Sequential(nn.Conv2d(3, 1, 1))
    monkeypatch.setattr(of_torchvision, "get_model", lambda name, weights: net)
    picture(0, (300, 280)).save(tmp_path / "a.png")
    expected = weights.transforms()(picture(0, (300, 280)))
    ready = models.load_model(name.lower(), "DEFAULT")
    data, normalize = load_source(tmp_path, [], ready, by_label=False)
    shown, explained = ready.read(tmp_path / "a.png")
    assert normalize is not None and torch.equal(data[0][0], shown)
    torch.testing.assert_close(normalize(data[0][0][None])[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(explained[0], expected, rtol=1e-5, atol=1e-5)
    assert models.load_model(name.lower(), "DEFAULT", size=64).prepared(picture(0)).shape == (3, 64, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(["b", "a", "c/d"]):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        picture(i).save(tmp_path / "pictures" / name / "1.png")
    return tmp_path / "pictures"


def loaded(classes: list[str], channels: int = 3) -> Loaded:
    prepared = Prepared("RGB" if channels == 3 else "L", 16, 8)
    return Loaded(nn.Sequential(nn.Conv2d(channels, 1, 1)), prepared, Normalized((0.5,), (0.25,)), classes)


def test_a_folder_of_class_folders(folder: Path) -> None:
    data, preprocess = load_source(folder, [], loaded([]), by_label=True)
    assert [data[i][1] for i in range(3)] == [0, 1, 2]
    assert data[0][0].shape == (3, 8, 8)
    assert preprocess is not None
    assert torch.equal(preprocess(data[0][0][None]), (data[0][0][None] - 0.5) / 0.25)
    named, _ = load_source(folder, [], loaded(["c", "x", "b", "a"]), by_label=True)
    assert [named[i][1] for i in range(3)] == [3, 2, 0]
    grey, _ = load_source(folder, [], loaded([], 1), by_label=False)
    assert grey[0][0].shape == (1, 8, 8) and grey[0][1] is None
    with pytest.raises(LoadingError, match="3 class folders and the model 2 classes"):
        load_source(folder, [], loaded(["x", "y"]), by_label=True)
    picture(0).save(folder / "loose.png")
    with pytest.raises(LoadingError, match=r"beside its class folders, such as loose\.png"):
        load_source(folder, [], loaded([]), by_label=True)
    with pytest.raises(LoadingError, match="has no class folders"):
        load_source(folder / "b", [], loaded([]), by_label=True)
    (folder / "empty").mkdir()
    for by_label in (True, False):
        with pytest.raises(LoadingError, match="holds no pictures"):
            load_source(folder / "empty", [], loaded([]), by_label=by_label)


def test_hidden_folders_and_files_are_passed_over(folder: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX/a"):
        (folder / name).mkdir(parents=True)
        picture(9).save(folder / name / "1.png")
    picture(9).save(folder / "a" / "._1.png")
    data, _ = load_source(folder, [], loaded([]), by_label=True)
    assert [(data.source(i).name, data[i][1]) for i in range(len(data))] == [  # type: ignore[union-attr]
        ("a/1.png", 0), ("b/1.png", 1), ("c/d/1.png", 2)
    ]  # fmt: skip


def test_pictures_in_formats_that_are_left_out_are_named(folder: Path) -> None:
    """Those of torchvision's ``ImageFolder``, whose numbers of samples are then the same."""
    for name in ("a/2.gif", "b/2.GIF", "c/d/2.ico", "a/notes.txt", "a/.2.gif"):
        (folder / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r": 3 files left out, as .*: a/2\.gif, b/2\.GIF, c/d/2\.ico; convert them"):
        assert len(load_source(folder, [], loaded([]), by_label=True)[0]) == 3


def test_class_folders_may_be_links(folder: Path, tmp_path: Path) -> None:
    """They were empty, without a word; a link that leads nowhere is named where it is read."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("a", "b", "c"):
        (linked / name).symlink_to(folder / name)
    (folder / "a" / "2.png").symlink_to("absent.png")
    (folder / "a" / "again").symlink_to(folder)  # (which leads back to where it is)
    data, _ = load_source(linked, [], loaded([]), by_label=True)
    assert [data.source(i).name for i in range(len(data))] == [  # type: ignore[union-attr]
        "a/1.png", "a/2.png", "b/1.png", "c/d/1.png"
    ]  # fmt: skip
    with pytest.raises(LoadingError, match=r"a/2\.png is no picture that can be read: .*No such file"):
        data[1]


def test_folders_that_are_linked_in_a_circle_are_read_once(folder: Path) -> None:
    (folder / "a" / "others").symlink_to("../b")
    (folder / "b" / "others").symlink_to("../a")
    data, _ = load_source(folder, [], loaded([]), by_label=True)
    names = ["a/1.png", "a/others/1.png", "b/1.png", "b/others/1.png", "c/d/1.png"]
    assert [data.source(i).name for i in range(len(data))] == names  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_read_is_not_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.scandir

    def locked(place: Any) -> Any:
        if Path(place).name == "d":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return usual(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(LoadingError, match=r"--data: the folder .*c/d cannot be read: Permission denied"):
        load_source(folder, [], loaded([]), by_label=True)


def classes_of(folder: Path, names: list[str], classes: list[str]) -> dict[str, int]:
    for number, name in enumerate(names):
        (folder / name).mkdir()
        picture(number).save(folder / name / "1.png")
    found: dict[str, int] = load_source(folder, [], loaded(classes), by_label=True)[0].dataset.labels
    return found


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        ([str(i) for i in range(11)], [], {str(i): i for i in range(11)}),
        (["00", "01", "02"], [], {"00": 0, "01": 1, "02": 2}),
        (["Ship", " truck"], ["truck", "ship", "cat"], {"Ship": 1, " truck": 0}),
        (["a", "A"], ["A", "a"], {"a": 1, "A": 0}),
        (["n1", "n2"], ["tench", "goldfish"], {"n1": 0, "n2": 1}),
        (["1", "2"], ["0", "1", "2"], {"1": 1, "2": 2}),
    ],
    ids=["numbers", "zeros", "case", "exact", "order", "names are numbers"],
)
def test_which_class_a_folder_is(tmp_path: Path, names: list[str], classes: list[str], expected: Any) -> None:
    assert classes_of(tmp_path, names, classes) == expected


@pytest.mark.parametrize(
    ("names", "classes", "match"),
    [
        (
            ["ship", "truk"],
            ["ship", "truck"],
            "'truk' is no class of the model, and others are; nearest: 'truck'; rename",
        ),
        (["1", "2", "10"], [], "are the numbers 1 to 10, and the classes count from 0 to 2"),
        (["0", "1"], ["a", "b", "c"], "are the numbers 0 to 1, and the classes count from 0 to 2"),
        (["crane"], ["crane", "b", "crane"], "'crane' is the name of the classes 0, 2; give --classes"),
    ],
    ids=["typo", "from 1", "too few", "twice"],
)
def test_folders_that_could_be_other_classes_are_refused(
    tmp_path: Path, names: list[str], classes: list[str], match: str
) -> None:
    with pytest.raises(LoadingError, match=match):
        classes_of(tmp_path, names, classes)


@pytest.mark.parametrize(("name", "expected"), [("1", 0), ("10", 1), ("3", 3), ("-1", -1)])
def test_a_target_that_is_the_name_of_a_class_is_no_number(name: str, expected: int) -> None:
    assert find_class(name, ["1", "10", "2", "x"]) == expected


def test_a_class_folder_without_pictures_is_named(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.warns(UserWarning, match="no picture is in the class folders b$"):
        assert classes_of(tmp_path, ["a", "c"], []) == {"a": 0, "b": 1, "c": 2}


def test_names_in_a_file_may_have_blanks_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes("\ufeffcat \r\n dog\r\n\r\n".encode())
    (tmp_path / "own.py").write_text("from torch import nn\nnet = nn.Linear(2, 2)\n")
    monkey = pytest.MonkeyPatch()
    monkey.chdir(tmp_path)
    try:
        assert models.load_model("own:net", classes=tmp_path / "names").classes == ["cat", "dog"]
        (tmp_path / "names").write_text("cat\n\ndog\n")
        with pytest.raises(LoadingError, match="line 2 is blank; every class has a name in a line of its own"):
            models.load_model("own:net", classes=tmp_path / "names")
    finally:
        monkey.undo()


def test_a_run_says_what_it_has_decided(here: Path, folder: Path) -> None:
    words = [word for word in NET if word != "--quiet"]
    code = "nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))"
    (here / "words.py").write_text(MODULE + f"def three(): torch.manual_seed(0); return {code}\n")
    words[1] = "words:three"
    result = crp("mine", *words, "--data", folder, "--size", "8", "--out", "out")
    assert result.stdout.splitlines()[:3] == [
        "layers     1",
        "pictures   3, not normalised, in 0..1 (--mean and --std do it, where the training did)",
        "classes    a 0, b 1, c 2",
    ]
    options = ["--mean", "0.5", "--std", "0.25", "--overwrite"]
    result = crp("mine", *words, "--data", folder, "--size", "8", "--out", "out", *options)
    assert "pictures   3, less 0.5, divided by 0.25\n" in result.stdout
    assert "preprocessing: less 0.5, divided by 0.25\n" in crp("status", "out").output


def test_a_model_with_other_weights_at_every_call_is_refused(here: Path) -> None:
    (here / "words.py").write_text(MODULE + "def random(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))\n")
    words = [word if word != "words:net" else "words:random" for word in NET]
    result = crp("mine", *words, *ROWS, "--out", "out")
    assert result.exit_code == 1 and "words:random() makes a model with other weights at every call" in result.output
    assert not (here / "out").exists()


def test_a_checkpoint_may_lack_the_count_of_batches(here: Path) -> None:
    (here / "words.py").write_text(
        MODULE + "def normed(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))\n"
    )
    sys.path.insert(0, str(here))
    try:
        import words  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(here))
    state = words.normed().state_dict()
    torch.save({"module." + name: one for name, one in state.items() if "num_batches" not in name}, here / "net.pt")
    assert torch.equal(models.load_model("words:normed", checkpoint=here / "net.pt").model[0].weight, state["0.weight"])  # type: ignore[index,arg-type]
    del state["1.running_mean"]
    torch.save(state, here / "net.pt")
    with pytest.raises(LoadingError, match=r"it lacks 1\.running_mean$"):
        models.load_model("words:normed", checkpoint=here / "net.pt")


def test_targets_that_are_no_outputs_are_found(here: Path) -> None:
    assert mined("out").exit_code == 0
    table = Table.open("out")
    assert table.header.recipe["model"]["outputs"] == 3 and table.verify() == []
    few = replace(table.header, recipe={"model": {"outputs": 2}})
    assert "has rows of target 2, and the model 2 outputs" in Table("out", few, table.shards).verify()[0]


@pytest.mark.promise(
    "Commands",
    "Classes are compared: a folder of fewer classes than the model has outputs is refused unless names say which",
)
def test_outputs_and_class_folders_must_be_as_many(folder: Path, here: Path) -> None:
    code = (
        "def six(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 6))\n"
    )
    (here / "words.py").write_text(MODULE + code)
    options = ["--model", "words:six", "--data", folder, "--size", "8", "--layers", "0", "--out", "out", "--quiet"]
    result = crp("mine", *options)
    assert result.exit_code == 1 and "has 3 class folders and the model 6 outputs: say by --classes" in result.output
    assert not (here / "out").exists()
    (here / "names").write_text("a\nb\nc\n")
    result = crp("mine", *options, "--classes", here / "names")
    assert result.exit_code == 1 and "names names 3 classes, and the model has 6 outputs" in result.output
    (here / "names").write_text("x\na\ny\nc\nb\nz\n")
    assert crp("mine", *options, "--classes", here / "names").exit_code == 0
    table = Table.open("out")
    assert table.rows().target.tolist() == [1, 4, 3]
    assert table.samples().source == ["a/1.png", "b/1.png", "c/d/1.png"]
    recipe = table.header.recipe
    assert recipe["class_names"] == ["x", "a", "y", "c", "b", "z"]
    assert recipe["dataset"]["named"] == str(folder.resolve()) and recipe["command"]["classes"] == str(here / "names")
    assert crp("mine", *options, "--targets", "prediction", "--overwrite").exit_code == 0
    with pytest.raises(CommandError, match="the model names 1 class and has 6 outputs: name these by --classes"):
        _check_outputs(replace(load_model("words:six"), classes=["a"]), 6, "label", {"a": 0}, folder)


@pytest.mark.filterwarnings("ignore:(6|12) samples were skipped")
def test_a_run_that_skips_all_samples_has_failed(here: Path) -> None:
    (here / "words.py").write_text(MODULE + "lost = Items(lambda x, y: (x * torch.nan, y))\n")
    result = of_items("lost", "out", "--on-error", "skip")
    assert result.exit_code == 1 and "Error: nothing was mined: 12 samples skipped (" in result.output
    assert of_items("lost", "part", "--on-error", "skip", "--shard", "0/2").exit_code == 0  # (others may have rows)


def test_a_folder_holds_pictures_also_where_none_can_be_read(folder: Path, here: Path) -> None:
    for picture in folder.rglob("*.png"):
        picture.write_bytes(b"no picture")
    options = ["--data", folder, "--size", "8", "--targets", "prediction", "--out", "out", "--quiet"]
    result = crp("mine", "--model", "words:pooled", "--layers", "0", *options)
    assert result.exit_code == 1 and "a/1.png is no picture that can be read" in result.output, result.output


@pytest.mark.parametrize(
    ("words", "layers"),
    [(["0,2"], ["0", "2"]), (["0, 2"], ["0", "2"]), (["[0,2]"], ["0", "2"]), (["2", "0"], ["0", "2"])],
    ids=["commas", "blanks", "pattern", "again"],
)
def test_layers_have_commas_between_them(folder: Path, here: Path, words: list[str], layers: list[str]) -> None:
    code = (
        "def two(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), "
        "nn.Flatten(), nn.Linear(64, 3))\n"
    )
    (here / "words.py").write_text(MODULE + code)
    options = [option for word in words for option in ("--layers", word)]
    crp("mine", "--model", "words:two", "--data", folder, "--size", "8", *options, "--out", "out", "--quiet")
    assert list(Table.open("out").layers) == layers
    result = crp("report", "out", "--out", "pages", "--quiet", "--layers", ",".join(layers))
    assert result.exit_code == 0, result.output
    assert all(Path("pages/layer", f"{layer}.html").exists() for layer in layers)


def test_a_torchvision_model_mines_a_folder_and_skips_what_is_broken(folder: Path, tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    (folder / "a" / "2.png").write_bytes(b"no picture")
    torch.save(squeezenet1_1().state_dict(), tmp_path / "net.pt")
    command = ["mine", "--model", "squeezenet1_1", "--data", folder, "--size", "40", "--layers", "classifier.1"]
    random = crp(*command, "--out", tmp_path / "out")
    assert random.exit_code == 1 and "squeezenet1_1 has random weights" in random.output
    command += ["--checkpoint", tmp_path / "net.pt", "--out", tmp_path / "out", "--targets", "top-2", "--quiet"]
    stopped = crp(*command)
    assert stopped.exit_code == 1 and "sample 1: a/2.png is no picture that can" in stopped.output
    assert stopped.output.endswith("(--on-error skip) leaves such samples out\n")
    with pytest.warns(UserWarning, match="1 sample was skipped"):
        result = crp(*command, "--on-error", "skip")
    assert (result.exit_code, result.output) == (0, "3 of 4 samples, 1 skipped, 6 rows; complete\n")
    told = crp("status", tmp_path / "out").output
    assert "skipped    1: a/2.png is no picture that can be read: cannot identify image file" in told
