"""150 wrong invocations: each answers with one readable line and exit status 1 or 2, before any work."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import click
import dask
import distributed
import numpy as np
import pytest
from click.testing import CliRunner, Result
from command_cases import forked
from PIL import Image

from crp.commands.cli import cli, main
from crp.commands.values import read_value

MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def raises(): raise ZeroDivisionError("of the user's own")
def exits(): raise ValueError("a message\\nof two lines")
def nothing(): return None
def many(a, b): return net()
def nan():
    model = net()
    model[0].weight.data[0] = torch.nan
    return model
def tokens(): return nn.Sequential(nn.Conv2d(1, 4, 3))
number = 3
class Random(nn.Module):
    def forward(self, x): return x * (1 + 0.1 * torch.rand_like(x))
def random(): return nn.Sequential(net(), Random())

class Rows:
    def __len__(self): return 6
    def __getitem__(self, i): return torch.full((1, 6, 6), float(i)), i % 3
rows = Rows()
empty = []
words = ["a", "b"]
def stream(): return iter(Rows())
class Broken(Rows):
    def __getitem__(self, i): raise OSError("not mounted")
broken = Broken()
class Wide(Rows):
    def __getitem__(self, i): return torch.zeros(3, 6, 6), 0
wide = Wide()
class Far(Rows):
    def __getitem__(self, i): return torch.zeros(1, 6, 6), 99
far = Far()
"""


