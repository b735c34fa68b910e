"""``crp status`` and ``crp merge``: what a mined table holds, and parts of one put together."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crp.commands.loading import FOLDER
from crp.commands.values import _plain
from crp.wording import counted

if TYPE_CHECKING:
    from crp.visualization.table.store import Table

#: How many ranges, and skipped samples, are listed.
_LISTED = 20
#: How many shards tell the rate.
_RATED = 32


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--verify", is_flag=True, help="Read every shard, and compare it with the manifest.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def status(folder: Path, verify: bool, as_json: bool) -> None:
    """Tell what a table holds and misses, and whether it is sound.

    The exit status is 0 for a table that is whole and sound, and 1 otherwise.
    """
    from crp.visualization.table.lock import get_owners
    from crp.visualization.table.store import Table

    table = Table.open(folder)
    waiting = table.unlisted()
    coverage = table.coverage()
    files = [table.path / "shards" / shard.file for shard in table.shards]
    gone = [f"{file} is gone; mine again with the same arguments to redo it" for file in files if not file.is_file()]
    problems = table.verify() if verify else gone
    if as_json:
        click.echo(json.dumps(_facts(table, len(waiting), problems if verify or gone else None)))
        if problems or coverage.missing:
            raise SystemExit(1)
        return
    click.echo(f"{_plain(str(folder))}: {_describe(table)}")
    for line in _recipe_lines(table):
        click.echo(_plain(line))
    layers = counted(len(table.layers), "layer")
    click.echo(f"recorded   {' and '.join(table.modes)}, {' and '.join(table.kinds)}, of {layers}:")
    click.echo(_plain("           " + ", ".join(table.layers)))
    click.echo(f"size       {_size(table):.1f} MB in {counted(len(table.shards), 'shard')}")
    _list("missing", [f"{start} to {stop - 1}" for start, stop in coverage.missing], "ranges")
    _list("skipped", [f"{index}: {reason}" for index, reason in coverage.skipped.items()], "samples")
    left = sum(stop - start for start, stop in coverage.missing)
    if left and (rate := _rate(table)):
        click.echo(f"rate       {rate:.3g} samples/s; {left / rate / 60:.1f} min left at that")
    if waiting:
        click.echo(f"unmerged   {counted(len(waiting), 'shard')}; crp merge {_plain(str(folder))} takes in all")
    for owner in get_owners(folder):
        click.echo(_plain(f"written by process {owner.get('pid')} on {owner.get('host')} ({owner.get('role', 'run')})"))
    for words in _kept(table):
        click.echo(_plain(f"kept       {words}"))
    for problem in problems:
        click.echo(_plain(f"damaged    {problem}"))
    if verify and not problems:
        click.echo("integrity  every shard is as it was written")
    if problems or coverage.missing:
        raise SystemExit(1)


@click.command("merge")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("others", nargs=-1, type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="For machines: what crp status --json tells.")
def merge_command(folder: Path, others: tuple[Path, ...], as_json: bool) -> None:
    """Take what several processes have mined into one table.

    FOLDER is where they have written; OTHERS, if any, are more folders of the same table, which are copied from.
    The exit status is 1 if samples are missing.
    """
    from crp.visualization.mining.run import merge

    table = merge(folder, *others)
    click.echo(json.dumps(_facts(table)) if as_json else f"{_plain(str(folder))}: {_describe(table)}")
    if table.coverage().missing:
        raise SystemExit(1)


def _describe(table: Table) -> str:
    """What a table holds of its dataset, in a line."""
    coverage = table.coverage()
    missing = sum(stop - start for start, stop in coverage.missing)
    seen = table.n_samples - missing - len(coverage.skipped)
    state = f"incomplete: {counted(missing, 'sample is missing', 'samples are missing')}" if missing else "complete"
    skipped = f", {len(coverage.skipped)} skipped" if coverage.skipped else ""
    of, rows = counted(table.n_samples, "sample"), counted(sum(shard.rows for shard in table.shards), "row")
    return f"{seen} of {of}{skipped}, {rows}; {state}"


def _facts(table: Table, n_unmerged: int = 0, problems: list[str] | None = None) -> dict[str, Any]:
    """What ``--json`` tells."""
    coverage = table.coverage()
    return {
        "folder": str(table.path),
        "version": table.header.version,
        "recipe": dict(table.header.recipe),
        "layers": {layer: next((s.concepts[layer] for s in table.shards if s.rows), None) for layer in table.layers},
        "modes": table.modes,
        "kinds": table.kinds,
        "storage": table.header.storage,
        "n_samples": table.n_samples,
        "n_rows": sum(shard.rows for shard in table.shards),
        "n_shards": len(table.shards),
        "megabytes": _size(table),
        "complete": not coverage.missing,
        "seen": coverage.seen,
        "missing": coverage.missing,
        "skipped": {str(index): reason for index, reason in coverage.skipped.items()},
        "unmerged": n_unmerged,
        "kept": _kept(table),
        "damaged": problems,
        "fingerprints": dict(table.fingerprints),
        "versions": dict(table.versions),
    }


def _kept(table: Table) -> list[str]:
    """Results that are kept beside a table, and whether they are of it as it is."""
    from crp.visualization.table.derived import list_kept
    from crp.visualization.table.manifest import TableCorruptError

    try:
        found = list_kept(table)
    except TableCorruptError as error:
        return [str(error)]
    return [one.name + ("" if one.digest == table.digest else ", of an earlier state of the table") for one in found]


def _recipe_lines(table: Table) -> Iterator[str]:
    """What was mined, in words; nothing of what the table does not say."""
    from crp.visualization.table.recipe import tell_part

    if not (recipe := table.header.recipe):
        return
    for part in ("model", "dataset"):
        if told := tell_part(recipe, part):
            yield f"{part:10} {told}"
    texts = recipe.get("texts")
    if isinstance(texts, dict):
        about = texts.get("tokenizer")
        named = "none"
        if isinstance(about, dict):
            named = f"{about.get('named') or about.get('class')}, {about.get('words')} words"
        yield f"texts      tokenizer {named}; position {texts.get('position')}"
    composite = tell_part(recipe, "composite") if recipe.get("composite") else "none, the plain gradient"
    yield f"composite  {composite}"
    if output := tell_part(recipe, "output"):
        yield f"output     {output}"
    yield f"targets    {recipe.get('targets')}; preprocessing: {recipe.get('preprocess') or 'none'}"


def _list(title: str, rows: Sequence[str], kind: str) -> None:
    """Print the first rows under a title, and how many more there are."""
    more = [f"and {len(rows) - _LISTED} more {kind}"] if len(rows) > _LISTED else []
    for row in [*rows[:_LISTED], *more]:
        click.echo(_plain(f"{title:<11}{row}"))


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
        if (file := table.path / "shards" / shard.file).is_file():
            times.append((file.stat().st_mtime, shard.stop - shard.start))
    times = sorted(times)[-_RATED:]
    seconds = times[-1][0] - times[0][0] if len(times) > 1 else 0.0
    if seconds <= 0 or times[-1][0] > time.time() + 1:
        return 0.0
    return sum(n for _, n in times[1:]) / seconds
