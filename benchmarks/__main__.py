"""``python -m benchmarks``: measure, and print what was asked for beside what was measured; see README.md."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

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
    torch.set_num_threads(1)
    kept = report.Record(record)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(peers)) if peers else None
        about = report.environment(worker.versions() if worker else {})
        for name in sections or default(device):
            start = time.perf_counter()
            click.echo(f"\n{name}: {SECTIONS[name].TITLE}")
            rows = []
            for case in SECTIONS[name].cases():
                if quick and case.thorough:
                    continue
                click.echo(f"  {case.name} …", err=True)
                rows += measure(case, worker, quick)
            if rows:
                kept.sections[name] = report.Section(SECTIONS[name].TITLE, about, rows)
                kept.save()
                for line in report.lines(rows):
                    click.echo(line)
            click.echo(f"({time.perf_counter() - start:.0f} s)")
    if markdown is not None:
        kept.write_markdown(markdown)


if __name__ == "__main__":
    main()
