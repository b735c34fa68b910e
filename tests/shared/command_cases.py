"""The command line, run inside the test's own process, and a table that it has mined."""

from __future__ import annotations

import sys
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


def mine_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = 8, targets: str = "label") -> Path:
    """Folder of a table of ``n`` pictures of cats and dogs, mined by the command with the model ``nets:net``."""
    (folder / "nets.py").write_text(MODULE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    for i in range(n):
        of_class = folder / "pictures" / ("cats", "dogs")[i % 2]
        of_class.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(of_class / f"{i}.png")
    options = ["--model", "nets:net", "--data", "pictures", "--layers", "0", "--composite", "epsilon_plus", "--quiet"]
    given = [*options, "--mean", "0.5", "--std", "0.25", "--targets", targets, "--out", "atlas"]
    result = crp("mine", *given)
    assert result.exit_code == 0, result.output
    return folder / "atlas"
