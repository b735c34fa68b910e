"""The text of ``manifest.json``: what was mined and which shards there are, with a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crp.errors import InputError
from crp.visualization.table.manifest import VERSION, ShardRecord, TableCorruptError, TableHeader

#: What the manifest of each version says, beside its version and its shards.
_FIELDS = {1: {"n_samples", "layers", "modes", "kinds", "fingerprints", "versions"}}
_FIELDS[2] = _FIELDS[1] | {"storage", "probes", "recipe"}


def encode(header: TableHeader, shards: Sequence[ShardRecord]) -> bytes:
    """Manifest of version 2, with a line for each shard."""
    content = {"version": header.version, **{name: getattr(header, name) for name in sorted(_FIELDS[header.version])}}
    listed = [shard.to_json() for shard in shards]
    checksum = get_checksum(content | {"shards": listed})
    head = json.dumps({"version": header.version, "checksum": checksum} | content, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(shard) for shard in listed)
    return f'{head},\n "shards": [\n{lines}\n ]\n}}\n'.encode()


def decode(text: bytes, source: Path) -> tuple[TableHeader, list[ShardRecord]]:
    """Header and shards of a manifest that was read from ``source``, checked: it may come from anywhere.

    Raises
    ------
    TableCorruptError
        If it is damaged, of another version, or lists what cannot be.
    """
    try:
        content = json.loads(text, parse_constant=_refuse)
        version = content.pop("version")
        if type(version) is not int or version not in _FIELDS:
            raise TableCorruptError(
                f"{source} is of version {version!r}; this version of crp reads {' and '.join(map(str, _FIELDS))}"
            )
        if version > 1 and content.pop("checksum", None) != get_checksum({"version": version} | content):
            raise TableCorruptError(f"{source} is damaged: its checksum is not that of its content")
        listed = content.pop("shards")
        if set(content) != _FIELDS[version]:
            raise InputError(f"it has the fields {', '.join(sorted(content))}")
        content |= {key: tuple(content[key]) for key in ("layers", "modes", "kinds")}
        header = TableHeader(**content, version=version)
        shards = [ShardRecord.from_json(entry, source) for entry in listed]
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, TableCorruptError):
            raise
        raise TableCorruptError(f"{source} is damaged, or no manifest of a table: {error!r}") from error
    _check(header, shards, source)
    return header, shards


def get_checksum(content: dict[str, Any]) -> str:
    """Hash of a manifest's content, however it is laid out; not of its checksum."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"crp {VERSION} {plain}".encode()).hexdigest()


def _check(header: TableHeader, shards: Sequence[ShardRecord], source: Path) -> None:
    ranges: set[tuple[int, int]] = set()
    concepts: dict[str, int] = {}
    for shard in shards:
        problem = ""
        if shard.stop > header.n_samples:
            problem = f"the data set has {header.n_samples} samples"
        elif (shard.start, shard.stop) in ranges:
            problem = "its range is listed twice"
        elif shard.rows and set(shard.concepts) != set(header.layers):
            problem = f"its layers are {', '.join(shard.concepts)}"
        elif any(concepts.setdefault(layer, n) != n for layer, n in shard.concepts.items()):
            problem = "earlier shards have other numbers of concepts"
        if problem:
            raise TableCorruptError(f"{source}: shard {shard.file} is not valid: {problem}")
        ranges.add((shard.start, shard.stop))


def _refuse(constant: str) -> None:
    raise InputError(f"{constant} is no number")
