"""Script: mine all digits, killed at random moments and at chosen writes, and compare the folders; reports as JSON.

    python kill_mining.py FOLDER KILLS [WRITES]

A run kills itself at a few steps of writing, in whatever thread; with WRITES, runs do at each of so many first ones.
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
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.visualization.mining.run import mine
from crp.visualization.table.store import Table

#: Steps of writing at which a run kills itself; of the lock, the manifest, and the first shards.
WRITES = (1, 6, 8, 9, 10, 11, 12, 13)
Part = tuple[int, int] | None


def run(path: Path, part: Part) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)).eval()
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    data = [(image, int(label)) for image, label in zip(images, digits.target, strict=True)]
    layer_map = {"1": ChannelConcept(), "4": ChannelConcept()}
    attribution, sizes = CondAttribution(net), {"batch_size": 32, "shard_size": 32}
    mine(attribution, data, layer_map, EpsilonPlus(), path, progress=False, part=part, **sizes)


def start(path: Path, part: Part = None, kill_at: int | None = None) -> int:
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
        run(path, part)
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


def survive(path: Path, seconds: float, share: bool, kills: int) -> tuple[int, int]:
    """Kill a run until it ends by itself, or ``kills`` times, and let it end; with ``share``, beside another part.

    Returns
    -------
    kills, kills within a write : int
    """
    killed = within = 0
    seen: set[Path] = set()
    part = (0, 2) if share else None
    beside = start(path, (1, 2)) if share else None
    code = -9
    while code == -9 and killed < kills:
        pid = start(path, part)
        time.sleep(random.uniform(0, 0.8 * seconds))
        os.kill(pid, signal.SIGKILL)
        code = finish(pid)
        left = set(path.rglob("*.tmp"))
        killed += code == -9
        within += code == -9 and not share and bool(left - seen)
        seen |= left
    assert code in (0, -9) and finish(start(path, part)) == 0, "a run failed"
    if beside is not None:
        assert finish(beside) == 0, "the part beside failed"
        Table.open(path).clean()
    return killed, within


def main(folder: Path, kills: int, at_writes: Sequence[Sequence[int]]) -> dict[str, object]:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    assert finish(start(folder / "reference")) == 0
    seconds = time.perf_counter() - begin
    reference = digest(folder / "reference")

    random.seed(0)
    killed = within = trials = 0
    while killed < kills:
        path = folder / f"random{trials}"
        found = survive(path, seconds, share=trials % 3 == 2, kills=kills - killed)
        assert digest(path) == reference, f"trial {trials} differs"
        killed, within, trials = killed + found[0], within + found[1], trials + 1

    for number, writes in enumerate(at_writes):
        path = folder / f"writes{number}"
        outcomes = [finish(start(path, kill_at=kill_at)) for kill_at in writes]
        assert outcomes == [-9] * len(writes), outcomes
        assert finish(start(path)) == 0 and digest(path) == reference, f"killed at {writes}: differs"

    rows = Table.open(path).rows().sample.tolist()
    assert rows == list(range(len(rows))) and len(rows) == Table.open(path).n_samples
    return {
        "kills": killed,
        "within a write": within,
        "trials": trials,
        "at writes": sum(map(len, at_writes)),
        "seconds": seconds,
    }


if __name__ == "__main__":
    folder, kills, *writes = sys.argv[1:]
    steps = [(step,) for step in range(1, 1 + int(writes[0]))] if writes else [WRITES]
    sys.stdout.write(json.dumps(main(Path(folder), int(kills), steps)))