def huge_png() -> bytes:
    """Header of a picture of 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong_nets.py").write_text(MODULE)
    (tmp_path / "raises_nets.py").write_text("raise RuntimeError('while it is imported')")
    (tmp_path / "syntax_nets.py").write_text("def (")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 6), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    Path("text.png").write_text("no picture")
    Path("huge.png").write_bytes(huge_png())
    Path("cut.png").write_bytes(Path("picture.png").read_bytes()[:40])
    Path("text.pt").write_text("no checkpoint")
    Path("empty.safetensors").write_bytes(b"")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("folder", "folder/cats", "loose/cats", "none"):
        Path(name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save("folder/cats/a.png")
    Image.fromarray(pixels).save("loose/a.png")
    Image.fromarray(pixels).save("loose/cats/a.png")
    Path("table").mkdir()
    Path("table/manifest.json").write_text("{")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("wrong_nets", "raises_nets", "syntax_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


MODELS = [
    ":net", "wrong_nets:", ":", "wrong_nets", "wrong_nets:absent", "wrong_nets:raises", "wrong_nets:exits",
    "wrong_nets:nothing", "wrong_nets:many", "wrong_nets:number", "absent_nets:net", "raises_nets:net",
    "syntax_nets:net", "resnet", "wrong nets:net", "wrong_nets:net:net", "../x:net", "", "json:loads", "os:getcwd",
]  # fmt: skip
ATTRIBUTE = [
    "--method absent", "--method", "--target 99", "--target -99", "--target x", "--target 1.5", "--layer absent",
    "--concept 1", "--layer 0 --concept 99", "--layer 0 --concept x", "--option steps", "--option =3",
    "--option absent=3", "--method smoothgrad --option n=-1", "--method intgrad --option steps=[1]",
    "--method epsilon_plus --option canonizers=[1]", "--method grad_cam", "--method grad_cam --layer absent",
    "--size 0", "--size -1", "--size x", "--size 100000", "--mean 0", "--std 1", "--mean 0 --std 0",
    "--mean nan --std 1", "--mean 0 --std -1", "--mean 0 --mean 0 --std 1 --std 1", "--classes absent.txt",
    "--classes binary.txt", "--classes folder", "--checkpoint absent.pt", "--checkpoint text.pt",
    "--checkpoint empty.safetensors", "--checkpoint folder", "--weights DEFAULT",
    "--weights DEFAULT --checkpoint text.pt", "--absent", "--method epsilon_plus --option epsilon=x",
    "--method epsilon --option epsilon=true", "--method grad_cam --layer 0 --option relu=no",
]  # fmt: skip
OUTS = ["/proc/x.png", "out.txt", "out", "picture.png/x.png", "picture.png", "/proc/1/a/b.png", ""]
IMAGES = ["absent.png", "text.png", "huge.png", "cut.png", "folder", ""]
MINE = [
    "--set canonizers=[1]", "--set epsilon=true", "--set x", "--set =1", "--set absent=1", "--composite absent",
    "--composite none --set a=1", "--layers absent", "--layers absent*", "--targets absent", "--targets -1",
    "--targets 99", "--targets 1,x", "--targets top-0", "--modes absent", "--modes ,", "--kinds absent",
    "--batch-size 0", "--batch-size x", "--shard-size 0", "--workers -1", "--device foo", "--device cuda:99",
    "--on-error absent", "--start -1", "--stop 0", "--start 5 --stop 2", "--start 99", "--shard 2/2", "--shard x",
    "--shard 1", "--shard 0/0", "--dask absent:1", "--size 0", "--size 5", "--mean 0 --std 0", "--mean 0",
    "--classes absent.txt", "--fields a,b,c", "--fields a", "--multi-label absent", "--storage float8",
    "--data absent", "--data wrong_nets:empty", "--data wrong_nets:words", "--data wrong_nets:raises",
    "--data wrong_nets:stream", "--data wrong_nets:number", "--data wrong_nets:absent", "--data none", "--data loose",
    "--data folder", "--data wrong_nets:broken", "--data wrong_nets:broken --on-error skip", "--data wrong_nets:wide",
    "--data wrong_nets:far", "--data wrong_nets:far --on-error skip", "--out picture.png", "--out /proc/x",
    "--overwrite --shard 0/2", "--checkpoint text.pt", "--weights DEFAULT", "--multi-label list",
    "--model wrong_nets:nan", "--model wrong_nets:tokens --targets prediction",
]  # fmt: skip
CHECK = ["--composite absent", "--set x", "--target 99", "--target x", "--image absent.png", "--size 0"]
OTHERS = [
    "", "absent", "--absent", "methods --family absent", "methods x", "status", "status absent", "status none",
    "status table", "status picture.png", "status none --absent", "merge", "merge none", "merge table",
    "merge absent none", "merge none absent", "merge none table", "demo --epochs 0", "demo --epochs x",
    "demo --seed -1", "demo --batch-size 0", "demo --out picture.png", "demo x", "attribute", "attribute picture.png",
    "mine", "mine --out new", "mine --model x",
]  # fmt: skip


def run(arguments: list[str], env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, env=env)


def invocations() -> dict[str, list[str]]:
    attribute = ["attribute", "picture.png", "--model", "wrong_nets:net", "--out", "out.png"]
    mine = [
        "mine",
        "--model",
        "wrong_nets:net",
        "--data",
        "wrong_nets:rows",
        "--layers",
        "0",
        "--out",
        "new",
        "--quiet",
    ]
    cases = {f"attribute model {m}": [*attribute, "--model", m] for m in MODELS}
    cases |= {f"mine model {m}": [*mine, "--model", m] for m in MODELS[:8]}
    cases |= {f"attribute {words}": [*attribute, *words.split()] for words in ATTRIBUTE}
    cases |= {f"attribute out {out}": [*attribute, "--out", out] for out in OUTS}
    cases |= {f"attribute image {image}": ["attribute", image, *attribute[2:]] for image in IMAGES}
    cases |= {f"mine {words}": [*mine, *words.split()] for words in MINE}
    check = ["check", "wrong_nets:net", "--image", "picture.png"]
    cases |= {f"check {words}": [*check, *words.split()] for words in CHECK}
    cases |= {f"check model {m}": ["check", m, "--image", "picture.png"] for m in MODELS[:6]}
    return cases | {words or "nothing": words.split() for words in OTHERS}


CASES = invocations()


def test_there_are_at_least_150():
    assert len(CASES) >= 150


@pytest.mark.promise(
    "Commands",
    "Every wrong command answers in one line, with exit status 1 or 2, and before any work",
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_invocation_answers_in_one_line(place, case):
    # Defaults that a package adds to Dask's configuration in this context are gone after it: it is imported before.
    assert distributed.__version__
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):  # (it is half a minute by default)
        result = run(CASES[case])
    told = result.output.strip()
    assert result.exit_code in (1, 2), told
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith("Error:") or result.exit_code == 2, told
    assert len(last) > len("Error: ") + 8, told
    assert len([line for line in told.splitlines() if line.startswith("Error:")]) <= 1
    assert not Path("out.png").exists()


EMPTY = [
    pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
    for name, command in cli.commands.items()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False) and parameter.default != ""
]


@pytest.mark.parametrize(("name", "parameter"), EMPTY)
def test_an_empty_text_is_refused_wherever_a_command_takes_one(tmp_path, monkeypatch, name, parameter):
    monkeypatch.chdir(tmp_path)
    option = parameter.opts[0]
    is_option = isinstance(parameter, click.Option)
    for words in [[option, ""], [f"{option}="]] if is_option else [[""] * len(cli.commands[name].params)]:
        result = run([name, *words])
        assert result.exit_code == 2 and "it is empty" in result.output, result.output
        assert option in result.output or not is_option
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "value"),
    [("1e-3", 1e-3), ("[1, 2]", [1, 2]), ("true", True), ("True", True), ("False", False), ("no", "no")],
    ids=repr,
)
def test_values_of_settings_are_read_as_json_or_as_python_writes_them(word, value):
    assert read_value(word) == value and type(read_value(word)) is type(value)


def test_an_option_that_is_empty_by_default_may_be_given_so(place):
    result = run([*CASES["mine --targets absent"][:-2], "--fields", ""])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("env", [{}, {"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_torchrun_without_its_variables(place, env):
    environment = {"RANK": None, "WORLD_SIZE": None} | {"TORCHELASTIC_RUN_ID": "a"} | env
    result = run(CASES["mine --targets absent"][:-2], environment)
    assert result.exit_code == 1 and "RANK" in result.output and "Traceback" not in result.output


@pytest.mark.promise("Commands", "`--debug` shows where an error comes from")
@pytest.mark.parametrize("where", ["first", "last"])
def test_debug_shows_where_an_error_comes_from(place, where):
    wrong = CASES["attribute model wrong_nets:raises"]
    result = run(["--debug", *wrong] if where == "first" else [*wrong, "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.output and "ZeroDivisionError: of the user's own" in result.output
    assert result.output.strip().splitlines()[-1].startswith("Error: wrong_nets:raises() raised an error")


@pytest.mark.promise("Commands", "`crp check MODEL` ends with exit status 1 where something does not hold")
def test_an_explanation_is_checked(place):
    words = ["check", "wrong_nets:net", "--image", "picture.png"]
    result = run(words)
    assert result.exit_code == 0 and result.output.count("ok     ") == 5, result.output
    assert json.loads(run([*words, "--json", "--composite", "epsilon_plus"]).output)["holds"] is True
    with pytest.warns(UserWarning, match="as by random numbers"):
        result = run(["check", "wrong_nets:random", "--image", "picture.png"])
    assert result.exit_code == 1 and "FAILED repeats" in result.output


@pytest.mark.promise("Commands", "`--json` is there where machines read")
def test_machines_read_json(place):
    good = ["attribute", "picture.png", "--model", "wrong_nets:net", "--out", "out.png", "--json"]
    found = json.loads(run(good).output)
    assert found["predicted"]["class"] == found["explained"]["class"] and Path(found["out"]).exists()
    rows = json.loads(run(["methods", "--json", "--family", "cam"]).output)
    assert {row["family"] for row in rows} == {"cam"} and all(row["paper"] for row in rows)
    mined = ["mine", "--model", "wrong_nets:net", "--data", "wrong_nets:rows", "--layers", "0", "--out", "mined"]
    for command in ([*mined, "--quiet"], ["merge", "mined"], ["status", "mined"]):
        found = json.loads(run([*command, "--json"]).output)
        assert found["complete"] and found["n_samples"] == 6 and found["layers"] == {"0": 4}
    page = json.loads(run(["report", "mined", "--concepts", "1", "--quiet", "--json"]).output)["page"]
    assert Path(page).exists()


@pytest.mark.promise("Commands", "SIGTERM and SIGHUP end a command as Ctrl-C does")
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_termination_is_an_interrupt(place, name):
    slow = "import time, wrong_nets\nclass Slow(wrong_nets.Rows):\n    def __getitem__(self, i):\n"
    slow += "        open('began', 'w').close(); time.sleep(0.5); return super().__getitem__(i)\n"
    Path("slow_nets.py").write_text(slow)
    words = ["--model", "wrong_nets:net", "--data", "slow_nets:Slow", "--layers", "0", "--out", "new", "--quiet"]
    process = forked(main, ["crp", "mine", *words], Path("told"))
    end = time.monotonic() + 60
    while not Path("began").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process, getattr(signal, name))
    status, told = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), Path("told").read_text()
    assert status == 130, told
    assert "Interrupted" in told and "Traceback" not in told
