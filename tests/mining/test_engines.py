"""Whoever mines the shards, in whatever order and how often, the table is the same in every byte."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mining_cases import Data, files_of, make_net, run, shards_of

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.visualization import FeatureVisualization
from crp.visualization.mining import run as engines
from crp.visualization.mining.job import prepare
from crp.visualization.mining.run import merge, mine_shard
from crp.visualization.table.lock import locked
from crp.visualization.table.store import Table, TableLockedError, TableMismatchError, TableNotFoundError


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of an uninterrupted run in one process, over six shards."""
    path = tmp_path_factory.mktemp("reference")
    run(path, Data(21), shard_size=4)
    return files_of(path)


def part(path: Path, number: int, n: int, **changes: Any) -> Table:
    return run(path, changes.pop("data", Data(21)), shard_size=4, part=(number, n), **changes)


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0], [1, 0], [2, 0, 1, 0], [3, 3, 1, 0, 2]])
def test_parts_in_any_order_and_twice_make_the_same_table(
    tmp_path: Path, order: list[int], reference: dict[str, bytes]
) -> None:
    for i, number in enumerate(order):
        table = part(tmp_path, number, max(order) + 1)
        assert bool(table.coverage().missing) == (set(order[: i + 1]) != set(order))
    assert files_of(tmp_path) == reference


