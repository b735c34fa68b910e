"""The mined table: how relevant and how active every concept was on every sample, in shards beside a manifest.

One row per (sample, target). For every layer and mode a row holds the sum and the maximum over each concept's
positions, the position of the maximum, and the sums of absolute values that norm them. ``manifest.json`` says what was
mined (fingerprints of model, composite, dataset, ...) and lists the shards with their sha256; ``derived/`` holds cached
queries, which may be deleted, and results such as prototypes (`crp.visualization.table.derived`). A shard counts from
the moment the manifest lists it, and each (sample, target) counts once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.flags import check_flags
from crp.layers import LayerNotFoundError
from crp.visualization.table.columns import SampleColumns, _class_number, join_columns, read_columns, sample_numbers
from crp.visualization.table.document import decode, encode
from crp.visualization.table.files import _as_folder, check_file, check_folder, make_own_folder, read_file, write_atomic
from crp.visualization.table.lock import TableLockedError as TableLockedError
from crp.visualization.table.manifest import (
    DERIVED,
    KEPT,
    NAME,
    VERSION,
    Array,
    Block,
    Coverage,
    RowIds,
    ShardRecord,
    TableCorruptError,
    TableHeader,
    TableMismatchError,
    TableNotFoundError,
    get_coverage,
)
from crp.visualization.table.manifest import TableError as TableError
from crp.visualization.table.recipe import _tell_changes, _tell_others
from crp.visualization.table.shards import check_shard, count_rows, read_blocks, read_record, read_rows

#: What to do about a table of something else.
ELSEWHERE = "use another folder, or mine with overwrite=True (--overwrite) to discard it"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


class Table:
    """A mined table on disk; `crp.visualization.mining.run.mine` makes one, `open` reads one.

    Attributes
    ----------
    path : Path
    header : TableHeader
    shards : list of ShardRecord
        In the order of their ranges.
    """

    def __init__(self, path: str | Path, header: TableHeader, shards: Iterable[ShardRecord] = ()) -> None:
        self.path = Path(path)
        self.header = header
        self.shards = sorted(shards, key=_order)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a folder holds a table, or something in the place of its manifest."""
        return os.path.lexists(_as_folder(path) / "manifest.json")

    @classmethod
    def open(cls, path: str | Path | Table) -> Table:
        """Table in a folder; one that is open is given back as it is.

        Raises
        ------
        TableNotFoundError
            If nothing was mined there.
        TableCorruptError
            If the manifest is damaged, or lists files that no shard has.
        TypeError
            If it is no path.
        """
        if isinstance(path, Table):
            return path
        manifest = _as_folder(path) / "manifest.json"
        try:
            text = read_file(manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise TableNotFoundError(f"nothing was mined into {path}: it has no manifest.json") from None
        check_folder(Path(path) / "shards")
        return cls(path, *decode(text, manifest))

    @classmethod
    def create(cls, path: str | Path, header: TableHeader) -> Table:
        """Table without shards in a folder, which is made."""
        table = cls(path, header)
        make_own_folder(table.path / "shards")
        table._save()
        return table

    @property
    def is_empty(self) -> bool:
        """Whether nothing was mined into the folder yet."""
        return not self.shards and not any((self.path / "shards").glob("*.safetensors"))

    @staticmethod
    def discard(path: str | Path) -> None:
        """Delete the table in a folder, if there is one, and nothing else."""
        manifest = _as_folder(path) / "manifest.json"
        if manifest.is_dir() and not manifest.is_symlink():
            check_file(manifest)
        manifest.unlink(missing_ok=True)
        for folder, names in ((Path(path) / "shards", (NAME,)), (Path(path) / "derived", (DERIVED, KEPT))):
            for file in folder.glob("*.safetensors"):
                if any(name.fullmatch(file.name) for name in names) and not folder.is_symlink():
                    file.unlink()

    def __repr__(self) -> str:
        return f"Table({str(self.path)!r}, {len(self.layers)} layers, {len(self.shards)} shards)"

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers, in the order of the model."""
        return self.header.layers

    @property
    def modes(self) -> tuple[str, ...]:
        """What was recorded of ``"relevance"`` and ``"activation"``."""
        return self.header.modes

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was recorded of ``"sum"`` and ``"max"``."""
        return self.header.kinds

    @property
    def n_samples(self) -> int:
        """Length of the dataset."""
        return self.header.n_samples

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints of what was mined."""
        return self.header.fingerprints

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries it was mined with."""
        return self.header.versions

    @property
    def digest(self) -> str:
        """Hash of the whole content; equal for tables of equal content."""
        return hashlib.sha256("".join([self.header.identity, *(s.sha256 for s in self.shards)]).encode()).hexdigest()

    @property
    def n_rows(self) -> int:
        """Number of (sample, target) rows."""
        return count_rows(self.path / "shards", self.shards)

    def n_concepts(self, layer: str) -> int:
        """Number of concepts of a layer.

        Raises
        ------
        KeyError
            If the layer was not mined; the message names the nearest that were.
        ValueError
            If the table has no rows yet.
        """
        if not isinstance(layer, str) or layer not in self.layers:
            raise LayerNotFoundError(layer, self.layers, where=f"the table in {self.path}")
        for shard in self.shards:
            if layer in shard.concepts:
                return shard.concepts[layer]
        raise InputError(f"the table in {self.path} has no rows: no sample was mined that has a target")

    def check(self, recipe: Mapping[str, Any] | None = None, /, **fingerprints: str) -> None:
        """Raise a `TableMismatchError` that names which of the given fingerprints differ from the table's."""
        if differ := [key for key, value in fingerprints.items() if self.fingerprints.get(key) != value]:
            details = _tell_changes(differ, (self.header.recipe, self.fingerprints), (recipe or {}, fingerprints))
            versions = ", ".join(f"{key} {version}" for key, version in self.versions.items())
            what = f"{_tell_others(differ)} ({details}; mined with {versions})"
            raise TableMismatchError(f"the table in {self.path} was mined with {what}; {ELSEWHERE}")

    def check_header(self, header: TableHeader) -> None:
        """Raise a `TableMismatchError` that names what differs, unless rows of ``header`` belong into this table."""
        self.check(header.recipe, **dict.fromkeys(self.fingerprints, "none") | dict(header.fingerprints))
        for name in ("n_samples", "layers", "modes", "kinds", "storage"):
            there, here = getattr(self.header, name), getattr(header, name)
            if there != here:
                raise TableMismatchError(
                    f"the table in {self.path} was mined with {name} = {there}, not {here}; {ELSEWHERE}"
                )

    def coverage(self, start: int = 0, stop: int | None = None) -> Coverage:
        """Which samples of a range were mined, skipped and missed; of the whole dataset by default."""
        return get_coverage(self.shards, start, self.n_samples if stop is None else stop)

    def rows(self) -> RowIds:
        """Sample and target of every row, in the order of `blocks`."""
        return read_rows(self.path / "shards", self.shards)

    def samples(self) -> SampleColumns:
        """Where each sample with rows comes from, its label, and the model's prediction for it."""
        return join_columns(list(self.sample_columns()))

    def sample_columns(self) -> Iterator[SampleColumns]:
        """The same, shard by shard."""
        return read_columns(self.path / "shards", self.shards)

    def blocks(
        self,
        layer: str,
        mode: str = "relevance",
        target: str = "sum",
        normed: bool = False,
        *,
        concepts: int | Sequence[int] | None = None,
        of_class: int | None = None,
        samples: Iterable[int] | None = None,
    ) -> Iterator[Block]:
        """Values of a layer, some rows at a time.

        Parameters
        ----------
        layer : str
        mode : {"relevance", "activation"}
        target : {"sum", "max"}
            Sum over a concept's positions, or the largest value among them.
        normed : bool
            Divide by the sum over all concepts of the row's absolute values.
        concepts : int or sequence of int, optional
            All by default, in their order.
        of_class : int, optional
            Only rows of this target.
        samples : iterable of int, optional
            Only rows of these samples.

        Yields
        ------
        Block
            Of at most 32 MiB of values; rows ascend in (sample, target) within a shard.

        Raises
        ------
        KeyError, ValueError, IndexError, TypeError
            If the layer, the mode, the kind or a concept was not mined, there is no such sample, or a number is none.
        """
        check_flags(normed=normed)
        for name, given, there in (("mode", mode, self.modes), ("kind", target, self.kinds)):
            if not isinstance(given, str) or given not in there:
                raise InputError(f"{name} {given!r} was not mined into {self.path}, which has {', '.join(there)}")
        columns = None if concepts is None else self.concept_ids(layer, concepts)
        self.n_concepts(layer)
        wanted = None if samples is None else sample_numbers(samples, self.n_samples)
        asked = layer, mode, target, normed, columns, _class_number(of_class), wanted
        return read_blocks(self.path / "shards", self.shards, *asked)

    def column(
        self, layer: str, concept: int, mode: str = "relevance", target: str = "sum", normed: bool = False
    ) -> Block:
        """All values of one concept, as a `Block` of arrays of shape (rows,).

        Parameters and errors are those of `blocks`; also a ValueError if the table has no rows.
        """
        found = list(self.blocks(layer, mode, target, normed, concepts=[concept]))
        if not found:
            raise InputError(f"the table in {self.path} has no rows")
        sample, ids, value, position = (np.concatenate(part) for part in zip(*found, strict=True))
        return Block(sample, ids, value[:, 0], position[:, 0])

    def verify(self) -> list[str]:
        """Check every shard against the manifest, byte by byte; returns what is wrong, nothing if all is well.

        Where the recipe tells how many outputs the model has, targets are compared with that number.
        """
        problems = self.problems(again=True)
        model = self.header.recipe.get("model")
        outputs = model.get("outputs") if isinstance(model, Mapping) else None
        if not isinstance(outputs, int):
            return list(problems.values())
        for shard in self.shards:
            if shard.file not in problems:
                target = read_rows(self.path / "shards", [shard]).target
                if len(target) and int(target.max()) >= outputs:
                    what = f"rows of target {target.max()}, and the model {outputs} outputs"
                    problems[shard.file] = f"{self.path / 'shards' / shard.file} has {what}"
        return list(problems.values())

    def damaged(self) -> list[str]:
        """What is wrong with shards; those that this process has read or written are only asked for size and time."""
        return list(self.problems().values())

    def problems(self, shards: Iterable[ShardRecord] | None = None, *, again: bool = False) -> dict[str, str]:
        """What is wrong with some or all shards, by their files; ``again`` reads those that were read, too."""
        check_flags(again=again)
        problems = {}
        for shard in self.shards if shards is None else shards:
            try:
                check_shard(self.path / "shards", shard, again=again)
            except TableCorruptError as error:
                problems[shard.file] = str(error)
        return problems

    def add(self, shard: ShardRecord) -> None:
        """Commit a shard that `write_shard` wrote; it replaces one of the same range."""
        for layer, n in shard.concepts.items():
            known = next((s.concepts[layer] for s in self.shards if layer in s.concepts), n)
            if known != n:
                span = f"samples {shard.start} to {shard.stop - 1}"
                raise InputError(f"{span} give {n} concepts for layer {layer!r}, earlier ones {known}")
        replaced = [s for s in self.shards if (s.start, s.stop) == (shard.start, shard.stop)]
        self._change([s for s in self.shards if s not in replaced] + [shard])
        for old in replaced:
            if old.file != shard.file:
                (self.path / "shards" / old.file).unlink(missing_ok=True)

    def restate(self, n_samples: int, recipe: Mapping[str, Any]) -> None:
        """Take in that the dataset has become longer, whose new samples are missing then, or other words for it all."""
        self.check_writable()
        self.header = replace(self.header, n_samples=n_samples, recipe=recipe)
        self._save()

    def check_writable(self) -> None:
        """Raise a `TableError` if the table is of an earlier version, to which nothing is added."""
        if self.header.version != VERSION:
            raise TableError(
                f"the table in {self.path} is of version {self.header.version}, which is read and not added to; "
                "mine into another folder"
            )

    def adopt(self) -> int:
        """Commit the shards in the folder that belong to this table and that the manifest does not list yet.

        This is how a table takes in what a run that was killed, or that had no access to the manifest, has written.

        Returns
        -------
        int
            How many.
        """
        if new := self.unlisted():
            self._change([*self.shards, *new])
        return len(new)

    def unlisted(self) -> list[ShardRecord]:
        """Shards in the folder that belong to this table and that the manifest does not list; nothing is changed."""
        known = {shard.file for shard in self.shards}
        files = sorted((self.path / "shards").glob("*.safetensors"))
        found = [read_record(file, self.header.identity) for file in files if file.name not in known]
        ranges = {(shard.start, shard.stop) for shard in self.shards}
        new = {(r.start, r.stop): r for r in reversed(found) if r is not None and (r.start, r.stop) not in ranges}
        return sorted(new.values(), key=_order)

    def drop_damaged(self) -> list[str]:
        """Forget shards whose files are missing or damaged, so that their samples count as missing; returns why."""
        if problems := self.problems():
            self._change([shard for shard in self.shards if shard.file not in problems])
        return list(problems.values())

    def clean(self) -> None:
        """Delete temporary files of writes that were interrupted."""
        for folder in (self.path, self.path / "shards", self.path / "derived"):
            for file in folder.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(file.name):
                    file.unlink(missing_ok=True)

    def concept_ids(self, layer: str, concepts: int | Sequence[int]) -> Array:
        """Concepts of a layer as an array of non-negative numbers; an `IndexError` names one that is not there."""
        n, given = self.n_concepts(layer), np.atleast_1d(np.asarray(concepts))
        if given.size and (given.dtype.kind not in "iu" or given.ndim > 1):
            raise InputTypeError(f"layer {layer!r}: concept ids must be integers, not {concepts!r}")
        for i in (ids := given.astype(np.int64))[(ids < -n) | (ids >= n)][:1]:
            raise OutOfRangeError(f"layer {layer!r} has {n} concepts, 0 to {n - 1}; there is no concept {i}")
        return ids % n

    def _change(self, shards: Iterable[ShardRecord]) -> None:
        self.check_writable()
        before, self.shards = self.shards, sorted(shards, key=_order)
        try:
            self._save()
        except BaseException:
            self.shards = before
            raise
        for file in (self.path / "derived").glob("*.safetensors"):  # cached answers to the table before the change
            if DERIVED.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _save(self) -> None:
        write_atomic(self.path / "manifest.json", encode(self.header, self.shards))


def _order(shard: ShardRecord) -> tuple[int, int, str]:
    return shard.start, shard.stop, shard.file
