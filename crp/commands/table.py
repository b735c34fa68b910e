"""``crp status`` and ``crp merge``: what a mined table holds, and parts of one put together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crp.commands.errors import CommandError

if TYPE_CHECKING:
    from crp.visualization.table.store import Table

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
#: How many ranges, and skipped samples, are listed.
_LISTED = 20
#: How many shards tell the rate.
_RATED = 32


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option("--verify", is_flag=True, help="Read every shard, and compare it with the manifest.")
def status(folder: Path, verify: bool) -> None:
    """Tell what a table holds, what it misses, and whether it is sound.

    The exit status is 0 for a table that is whole and sound, and 1 otherwise.
    """
    from crp.visualization.table.lock import get_owners
    from crp.visualization.table.manifest import TableError
    from crp.visualization.table.store import Table

    try:
        table = Table.open(folder)
        waiting = table.unlisted()
    except (TableError, OSError) as error:
        raise CommandError(_plain(str(error))) from error
    coverage = table.coverage()
    click.echo(f"{_plain(str(folder))}: {_describe(table)}")
    click.echo(f"recorded   {' and '.join(table.modes)}, {' and '.join(table.kinds)}, of {len(table.layers)} layers:")
    click.echo(_plain("           " + ", ".join(table.layers)))
    click.echo(f"size       {_size(table):.1f} MB in {len(table.shards)} shards")
    for start, stop in coverage.missing[:_LISTED]:
        click.echo(f"missing    {start} to {stop - 1}")
    if len(coverage.missing) > _LISTED:
        click.echo(f"missing    and {len(coverage.missing) - _LISTED} more ranges")
    for index, reason in list(coverage.skipped.items())[:_LISTED]:
        click.echo(_plain(f"skipped    {index}: {reason}"))
    if len(coverage.skipped) > _LISTED:
        click.echo(f"skipped    and {len(coverage.skipped) - _LISTED} more samples")
    left = sum(stop - start for start, stop in coverage.missing)
    if left and (rate := _rate(table)):
        click.echo(f"rate       {rate:.3g} samples/s; {left / rate / 60:.1f} min left at that")
    if waiting:
        click.echo(f"unmerged   {len(waiting)} shards; crp merge {_plain(str(folder))} takes them in")
    for owner in get_owners(folder):
        click.echo(_plain(f"written by process {owner.get('pid')} on {owner.get('host')} ({owner.get('role', 'run')})"))
    problems = table.verify() if verify else []
    for problem in problems:
        click.echo(_plain(f"damaged    {problem}"))
    if verify and not problems:
        click.echo("integrity  every shard is as it was written")
    if problems or coverage.missing:
        raise SystemExit(1)


@click.command("merge")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("others", nargs=-1, type=_FOLDER)
def merge_command(folder: Path, others: tuple[Path, ...]) -> None:
    """Take what several processes have mined into one table.

    FOLDER is where they have written; OTHERS, if any, are more folders of the same table, which are copied from.
    The exit status is 1 if samples are missing.
    """
    from crp.visualization.mining.run import merge
    from crp.visualization.table.manifest import TableError

    try:
        table = merge(folder, *others)
    except (TableError, OSError) as error:
        raise CommandError(_plain(str(error))) from error
    click.echo(f"{_plain(str(folder))}: {_describe(table)}")
    if table.coverage().missing:
        raise SystemExit(1)


def _describe(table: Table) -> str:
    """What a table holds of its dataset, in a line."""
    coverage = table.coverage()
    missing = sum(stop - start for start, stop in coverage.missing)
    seen = table.n_samples - missing - len(coverage.skipped)
    state = f"incomplete: {missing} samples are missing" if missing else "complete"
    skipped = f", {len(coverage.skipped)} skipped" if coverage.skipped else ""
    return f"{seen} of {table.n_samples} samples{skipped}, {sum(shard.rows for shard in table.shards)} rows; {state}"


def _plain(text: str) -> str:
    """Text without control characters, which a table from elsewhere may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _size(table: Table) -> float:
    files = (table.path / "shards" / shard.file for shard in table.shards)
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def _rate(table: Table) -> float:
    """Samples per second between the last shards; 0 if that cannot be told.

    By the times of the files, as no file that counts may depend on when it was written. Only the last ones, as a run
    that was interrupted, or whose folder was copied, goes on at its own rate.
    """
    times = []
    for shard in table.shards:
        file = table.path / "shards" / shard.file
        if file.is_file():
            times.append((file.stat().st_mtime, shard.stop - shard.start))
    times = sorted(times)[-_RATED:]
    seconds = times[-1][0] - times[0][0] if len(times) > 1 else 0.0
    if seconds <= 0 or times[-1][0] > time.time() + 1:
        return 0.0
    return sum(n for _, n in times[1:]) / seconds