def test_a_part_mines_its_shards_only_and_goes_on_where_it_was(tmp_path: Path, reference: dict[str, bytes]) -> None:
    prints = {"dataset": Table.open(path_of(reference, tmp_path / "reference")).fingerprints["dataset"]}
    data = Data(21)
    data.special = {10: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        part(tmp_path / "a", 0, 2, data=data, fingerprints=prints)
    assert [f.name[:3] for f in (tmp_path / "a" / "shards").iterdir()] == ["0-4"]
    data.special = {}
    data.read.clear()
    table = part(tmp_path / "a", 0, 2, data=data, fingerprints=prints)
    assert data.read == [0, *range(8, 12), *range(16, 20)]
    assert table.coverage().missing == [(4, 8), (12, 16), (20, 21)]
    data.read.clear()
    part(tmp_path / "a", 0, 2, data=data, fingerprints=prints)
    assert data.read == [0]
    whole = run(tmp_path / "a", data, shard_size=4, fingerprints=prints)  # and a run does what parts have left
    assert data.read[-10:] == [0, *range(4, 8), *range(12, 16), 20]
    assert shards_of(files_of(whole.path)) == shards_of(reference)


def path_of(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_damaged_shard_of_a_part_is_mined_again(tmp_path: Path, reference: dict[str, bytes]) -> None:
    path = path_of(reference, tmp_path)
    first, second = sorted(path.glob("shards/*"))[:2]  # 0-4 and 12-16
    for file in (first, second):
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.warns(UserWarning, match=rf"{first.name} is damaged.*mined again"):
        part(path, 0, 2)
    assert first.read_bytes() == reference[f"shards/{first.name}"]
    assert second.read_bytes() != reference[f"shards/{second.name}"]


def fork(path: Path, number: int, n: int, seconds: float = 0) -> int:
    """Process that mines a part, and takes its time over every sample."""
    pid = os.fork()
    if pid:
        return pid
    with suppress(BaseException):
        data = Data(21)
        read = Data.__getitem__
        Data.__getitem__ = lambda self, index: (time.sleep(seconds), read(self, index))[1]  # type: ignore[method-assign]
        part(path, number, n, data=data)
        os._exit(0)
    os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes by fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("n", [2, 4])
def test_processes_at_the_same_time_of_which_one_is_killed(tmp_path: Path, n: int, reference: dict[str, bytes]) -> None:
    pids = [fork(tmp_path, number, n, 0.03) for number in range(n)]
    while not list(tmp_path.glob("shards/*.safetensors")):
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, -9, *[0] * (n - 2)]
    table = Table.open(tmp_path)
    assert {start // 4 % n for start, _ in table.coverage().missing} <= {1}
    assert os.waitstatus_to_exitcode(os.waitpid(fork(tmp_path, 1, n), 0)[1]) == 0
    Table.open(tmp_path).clean()
    assert files_of(tmp_path) == reference


def test_who_may_be_in_the_folder_with_whom(tmp_path: Path) -> None:
    part(tmp_path, 0, 2)
    with locked(tmp_path, "part"):
        part(tmp_path, 0, 2)
        with pytest.raises(TableLockedError, match=f"process {os.getpid()}"):
            run(tmp_path, Data(21), shard_size=4)
    with locked(tmp_path), pytest.raises(TableLockedError, match=f"process {os.getpid()}"):
        part(tmp_path, 1, 2)
    assert Table.open(tmp_path).unlisted() == []
    with locked(tmp_path, "merge"), locked(tmp_path, "part"):
        pass
    assert not list(tmp_path.glob("lock-*"))


def test_a_merge_waits_for_another_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part(tmp_path, 0, 2)
    monkeypatch.setattr(engines, "PATIENCE", 0.2)
    begin = time.monotonic()
    with locked(tmp_path, "merge"), pytest.raises(TableLockedError):
        merge(tmp_path)
    assert time.monotonic() - begin >= 0.2
    monkeypatch.setattr(engines, "PATIENCE", 60)
    with locked(tmp_path), pytest.raises(TableLockedError):  # a run: at once
        merge(tmp_path)
    assert time.monotonic() - begin < 30


def test_folders_are_merged(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for number in (0, 1):
        part(tmp_path / str(number), number, 2)
    table = merge(tmp_path / "all", tmp_path / "1", tmp_path / "0")
    assert files_of(table.path) == reference
    half = files_of(tmp_path / "1")
    merge(tmp_path / "0", tmp_path / "1")
    assert files_of(tmp_path / "0") == reference
    assert files_of(tmp_path / "1") == half
    other = run(tmp_path / "other", Data(21), attribution=CondAttribution(make_net(5)), stop=4)
    with pytest.raises(TableMismatchError, match="another model"):
        merge(tmp_path / "all", other.path)
    with pytest.raises(TableNotFoundError, match="none"):
        merge(tmp_path / "new", tmp_path / "none")
    assert not (tmp_path / "new").exists()
    assert files_of(tmp_path / "all") == reference


def test_a_merge_replaces_what_is_damaged_by_what_is_sound(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for name in ("here", "there"):
        run(tmp_path / name, Data(), shard_size=8)
    file = tmp_path / "here" / "shards" / Table.open(tmp_path / "here").shards[1].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert merge(tmp_path / "here", tmp_path / "there").verify() == []
    assert file.read_bytes() == whole


def test_bad_parts_are_refused(tmp_path: Path) -> None:
    for wrong in ((2, 2), (-1, 2), (0, 0), (0.0, 2), (0,)):
        with pytest.raises(ValueError, match=r"part must be \(i, n\)"):
            run(tmp_path / "a", Data(), part=wrong)
    with pytest.raises(ValueError, match="neither overwrite nor client"):
        run(tmp_path / "a", Data(), part=(0, 2), overwrite=True)
    assert not (tmp_path / "a").exists()


# --- Dask -----------------------------------------------------------------------------------------------------------


class Slow(Data):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.03)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore")  # of a cluster that loses a worker
def test_dask_workers_of_which_one_is_killed(tmp_path: Path, reference: dict[str, bytes]) -> None:
    distributed = pytest.importorskip("distributed")
    prints = {"dataset": Table.open(path_of(reference, tmp_path / "reference")).fingerprints["dataset"]}
    options = {"dashboard_address": None, "processes": True, "threads_per_worker": 2}
    with distributed.LocalCluster(n_workers=2, **options) as cluster, distributed.Client(cluster) as client:
        workers = client.run(os.getpid)

        def kill(path: Path = tmp_path / "a" / "shards") -> None:
            while not list(path.glob("*.safetensors")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

        fate = client.submit(kill, workers=[next(iter(workers))], retries=0, pure=False)
        table = run(tmp_path / "a", Slow(21), shard_size=4, client=client, fingerprints=prints)
        fate.cancel()
        assert set(workers.values()) != set(client.run(os.getpid).values())
    assert table.coverage().missing == []
    table.clean()
    assert shards_of(files_of(tmp_path / "a")) == shards_of(reference)


def test_mine_shard_is_what_all_engines_call(tmp_path: Path, reference: dict[str, bytes]) -> None:
    layer_map = {layer: ChannelConcept() for layer in ("conv", "relu", "fc")}
    from crp.composites import EpsilonPlus

    job = prepare(CondAttribution(make_net()), Data(21), layer_map, EpsilonPlus(), tmp_path, batch_size=4, shard_size=4)
    Table.create(tmp_path, job.header)
    for start in (20, 4, 16, 0, 8, 12, 4):
        mine_shard(job, start, min(start + 4, 21))
    merge(tmp_path)
    assert files_of(tmp_path) == reference


def test_feature_visualization_takes_the_same_options(tmp_path: Path) -> None:
    attribution, data = CondAttribution(make_net()), Data(12)
    layer_map = {"relu": ChannelConcept()}
    options: dict[str, Any] = {
        "batch_size": 2,
        "checkpoint": 2,
        "progress": False,
        "targets": "top-2",
        "kinds": ["sum"],
    }
    whole = FeatureVisualization(attribution, data, layer_map, path=tmp_path / "whole")
    whole.run(None, **options)
    shared = FeatureVisualization(attribution, data, layer_map, path=tmp_path / "shared")
    shared.run_distributed(None, **options, part=(1, 2))
    assert Table.open(tmp_path / "shared").coverage().missing == [(0, 4), (8, 12)]
    shared.run(None, **options, part=(0, 2))
    assert Table.open(tmp_path / "shared").n_rows == 24
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "whole")
    with pytest.raises(TypeError, match="no_option"):
        whole.run(None, no_option=1)
