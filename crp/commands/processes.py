"""Where a command computes: its share of the work, its device, and a cluster's workers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crp.commands.errors import CommandError


def _part(share: str | None, environment: Any, option: str = "--shard") -> tuple[int, int] | None:
    """Share of this process: that of the option, cut further among the processes of torchrun."""
    number, n = 0, 1
    if share is not None:
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", share)
        if found is None or int(found[1]) >= int(found[2]):
            raise CommandError(f"{option} {share} must be I/N with I from 0 to N - 1, such as 0/8")
        number, n = int(found[1]), int(found[2])
    if "TORCHELASTIC_RUN_ID" in environment:
        try:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        except (KeyError, ValueError) as error:
            raise CommandError(
                f"TORCHELASTIC_RUN_ID is set, as by torchrun, but RANK and WORLD_SIZE are no numbers ({error}); start "
                "by torchrun, or unset TORCHELASTIC_RUN_ID"
            ) from error
        if not 0 <= rank < size:
            raise CommandError(f"RANK={rank} must be from 0 to WORLD_SIZE - 1 = {size - 1}")
        return number * size + rank, n * size
    return None if share is None else (number, n)


def _device(name: str | None) -> str:
    import torch

    if name:
        from crp.engine.door import check_device

        return str(check_device(name, "--device"))
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


@contextmanager
def _client(address: str | None) -> Iterator[Any]:
    if address is None:
        return (yield None)
    try:
        from distributed import Client
    except ImportError as error:
        raise CommandError(f'--dask needs Dask ({error}): python -m pip install "concept-relevance[dask]"') from error
    with Client(address) as client:
        yield client
