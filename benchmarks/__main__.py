"""``python -m benchmarks``: measure, and print what was asked for beside what was measured; see README.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch

from benchmarks import report
from benchmarks.harness import measure
from benchmarks.remote import Worker
from benchmarks.sections import SECTIONS, default


@click.command()
@click.argument("sections", nargs=-1, type=click.Choice(list(SECTIONS)), metavar="[SECTION ...]")
@click.option("--peers", type=click.Path(exists=True, dir_okay=False), help="Interpreter of the peers' environment.")
@click.option("--quick", is_flag=True, help="A quarter of the rounds, and no more cases than need be.")
@click.option("--json", "record", type=click.Path(path_type=Path), help="Read, add to and write this file.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables; what is by hand there is kept.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--list", "listed", is_flag=True, help="Say which sections there are.")
def main(
    sections: tuple[str, ...],
    peers: str | None,
    quick: bool,
    record: Path | None,
    markdown: Path | None,
    device: str,
    listed: bool,
) -> None:
    """Measure sections, by default all of the device's."""
    if listed:
        for name, section in SECTIONS.items():
            click.echo(f"{name:14} {section.TITLE}")
        return
    names = sections or default(device)
    with TemporaryDirectory() as folder:
        record = record or Path(folder) / "figures.json"
        if len(names) == 1:
            measure_section(names[0], peers, quick, report.Record(record))
        else:
            options = ["--device", device, *(["--peers", peers] if peers else []), *(["--quick"] if quick else [])]
            for name in names:  # in a process of its own: what the allocator has been through changes times by 10 %
                subprocess.run([sys.executable, "-m", "benchmarks", name, "--json", record, *options], check=True)
        if markdown is not None:
            report.Record(record).write_markdown(markdown)


def measure_section(name: str, peers: str | None, quick: bool, kept: report.Record) -> None:
    """Measure one section, print its table, and add it to what is kept."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    section = SECTIONS[name]
    click.echo(f"\n{name}: {section.TITLE}")
    with Worker(peers) if peers else nullcontext() as worker:
        about = report.environment(worker.versions() if worker else {})
        rows = []
        for case in section.cases():
            if quick and case.thorough:
                continue
            click.echo(f"  {case.name} …", err=True)
            rows += measure(case, worker, quick)
    if rows:
        kept.sections[name] = report.Section(section.TITLE, about, rows)
        kept.save()
        for line in report.lines(rows):
            click.echo(line)
    click.echo(f"({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
