"""``python -m benchmarks``: measure, and print what was asked for beside what was measured; see README.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch

from benchmarks import report
from benchmarks.harness import measure, not_measured
from benchmarks.remote import Worker
from benchmarks.sections import ON_CUDA, SECTIONS, default, gpu


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
    if others := [name for name in sections if device == "cuda" and name not in ON_CUDA]:
        raise click.UsageError(f"{', '.join(others)} are measured on the CPU only; leave out --device cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda needs a GPU, and torch finds none")
    names = sections or default(device)
    failed: list[str] = []
    with TemporaryDirectory() as folder:
        record = record or Path(folder) / "figures.json"
        if len(names) == 1:
            failed = measure_section(names[0], peers, quick, device, report.Record(record), markdown)
        else:
            options = ["--device", device, *(["--peers", peers] if peers else []), *(["--quick"] if quick else [])]
            for name in names:  # in a process of its own: what the allocator has been through changes times by 10 %
                subprocess.run([sys.executable, "-m", "benchmarks", name, "--json", record, *options], check=True)
        if markdown is not None:
            report.Record(record).write_markdown(markdown)
    if failed:
        raise click.ClickException("not measured: " + "; ".join(failed))


def measure_section(
    name: str, peers: str | None, quick: bool, device: str, kept: report.Record, page: Path | None = None
) -> list[str]:
    """Measure one section, print its table, and add it to what is kept; gives the cases that failed, and why."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    section = SECTIONS[name]
    click.echo(f"\n{name}: {section.TITLE}")
    with Worker(peers) if peers else nullcontext() as worker:
        about = report.environment(worker.versions() if worker else {}, device)
        rows, failed = [], []
        for case in gpu.cases(device) if name in ON_CUDA else section.cases():
            if quick and case.thorough:
                continue
            click.echo(f"  {case.name} …", err=True)
            torch.cuda.empty_cache()  # (what the last case held is for the peers, too)
            try:
                rows += measure(case, worker, quick)
            except Exception as error:
                failed.append(f"{case.name}: {type(error).__name__}: {error}")
                click.echo("".join(traceback.format_exception(error, limit=-3)), err=True)
                rows += not_measured(case, type(error).__name__)
            kept.add(name, report.Section(section.TITLE, about, rows))
            kept.save()  # (so that what was measured outlasts a time limit)
            if page is not None:
                kept.write_markdown(page)
    for line in report.lines(rows) if rows else ():
        click.echo(line)
    click.echo(f"({time.perf_counter() - start:.0f} s)")
    return failed


if __name__ == "__main__":
    main()
