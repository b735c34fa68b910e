"""Mining gives the same bytes whichever way it runs, within bounded memory, and however slow or full the disk is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from mining_cases import LAYERS, Data, files_of, run
from torchvision.transforms import Normalize

from crp.concepts import ChannelConcept
from crp.engine.kernel_calls import CallRecorder
from crp.engine.replay import Replays
from crp.engine.replayed import Replayed
from crp.visualization.mining import batches, rows, writing
from crp.visualization.mining.preparation import Preparation
from crp.visualization.mining.transfers import Transfers
from crp.visualization.table.manifest import ShardRecord
from crp.visualization.table.store import Table

N = 40
PREPROCESS = Normalize([0.5], [2.0])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*samples? (was|were) skipped"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


class Slow(Data):
    """Samples that take their time, each another; some cannot be mined."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(N)
        self.seconds = seconds
        self.images[6, 0, 2, 2] = torch.inf
        self.special = {9: OSError("no file"), 13: (torch.zeros(1, 7, 7, dtype=torch.float64), 0)}

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds * (index * 7 % 5))
        return super().__getitem__(index)


# --- the same bytes ---------------------------------------------------------------------------------------------------


class Ahead(Transfers):
    """Has three batches computed before it waits for the first, as on a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.batches_ahead = 3


class Inline:
    """Executor that does its work before it returns."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[[], ShardRecord]) -> Future[ShardRecord]:
        future: Future[ShardRecord] = Future()
        try:
            future.set_result(work())
        except OSError as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool) -> None:
        pass


def mine_into(path: Path, **options: Any) -> dict[str, bytes]:
    settings = {"shard_size": 8, "on_error": "skip", "preprocess": PREPROCESS} | options
    return files_of(run(path, settings.pop("data", None) or Slow(), **settings).path)


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(writing, "ThreadPoolExecutor", Inline)
    patch.setattr(Preparation, "batch", lambda self, samples: None)


def ahead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(batches, "Transfers", Ahead)


REPLAYED: list[Replays] = []


def replayed(patch: pytest.MonkeyPatch) -> None:
    class Kept(Replayed):
        def __init__(self, recorder: Any = None) -> None:
            super().__init__(CallRecorder(2, cost=0))
            REPLAYED.append(self.replays)

    patch.setattr("crp.attribution.Replayed", Kept)


def slow_disk(patch: pytest.MonkeyPatch) -> None:
    write = rows.write_shard

    def slow(*args: Any) -> ShardRecord:
        time.sleep(0.02 * (args[2] // 8 % 3))
        return write(*args)

    patch.setattr(rows, "write_shard", slow)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a run without a pipeline: sample after sample is prepared, and each shard written before the next."""
    with pytest.MonkeyPatch.context() as patch:
        one_by_one(patch)
        path = tmp_path_factory.mktemp("reference")
        files = mine_into(path)
    assert sorted(Table.open(path).coverage().skipped) == [6, 9, 13]
    return files


WAYS: dict[str, tuple[list[Callable[[pytest.MonkeyPatch], None]], dict[str, Any]]] = {
    "pipeline": ([], {}),
    "two workers": ([], {"num_workers": 2}),
    "batches ahead": ([ahead], {}),
    "replayed": ([replayed], {}),
    "slow loader": ([], {"data": Slow(0.002)}),
    "slow loader, workers": ([ahead], {"data": Slow(0.002), "num_workers": 2}),
    "slow disk": ([slow_disk, ahead], {}),
    "all": ([ahead, replayed, slow_disk], {"data": Slow(0.001), "num_workers": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes], way: str
) -> None:
    REPLAYED.clear()
    patches, options = WAYS[way]
    for patch in patches:
        patch(monkeypatch)
    assert mine_into(tmp_path, **options) == reference
    if replayed in patches:
        assert sum(each.replayed for each in REPLAYED) > 3


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_shards_that_are_full_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 4500)
    options: dict[str, Any] = {"shard_size": N, "storage": storage}
    with monkeypatch.context() as patch:
        one_by_one(patch)
        expected = mine_into(tmp_path / "reference", **options)
    slow_disk(monkeypatch)
    ahead(monkeypatch)
    assert mine_into(tmp_path / "pipeline", num_workers=2, **options) == expected
    assert len(expected) > 4


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_at", [0, 2, 5])
def test_a_full_disk_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
    write, layer_map = rows.write_shard, dict.fromkeys(LAYERS, ChannelConcept())

    def full(*args: Any) -> ShardRecord:
        if args[2] == 4 * full_at:
            raise OSError(28, "No space left on device")
        return write(*args)

    data = Data(N)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(rows, "write_shard", full)
        run(tmp_path / "run", data, shard_size=4, layer_map=layer_map)
    # Shards in the threads, the one that waits for them and the one that is filled: no more is computed in vain.
    # (The dataset is also read at a few places, to know it again.)
    loaded = sum(index in data.read for index in range(4 * (full_at + writing.THREADS + 2), N))
    assert loaded <= 8, data.read
    assert [shard.start for shard in Table.open(tmp_path / "run").shards][:full_at] == [4 * i for i in range(full_at)]
    run(tmp_path / "run", Data(N), shard_size=4, layer_map=layer_map)
    reference = run(tmp_path / "reference", Data(N), shard_size=4, layer_map=layer_map)
    assert files_of(tmp_path / "run") == files_of(reference.path)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_a_process() -> Iterator[Callable[..., Any]]:
    """Function that runs a script of this folder, and gives what it reports."""

    def start(script: str, *args: object) -> Any:
        file = Path(__file__).parent / script
        paths = [str(file.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(file), *map(str, args)]
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    yield start


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_memory_is_bounded(tmp_path: Path, in_a_process: Callable[..., Any]) -> None:
    report = in_a_process("mine_synthetic.py", tmp_path, 100_000)
    assert report["GB written"] > 15
    assert report["MiB"] * 2**20 <= 1e9


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_hundred_kills(tmp_path: Path, in_a_process: Callable[..., Any]) -> None:
    report = in_a_process("kill_mining.py", tmp_path, 100, 80)
    assert report["kills"] == 100 and report["at writes"] == 80


GROUP = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from mining_cases import Data, make_net, run
from crp.attribution import CondAttribution

torch.set_num_threads(1)
dist.init_process_group("gloo")
net = torch.nn.parallel.DistributedDataParallel(make_net())
part = dist.get_rank(), dist.get_world_size()
run(Path(sys.argv[1]), Data(21), attribution=CondAttribution(net), part=part, shard_size=4)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_of_a_group_have_pipelines_of_their_own(tmp_path: Path) -> None:
    """torchrun starts two processes that share a model by DistributedDataParallel; each mines its part."""
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    shared = Path(__file__).parents[1] / "shared"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(shared.parents[1]), str(shared)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    found = subprocess.run([*command, str(tmp_path / "table")], env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    reference = run(tmp_path / "reference", Data(21), shard_size=4)
    assert files_of(tmp_path / "table") == files_of(reference.path)
