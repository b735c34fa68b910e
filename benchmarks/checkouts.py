"""``python -m benchmarks.checkouts OLD [NEW]``: two checkouts of this repository against each other; see README.md.

``--numbers`` compares heatmaps and accounts in float64, net by net and preset by preset; ``--time`` what they cost. The
package is imported from the checkouts, each in a process of its own; nets, data and this program are those of the
checkout in which it is started.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click

from benchmarks import numbers, peer
from benchmarks.clocks import Run
from benchmarks.harness import PeerError, Spread, interleaved, ratio
from benchmarks.nets import Setup
from benchmarks.remote import ROOT, Worker

#: Runs a program with ``crp`` from another checkout, and all else from this one.
BOOT = "import sys; sys.path.insert(0, {checkout!r}); import crp; sys.path[0] = {root!r}; {program}"
SERVE = "from benchmarks import checkouts; checkouts.serve()"
DUMP = "from benchmarks import numbers; numbers.dump(*{})"
SETUPS = [
    *(Setup("demo", 32, 1), Setup("vgg16_bn", 64, 4), Setup("resnet18", 64, 8), Setup("mobilenet_v2", 224, 2)),
    *(Setup("efficientnet_b0", 224, 2), Setup("resnet50", 224, 2), Setup("densenet121", 224, 2)),
]
TIMED = ("EpsilonPlusFlat", "EpsilonGammaBox", "EpsilonAlpha2Beta1Flat")


def boot(checkout: Path, program: str) -> str:
    """Program that runs with ``crp`` from a checkout."""
    return BOOT.format(checkout=str(checkout.resolve()), root=str(ROOT), program=program)


def attribution(setup: Setup, preset: str) -> Run:
    """One attribution of a batch."""
    from benchmarks import ours  # (not at the top: it imports ``crp``, which the command itself does not need)

    return ours.attribution(*peer.built(setup), ours.composite(preset))


class Session(peer.Session):
    """As peers do it; garbage is collected before each run."""

    def answer(self, request: Any) -> Any:
        """Value that answers a request."""
        gc.collect()
        return super().answer(request)


def serve() -> None:
    """Answer requests to run an attribution once."""
    peer.serve(Session({"attribution": attribution}))


def measure(checkouts: dict[str, Path], patterns: Sequence[str], rounds: int) -> None:
    """Print the time of the new one ÷ the old one's, of each net and preset."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(sys.executable, boot(path, SERVE))) for name, path in checkouts.items()
        }
        click.echo(f"{'':24}{'':24}{'new ÷ old':>10}{'least':>8}{'most':>8}{'old, ms':>10}{'new, ms':>10}")
        for setup in (setup for setup in SETUPS if chosen(setup.net, patterns)):
            for preset in TIMED:
                repeat = 20 if setup.net == "demo" else 1
                request = {"candidate": "attribution", "setup": setup, "preset": preset, "repeat": repeat}
                costs, failed = interleaved(
                    {name: partial(worker.cost, request, "cpu") for name, worker in workers.items()}, rounds, 2
                )
                if failed:
                    raise PeerError(f"{setup}, {preset}: {failed}")
                found = ratio(costs, "new", "old")
                assert found is not None
                spent = "".join(f"{Spread.of(costs[name]).median * 1e3:10.2f}" for name in ("old", "new"))
                click.echo(f"{setup!s:24}{preset:24}{found.median:10.3f}{found.least:8.3f}{found.most:8.3f}{spent}")
            for worker in workers.values():
                worker.forget()


def chosen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns, or there are none."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


@click.command()
@click.argument("old", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--numbers", "what", flag_value="numbers", help="Compare heatmaps and accounts.")
@click.option("--time", "what", flag_value="time", help="Compare the time of an attribution.")
@click.option("--nets", multiple=True, help="Pattern of nets' names, as timm/*; may be given again.")
@click.option("--presets", multiple=True, help="Pattern of presets' names; may be given again.")
@click.option("--into", type=click.Path(path_type=Path), default="build/checkouts", help="Where numbers are kept.")
@click.option("--batch", default=2, show_default=True, help="Images.")
@click.option("--limit", "seconds", default=20.0, show_default=True, help="Seconds for a net and a preset.")
@click.option("--rounds", default=15, show_default=True)
def main(
    old: Path,
    new: Path | None,
    what: str | None,
    nets: tuple[str, ...],
    presets: tuple[str, ...],
    into: Path,
    batch: int,
    seconds: float,
    rounds: int,
) -> None:
    """Compare two checkouts; with OLD alone, only compute its numbers."""
    checkouts = {name: path for name, path in (("old", old), ("new", new)) if path is not None}
    if what is None or (what == "time" and len(checkouts) < 2):
        raise click.UsageError("say --numbers, or --time and two checkouts")
    if what == "time":
        measure(checkouts, nets, rounds)
        return
    names = [name for name in numbers.nets() if chosen(name, nets)]
    methods = [name for name in numbers.PRESETS if chosen(name, presets)]
    folders = [into.resolve() / numbers.fingerprint(path) for path in checkouts.values()]
    for path, folder in zip(checkouts.values(), folders, strict=True):
        if numbers.missing(folder, names, methods):
            program = DUMP.format((str(folder), names, methods, batch, seconds))
            subprocess.run([sys.executable, "-I", "-c", boot(path, program)], check=True)
    if len(folders) < 2:
        return
    rows = numbers.compare(folders, names, methods)
    for row in (numbers.HEAD, *rows):
        click.echo(row)
    equal, apart = sum(row.size == 0 for row in rows), sum(row.size > numbers.SAME for row in rows)
    click.echo(f"{len(rows)} rows: {equal} equal; {apart} apart by more than {numbers.SAME:g}, or refused by one only")


if __name__ == "__main__":
    main()
