"""Files of every kind that are damaged at random places are refused, or the damage has no effect.

``CRP_DAMAGES=5000`` tries so many.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from table_maker import make_header, make_table

from crp.errors import CRPError
from crp.visualization.cache import ImageCache
from crp.visualization.table.derived import keep_result, list_kept, read_kept
from crp.visualization.table.lock import TableLockedError, locked
from crp.visualization.table.ranking import class_means, top_k
from crp.visualization.table.store import Table

N_DAMAGES = int(os.environ.get("CRP_DAMAGES", "200"))
ARRAYS = {"value": np.array([0.5, -2.0]), "centre": np.eye(2)}


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def moved(content: bytes, draw: random.Random) -> bytes:
    """A piece that stands in another place."""
    here, there = draw.randrange(len(content)), draw.randrange(len(content))
    return content[:there] + content[here : here + 16] + content[there + 16 :]


def longer(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.randint(1, 64))


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [flip, flip, flip, cut, moved, longer]


def answers(folder: Path) -> dict[str, Any]:
    """What a table, what was made of it, and what is kept beside it say."""
    table = Table.open(folder)
    problems = table.verify()
    if problems:
        raise CRPError(problems)
    best = top_k(table, "a", k=3)
    means = class_means(table, "b")
    kept = read_kept(table, "prototypes", "a")
    found: dict[str, Any] = {"n": table.n_rows, "kept": len(list_kept(table)), "about": repr(kept.settings)}
    for name, value in [("best", best), ("means", means), ("arrays", kept.arrays)]:
        found[name] = repr(value)
    return found


@pytest.mark.promise(
    "Tables",
    "Files of a table that were damaged are refused, or the damage has no effect; 200 random damages in the default "
    "run, 5,000 by `CRP_DAMAGES`",
)
def test_damaged_files_are_refused_or_without_effect(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", n_samples=30, ranges=((0, 12), (12, 30)))
    keep_result(table, "prototypes", "a", ARRAYS, {"normed": True})
    wanted = answers(table.path)
    files = sorted(file for file in table.path.rglob("*") if file.is_file())
    kinds = {file.parent.name if file.parent != table.path else file.name for file in files}
    assert {"manifest.json", "shards", "derived"} <= kinds
    draw, refused, wrong = random.Random(0), Counter[str](), []
    for number in range(N_DAMAGES):
        file, damage = draw.choice(files), draw.choice(DAMAGES)
        content = file.read_bytes()
        file.write_bytes(damage(content, draw))
        try:
            if (found := answers(table.path)) != wanted:
                wrong.append((number, file.name, damage.__name__, found))
        except CRPError:
            refused[file.suffix] += 1
        except Exception as error:
            wrong.append((number, file.name, damage.__name__, repr(error)))
        file.write_bytes(content)
    assert wrong == []
    assert sum(refused.values()) > 0.8 * N_DAMAGES
    assert answers(table.path) == wanted


def test_damaged_pictures_of_a_cache_are_no_pictures(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))]
    asked = ("a", "relevance", (0, 1), None, False, "get_max_reference", "crop_and_mask_images")
    ImageCache(tmp_path).save({0: pictures}, *asked)
    (file,) = tmp_path.rglob("*.png")
    assert np.array_equal(np.asarray(ImageCache(tmp_path).load([0], *asked)[0][0][0]), np.asarray(pictures[0]))
    content, draw, wrong = file.read_bytes(), random.Random(1), []
    for number in range(N_DAMAGES // 4):
        file.write_bytes(draw.choice(DAMAGES)(content, draw))
        try:
            found, _ = ImageCache(tmp_path).load([0], *asked)
        except Exception as error:
            wrong.append((number, repr(error)))
            continue
        if 0 in found and np.asarray(found[0][0]).tolist() != np.asarray(pictures[0]).tolist():
            wrong.append((number, "another picture"))
        file.write_bytes(content)
    assert wrong == []


def _begin(folder: Path, start: Any, n_rounds: int, told: Any) -> None:
    """Runs that begin in new folders, each at the same instant as those of other processes."""
    for number in range(n_rounds):
        place = folder / str(number)
        start.wait(60)
        place.mkdir(exist_ok=True)
        try:
            with locked(place):
                table = Table.open(place) if (place / "manifest.json").exists() else Table.create(place, make_header())
                table.clean()
                told.put((number, "held"))
        except TableLockedError:
            told.put((number, "refused"))
        except BaseException as error:
            told.put((number, repr(error)))


@pytest.mark.promise("Tables", "Of runs that begin at once in one folder at most one goes on, and the others say so")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_runs_that_begin_in_a_new_folder_at_once(tmp_path: Path) -> None:
    context, n_processes, n_rounds = multiprocessing.get_context("fork"), 4, 40
    start, told = context.Barrier(n_processes), context.Queue()
    runs = [context.Process(target=_begin, args=(tmp_path, start, n_rounds, told)) for _ in range(n_processes)]
    for run in runs:
        run.start()
    found = [told.get(timeout=60) for _ in range(n_processes * n_rounds)]
    for run in runs:
        run.join(60)
    assert {what for _, what in found} <= {"held", "refused"}
    assert {file.name for number in range(n_rounds) for file in (tmp_path / str(number)).glob("lock*")} == set()
