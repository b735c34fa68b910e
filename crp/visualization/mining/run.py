"""Mining: one pass over a dataset that records how relevant and active every concept was on every sample.

The work is cut into shards, each a job that needs nothing but its range (`mine_shard`), so that an interrupted run goes
on where it was. Who mines them (this process, one of several processes, or the workers of a Dask cluster) does not
matter: what a shard holds depends on its range alone. Processes share a folder, and nothing else: no messages, no
collectives.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import Concept
from crp.errors import InputError
from crp.kinds import as_path
from crp.notices import warn
from crp.visualization.mining.batches import mine_ranges
from crp.visualization.mining.datasets import SampleError as SampleError
from crp.visualization.mining.identity import check_dataset
from crp.visualization.mining.job import Job, MiningKeywords, prepare
from crp.visualization.table.files import make_folder, make_own_folder, write_atomic
from crp.visualization.table.fingerprint import fingerprint_dataset
from crp.visualization.table.lock import TableLockedError, locked
from crp.visualization.table.manifest import ShardRecord
from crp.visualization.table.shards import check_shard
from crp.visualization.table.store import Table
from crp.wording import counted

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Seconds that a merge waits for another one.
PATIENCE = 120.0
#: How often a Dask worker tries a shard that failed.
RETRIES = 3

Ranges = Sequence[tuple[int, int]]


def mine(
    attribution: CondAttribution,
    dataset: Any,
    layer_map: Mapping[str, Concept],
    composite: Composite | None,
    path: str | Path,
    *,
    start: int = 0,
    stop: int | None = None,
    part: tuple[int, int] | None = None,
    client: Any = None,
    **options: Unpack[MiningKeywords],
) -> Table:
    """Mine a range of a dataset into a folder; what the folder holds already is not computed again.

    Parameters
    ----------
    attribution : CondAttribution
    dataset : Dataset
        Gives pairs (tensor of shape (channels, *space), label) by index, and has a length;
        `crp.visualization.Pairs` makes such a dataset of others. Of a DataLoader, its dataset is mined, in the
        dataset's order.
    layer_map : dict of str to Concept
        What to record.
    composite : zennit.core.Composite, optional
        One of ours or of zennit's; None is the plain gradient.
    path : str or Path
        Folder of the table; made if need be.
    start, stop : int
        Range of dataset indices; to the end of the dataset by default.
    part : (int, int), optional
        Of ``(i, n)``, mine only the shards of process i out of n, counted from 0. All write into the same folder, at
        the same time if need be, and each merges what there is in the end.
    client : distributed.Client, optional
        Mine by the workers of a Dask cluster, which must see the same folder.
    **options
        As the attributes of `crp.visualization.mining.job.MiningOptions`, such as ``batch_size=64``.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is wrong; before anything is written.
    TableMismatchError
        If the folder holds a table of another model, composite, dataset, ...; the message says of what.
    TableLockedError
        If another run writes into the folder.
    SampleError
        If a sample cannot be mined, unless it is to be skipped. The shards before it are kept.
    """
    job = prepare(attribution, dataset, layer_map, composite, path, **options)
    n = job.header.n_samples
    stop = n if stop is None else stop
    if not (type(start) is int and type(stop) is int and 0 <= start < stop <= n):
        raise InputError(f"the range {start} to {stop} must be within the dataset, 0 to {n}, and not empty")
    if part is None:
        return _mine_all(job, start, stop, client)
    if not (isinstance(part, Sequence) and [type(i) for i in part] == [int, int] and 0 <= part[0] < part[1]):
        raise InputError(f"part must be (i, n) with i from 0 to n - 1, not {part!r}")
    if job.options.overwrite or client is not None:
        raise InputError("part shares the folder with other processes: it goes with neither overwrite nor client")
    return _mine_part(job, start, stop, part)


def mine_shard(job: Job, start: int, stop: int) -> list[ShardRecord]:
    """Mine a range into files of the job's folder, without touching its manifest.

    It can run anywhere, any number of times and beside others; `Table.add` of what it returns, or `Table.adopt` of what
    it wrote, makes it count.

    Parameters
    ----------
    job : Job
        From `crp.visualization.mining.job.prepare`.
    start, stop : int

    Returns
    -------
    list of ShardRecord
        One, or several where a file was full before.
    """
    return list(mine_ranges(job, [(start, stop)]))


def _mine_all(job: Job, start: int, stop: int, client: Any = None) -> Table:
    """Mine the missing samples of a range, here or by a Dask ``client``'s workers; the folder is locked meanwhile."""
    make_folder(job.path)
    with locked(job.path):
        if job.options.overwrite or (Table.exists(job.path) and Table.open(job.path).is_empty):
            Table.discard(job.path)
        job, table = _opened(job, start, stop)
        table.clean()
        _tell_damaged(table.drop_damaged())
        table.adopt()
        before, todo = table.coverage(start, stop), _to_mine(job, table, start, stop)
        write = mine_ranges if client is None else partial(_mine_on_dask, client)
        try:
            with _bar(job, todo, start, stop) as bar:
                for record in write(job, todo, bar.update):
                    table.add(record)
        except BaseException:
            with suppress(OSError):  # a shard may be whole and not yet listed
                table.adopt()
            raise
    skipped = table.coverage(start, stop).skipped
    if new := [i for i in skipped if i not in before.skipped]:
        first = f"sample {new[0]}: {skipped[new[0]]}"
        warn(f"{counted(len(new), 'sample was', 'samples were')} skipped ({first}); see Table.coverage().skipped")
    return table


