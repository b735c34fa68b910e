"""The command line, run inside the test's own process, and a table that it has mined."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from crp.commands.cli import cli

MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
"""


def crp(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def forked(command: Callable[[], None], words: Sequence[str], errors: Path) -> int:
    """Id of a process that runs a command, with its errors in a file; it is a fork, so that it need not import torch.

    It hears of all signals, also where the tests run in the background or under nohup, which ignore some.
    """
    process = os.fork()
    if process:
        return process
    try:
        for number, how in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGHUP, signal.SIG_DFL),
        ):
            signal.signal(number, how)
        with errors.open("w") as sys.stderr:
            sys.argv = list(words)
            command()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        os._exit(1)


def place_with_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> Path:
    """Make a folder the working folder, with a module that commands may import by this name."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def write_pictures(folder: Path, n: int, classes: Sequence[str], size: int) -> None:
    """Pictures of noise, in a folder for each class."""
    for i in range(n):
        of_class = folder / classes[i % len(classes)]
        of_class.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(of_class / f"{i}.png")


def mine_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = 8, targets: str = "label") -> Path:
    """Folder of a table of ``n`` pictures of cats and dogs, mined by the command with the model ``nets:net``."""
    (folder / "nets.py").write_text(MODULE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    write_pictures(folder / "pictures", n, ("cats", "dogs"), 8)
    options = ["--model", "nets:net", "--data", "pictures", "--layers", "0", "--composite", "epsilon_plus", "--quiet"]
    given = [*options, "--mean", "0.5", "--std", "0.25", "--targets", targets, "--out", "atlas"]
    result = crp("mine", *given)
    assert result.exit_code == 0, result.output
    return folder / "atlas"
