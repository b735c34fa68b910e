"""Script: mine all digits, killed at random moments and at chosen writes, and compare the folders; reports as JSON.

One process imports everything once and forks the runs that are killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.visualization.mining import mine


def run(path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)).eval()
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    data = [(image, int(label)) for image, label in zip(images, digits.target, strict=True)]
    layer_map = {"1": ChannelConcept(), "4": ChannelConcept()}
    mine(CondAttribution(net), data, layer_map, EpsilonPlus(), path, batch_size=64, shard_size=128, progress=False)


def start(path: Path, kill_at: int | None = None) -> int:
    """Fork a run; it kills itself at its ``kill_at``-th step of writing."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if kill_at is not None:
            count = 0

            def counted(original):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **kwargs)

                return call

            os.write, os.fsync, Path.replace = counted(os.write), counted(os.fsync), counted(Path.replace)
        run(path)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def finish(pid: int) -> int:
    """Wait for a run: 0, 1 after an exception, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digest(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main(folder: Path) -> dict[str, object]:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    assert finish(start(folder / "reference")) == 0
    duration = time.perf_counter() - begin
    reference = digest(folder / "reference")

    random.seed(0)
    outcomes = []
    for trial in range(2):
        path = folder / f"random{trial}"
        for _ in range(3):
            pid = start(path)
            time.sleep(random.uniform(0.05, 0.8) * duration)
            os.kill(pid, signal.SIGKILL)
            outcomes.append(finish(pid))
        outcomes.append(finish(start(path)))
        assert outcomes[-1] == 0 and digest(path) == reference, f"trial {trial} differs"
    path = folder / "writes"
    for kill_at in (1, 6, 8, 9, 10, 11, 12, 13):
        outcomes.append(finish(start(path, kill_at)))
    outcomes.append(finish(start(path)))
    assert outcomes[-1] == 0 and digest(path) == reference, "killed while writing: differs"
    return {"kills": outcomes.count(-9), "failed": outcomes.count(1)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