def _mine_part(job: Job, start: int, stop: int, part: tuple[int, int]) -> Table:
    """Mine the shards of one process out of several, then merge what all have written until then.

    A process that is started again goes on where it was. The last one to end leaves the whole table.
    """
    number, n = part
    make_folder(job.path)
    with locked(job.path, "part"):
        with _turn(job.path):
            job, table = _opened(job, start, stop)
        problems = table.problems(shard for shard in table.shards if shard.start // job.shard_size % n == number)
        _tell_damaged(problems.values())
        sound = [shard for shard in table.shards if shard.file not in problems]
        listed = Table(table.path, table.header, [*sound, *table.unlisted()])
        todo = _to_mine(job, listed, start, stop)
        units = [unit for unit in _split(todo, job.shard_size) if unit[0] // job.shard_size % n == number]
        own = [unit for unit in _split([(start, stop)], job.shard_size) if unit[0] // job.shard_size % n == number]
        with _bar(job, units, 0, sum(b - a for a, b in own)) as bar:
            for _ in mine_ranges(job, units, bar.update):
                pass
    return merge(job.path)


def merge(path: str | Path, *others: str | Path) -> Table:
    """Take all shards of a folder, and of others, into one table.

    Parameters
    ----------
    path : str or Path
        A table's folder; it is made, if there are others.
    *others : str or Path
        Folders of the same table, on other disks for example. They are copied from and left as they are.

    Returns
    -------
    Table
        Whether it is whole is told by `Table.coverage`.

    Raises
    ------
    TableNotFoundError
        If there is no table.
    TableMismatchError
        If tables are of different models, composites, datasets, ...
    TableCorruptError
        If a shard is damaged.
    TableLockedError
        If a run writes into the folder.
    """
    path = as_path("path", path)
    sources = [Table.open(other) for other in others]
    if sources and not Table.exists(path):
        make_folder(path)
        with _turn(path):
            Table.create(path, sources[0].header)
    known = Table.open(path)
    for source in sources:
        known.check_header(source.header)
    with _turn(path):
        table = Table.open(path)
        make_own_folder(path / "shards")
        for source in sources:
            for shard in [*source.shards, *source.unlisted()]:
                if table.problems([shard]):  # (it is not there, or damaged)
                    check_shard(source.path / "shards", shard)
                    write_atomic(path / "shards" / shard.file, (source.path / "shards" / shard.file).read_bytes())
        table.adopt()
    return table


def _opened(job: Job, start: int, stop: int) -> tuple[Job, Table]:
    """Table in the job's folder, made if there is none, and the job under the table's own header.

    Where the dataset has grown since the table was made, the table grows, too; and where a command finds data or model
    elsewhere than it says, it says so from then on.
    """
    if not Table.exists(job.path):
        return job, Table.create(job.path, job.header)
    table, here = Table.open(job.path), job.header
    if table.header.version == 1:
        given = job.options.fingerprints or {}
        print_1 = given.get("dataset") or fingerprint_dataset(job.dataset)
        table.check_header(replace(here, fingerprints=dict(here.fingerprints) | {"dataset": print_1}))
        if table.coverage(start, stop).missing:
            table.check_writable()
        return replace(job, header=table.header), table
    compared = dict(here.fingerprints)
    by_samples = bool(table.header.probes and here.probes)
    n = min(here.n_samples, table.n_samples)
    if by_samples:
        compared["dataset"], n = table.fingerprints["dataset"], table.n_samples
    table.check_header(replace(here, fingerprints=compared, n_samples=n))
    if by_samples:
        check_dataset(table, job.dataset, here.probes)
    n, command, recipe = max(here.n_samples, table.n_samples), here.recipe.get("command"), table.header.recipe
    if command is not None and command != recipe.get("command"):
        recipe = here.recipe
    if (n, recipe) != (table.n_samples, table.header.recipe):
        table.restate(n, recipe)
    return replace(job, header=table.header), table


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold the folder for a merge, once the merges of other processes are done."""
    end = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path, "merge"))
                break
            except TableLockedError as error:
                if error.role != "merge" or time.monotonic() > end:
                    raise
            time.sleep(
                random.SystemRandom().uniform(0.01, 0.2)
            )  # (random, or two processes that wait for each other would collide again)
        yield


def _tell_damaged(problems: Iterable[str]) -> None:
    for problem in problems:
        warn(f"{problem.partition(';')[0]}; its samples are mined again")


def _to_mine(job: Job, table: Table, start: int, stop: int) -> list[tuple[int, int]]:
    """Ranges that are missing, and on demand those of shards with skipped samples."""
    skipping = [shard for shard in table.shards if any(start <= i < stop for i in shard.skipped)]
    again = [(shard.start, shard.stop) for shard in skipping if job.options.retry_skipped]
    return sorted(table.coverage(start, stop).missing + again)


def _split(ranges: Ranges, size: int) -> Iterator[tuple[int, int]]:
    """Ranges cut at the multiples of ``size``."""
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            yield start, end
            start = end


def _bar(job: Job, todo: Ranges, start: int, stop: int) -> Any:
    n = sum(b - a for a, b in todo)
    done = max(stop - start - n, 0)
    hidden = not (job.options.progress and n)
    return tqdm(desc="Mining", total=n + done, initial=done, unit="sample", disable=hidden, dynamic_ncols=True)


def _mine_on_dask(client: Any, job: Job, ranges: Ranges, progress: Callable[[int], object]) -> Iterator[ShardRecord]:
    """Records of ranges that the workers of a Dask cluster mine; they may come and go."""
    from distributed import as_completed
    from distributed.protocol import pickle

    job = replace(job, path=job.path.resolve())
    # The job is sent once, as a task: if the worker that holds it is lost, Dask computes it again elsewhere.
    carried = client.submit(pickle.loads, pickle.dumps(job), pure=False)
    units = list(_split(ranges, job.shard_size))
    futures = {
        client.submit(mine_shard, carried, start, stop, pure=False, retries=RETRIES): stop - start
        for start, stop in units
    }
    try:
        for future, records in as_completed(list(futures), with_results=True):
            for record in records:
                check_shard(job.path / "shards", record)  # (fails if the worker wrote into another folder)
                yield record
            progress(futures.pop(future))
            future.release()
    finally:
        client.cancel(list(futures))
