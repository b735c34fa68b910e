from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from table_maker import Source, make_table

from crp.concepts import normalize
from crp.visualization.table import ranking, shards
from crp.visualization.table.manifest import ShardRecord
from crp.visualization.table.ranking import class_means, class_statistics, list_targets, top_k
from crp.visualization.table.store import Table

QUERIES = [
    (mode, kind, normed) for mode in ("relevance", "activation") for kind in ("sum", "max") for normed in (True, False)
]


def values_of(source: Source, layer: str, mode: str, kind: str, normed: bool) -> np.ndarray:
    value = source.columns[f"{mode}.{kind}/{layer}"]
    return normalize(torch.from_numpy(value)).numpy() if normed else value


def rank(source: Source, layer: str, mode: str, kind: str, normed: bool, k: int, keep: np.ndarray) -> list[list[tuple]]:
    """The definition: sort all candidates of each concept by (-value, sample, target)."""
    value, position = values_of(source, layer, mode, kind, normed), source.columns[f"{mode}.position/{layer}"]
    result = []
    for concept in range(value.shape[1]):
        candidates = [
            (-value[r, concept], source.sample[r], source.target[r], position[r, concept]) for r in np.flatnonzero(keep)
        ]
        if mode == "activation":
            firsts = {}
            for candidate in sorted(candidates, key=lambda c: (c[1], c[2])):
                firsts.setdefault(candidate[1], candidate)
            candidates = list(firsts.values())
        result.append([(c[1], -c[0], c[3], c[2]) for c in sorted(candidates)[:k]])
    return result


def as_rows(top: ranking.ReferenceSamples) -> list[list[tuple]]:
    return [list(zip(*(column[:, c] for column in top), strict=True)) for c in range(top.value.shape[1])]


@pytest.mark.parametrize(("mode", "kind", "normed"), QUERIES)
@pytest.mark.parametrize("k", [1, 7, 40, 1000])
def test_top_k_is_the_sorted_list(tmp_path: Path, mode: str, kind: str, normed: bool, k: int) -> None:
    table, source = make_table(tmp_path)
    everything = np.ones(len(source.sample), bool)
    assert as_rows(top_k(table, "b", mode, kind, normed, k)) == rank(source, "b", mode, kind, normed, k, everything)


@pytest.mark.parametrize("concepts", [None, [4, -5]], ids=["all", "some"])
@pytest.mark.parametrize("cache", [False, True], ids=["asked", "kept"])
def test_the_least_are_the_list_sorted_the_other_way(tmp_path: Path, concepts: list[int] | None, cache: bool) -> None:
    table, source = make_table(tmp_path)
    key = "relevance.sum/b"
    source.columns[key] = -source.columns[key]
    wanted = rank(source, "b", "relevance", "sum", True, 7, np.ones(len(source.sample), bool))
    wanted = [[(sample, -value, *rest) for sample, value, *rest in rows] for rows in wanted]
    for _ in range(2):
        found = as_rows(top_k(table, "b", k=7, concepts=concepts, least=True, cache=cache))
        assert found == (wanted if concepts is None else [wanted[4], wanted[0]])
        assert as_rows(top_k(table, "b", k=7, concepts=concepts, cache=cache)) != found


@pytest.mark.parametrize("mode", ["relevance", "activation"])
def test_top_k_of_a_class_some_samples_and_some_concepts(tmp_path: Path, mode: str) -> None:
    table, source = make_table(tmp_path)
    wanted = [3, 5, 8, 11, 14, 17, 50, 51, 53, 98]
    found = top_k(table, "a", mode, "max", False, 6, of_class=2, samples=wanted, concepts=[4, -5])
    expected = rank(source, "a", mode, "max", False, 6, (source.target == 2) & np.isin(source.sample, wanted))
    assert as_rows(found) == [expected[4], expected[0]]
    one = top_k(table, "a", mode, "max", False, 6, of_class=2, concepts=4)
    assert as_rows(one) == [rank(source, "a", mode, "max", False, 6, source.target == 2)[4]]
    assert top_k(table, "a", mode, samples=[0]).sample.shape == (0, 5)  # sample 0 has no targets
    assert top_k(table, "a", mode, samples=[]).sample.shape == (0, 5)
    for number in (-1, table.n_samples):
        with pytest.raises(IndexError, match=f"there is no sample {number}; the dataset has {table.n_samples}, 0 to "):
            top_k(table, "a", mode, samples=[3, number])
        with pytest.raises(IndexError, match=f"there is no sample {number}; "):
            table.blocks("a", mode, samples=[3, number])


def test_only_shards_that_may_hold_the_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, source = make_table(tmp_path, [(0, 40), (30, 60), (60, 80), (80, 100)])
    opened, open_shard = [], shards.open_shard

    def watched(folder: Path, shard: ShardRecord, *rest: bool) -> Any:
        opened.append((shard.start, shard.stop))
        return open_shard(folder, shard, *rest)

    monkeypatch.setattr(shards, "open_shard", watched)
    for samples, wanted in (([35], {(0, 40), (30, 60)}), ([59, 80], {(30, 60), (80, 100)}), ([], set())):
        opened.clear()
        found = [row for block in table.blocks("a", samples=samples) for row in block.sample.tolist()]
        assert set(opened) == wanted and found == source.sample[np.isin(source.sample, samples)].tolist()


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 100)],
        [(60, 100), (0, 20), (20, 60)],
        [(0, 100), (0, 50), (50, 100)],
        [(0, 60), (30, 100), (90, 95), (40, 41)],
        [(i, i + 10) for i in range(0, 100, 10)],
    ],
    ids=["one", "out of order", "twice", "overlapping", "many"],
)
def test_answers_do_not_depend_on_shards(tmp_path: Path, ranges: list[tuple[int, int]]) -> None:
    reference, _ = make_table(tmp_path / "reference")
    table, _ = make_table(tmp_path / "other", ranges)
    assert table.n_rows == reference.n_rows
    for mode, kind, normed in QUERIES:
        query = ("a", mode, kind, normed)
        for one, other in zip(top_k(table, *query), top_k(reference, *query), strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(class_means(table, *query), class_means(reference, *query), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
        for one, other in zip(
            class_statistics(table, "a", 1, *query[1:]), class_statistics(reference, "a", 1, *query[1:]), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_ties_with_samples_that_were_mined_later(tmp_path: Path) -> None:
    reference, source = make_table(tmp_path / "reference")
    table = Table.create(tmp_path / "table", reference.header)
    table.add(source.write(table, 0, 60, dict.fromkeys(range(2, 60, 3), "broken")))
    table.add(source.write(table, 1, 100))
    for query in QUERIES:
        assert as_rows(top_k(table, "a", *query)) == as_rows(top_k(reference, "a", *query))


def test_blocks_may_be_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = make_table(tmp_path)
    whole = [top_k(table, "a", mode) for mode in ("relevance", "activation")]
    monkeypatch.setattr("crp.visualization.table.shards._BLOCK_BYTES", 100)
    assert max(len(block.sample) for block in table.blocks("a")) <= 2
    for one, mode in zip(whole, ("relevance", "activation"), strict=True):
        assert as_rows(top_k(table, "a", mode)) == as_rows(one)


@pytest.mark.parametrize(("mode", "kind", "normed"), QUERIES)
@pytest.mark.parametrize("mean_n", [1, 10, 500])
@pytest.mark.parametrize("cache", [False, True])
def test_class_statistics(tmp_path: Path, mode: str, kind: str, normed: bool, mean_n: int, cache: bool) -> None:
    table, source = make_table(tmp_path)
    value = values_of(source, "a", mode, kind, normed)[:, 3]
    means = {t: np.sort(value[source.target == t])[::-1][:mean_n].mean(dtype=np.float64) for t in range(4)}
    found = class_statistics(table, "a", 3, mode, kind, normed, mean_n=mean_n, cache=cache)
    assert found.targets.tolist() == sorted(means, key=lambda t: (-means[t], t))
    np.testing.assert_allclose(found.value, [means[t] for t in found.targets], rtol=1e-6)


def test_equal_classes_in_order(tmp_path: Path) -> None:
    table, source = make_table(tmp_path / "a")
    for key in source.columns:
        source.columns[key][:] = 1
    equal = Table.create(tmp_path / "b", table.header)
    equal.add(source.write(equal, 0, 100))
    assert class_statistics(equal, "a", 0).targets.tolist() == [0, 1, 2, 3]
    # A dead or constant concept has its first samples as references, whatever the batches.
    assert top_k(equal, "a", k=3).sample[:, 0].tolist() == source.sample[:3].tolist()


@pytest.mark.parametrize(("mode", "kind", "normed"), QUERIES)
def test_class_means_are_shares(tmp_path: Path, mode: str, kind: str, normed: bool) -> None:
    table, source = make_table(tmp_path)
    value = values_of(source, "b", mode, kind, normed)
    found = class_means(table, "b", mode, kind, normed)
    assert found.targets.tolist() == list_targets(table).tolist() == [0, 1, 2, 3]
    assert found.rows.tolist() == [(source.target == t).sum() for t in range(4)]
    np.testing.assert_allclose(found.value, [value[source.target == t].mean(0) for t in range(4)], rtol=1e-5, atol=1e-7)


def test_a_cached_answer_is_read_and_never_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, source = make_table(tmp_path, [(0, 40)])
    first = top_k(table, "a", cache=True)
    (file,) = (tmp_path / "derived").glob("*.safetensors")

    def broken(*_: object, **__: object) -> None:
        raise AssertionError("the table was read again")

    with monkeypatch.context() as patch:
        patch.setattr(ranking, "_best_of_block", broken)
        assert as_rows(top_k(Table.open(tmp_path), "a", cache=True)) == as_rows(first)
        with pytest.raises(AssertionError, match="read again"):
            top_k(table, "a", k=41, cache=True)

    table.add(source.write(table, 40, 100))
    assert not file.exists()
    both = top_k(table, "a", cache=True)
    assert as_rows(both) == as_rows(top_k(table, "a")) != as_rows(first)

    # An answer about another table, put back by hand, is not believed either.
    (other,) = (tmp_path / "derived").glob("*.safetensors")
    assert other.name != file.name


def test_a_damaged_answer_is_computed_again(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    first = top_k(table, "a", cache=True)
    (file,) = (tmp_path / "derived").glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"\xff" * 100):
        file.write_bytes(damaged)
        assert as_rows(top_k(table, "a", cache=True)) == as_rows(first)
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_can_be_asked(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    (tmp_path / "derived").write_text("in the way")
    assert as_rows(top_k(table, "a", cache=True)) == as_rows(top_k(table, "a"))


def test_bad_questions(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    with pytest.raises(KeyError, match=r"'aa' not found in the table in .* nearest: 'a'"):
        top_k(table, "aa")
    with pytest.raises(KeyError, match=r"has target 7; it has 4 targets, nearest: 0, 1, 2, 3"):
        top_k(table, "a", of_class=7)
    with pytest.raises(ValueError, match=r"mode 'rel' was not mined into .*, which has relevance, activation"):
        top_k(table, "a", "rel")
    with pytest.raises(ValueError, match=r"kind 'min' was not mined into .*, which has sum, max"):
        class_means(table, "a", target="min")
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
        top_k(table, "a", k=0)
    with pytest.raises(ValueError, match="mean_n must be a whole number of at least 1, not 0"):
        class_statistics(table, "a", 0, mean_n=0)
    for ask in (lambda: top_k(table, "a", concepts=[0, 5]), lambda: class_statistics(table, "a", 5, cache=True)):
        with pytest.raises(IndexError, match="layer 'a' has 5 concepts, 0 to 4; there is no concept 5"):
            ask()
    empty = Table.create(tmp_path / "empty", table.header)
    with pytest.raises(ValueError, match="has no rows"):
        top_k(empty, "a")
    assert list_targets(empty).tolist() == []


def test_one_concept_comes_from_the_answer_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = make_table(tmp_path)
    plain = top_k(table, "a", k=6, concepts=[3, -5])
    assert as_rows(top_k(table, "a", k=6, concepts=[3, -5], cache=True)) == as_rows(plain)
    monkeypatch.setattr(Table, "blocks", None)
    assert as_rows(top_k(table, "a", k=6, concepts=0, cache=True)) == [as_rows(plain)[1]]


@pytest.mark.parametrize("cache", [False, True])
def test_numbers_may_be_those_of_numpy(tmp_path: Path, cache: bool) -> None:
    table, _ = make_table(tmp_path)
    of_class = list_targets(table)[0]
    found = top_k(table, "a", k=np.int64(2), of_class=of_class, concepts=np.int64(1), cache=cache)
    assert as_rows(found) == as_rows(top_k(table, "a", k=2, of_class=int(of_class), concepts=1))
    found = class_statistics(table, "a", np.int64(1), mean_n=np.int64(2), cache=cache)
    assert np.array_equal(found.value, class_statistics(table, "a", 1, mean_n=2).value)


def test_a_sample_that_was_skipped_first_keeps_its_rank(tmp_path: Path) -> None:
    reference, source = make_table(tmp_path / "reference", [(0, 100)])
    table = Table.create(tmp_path / "other", reference.header)
    broken = dict.fromkeys(range(2, 30, 3), "broken")
    table.add(source.write(table, 0, 60, broken))
    table.add(source.write(table, 1, 100))
    for mode, kind, normed in QUERIES:
        for k in (1, 3, 10):
            query = ("a", mode, kind, normed, k)
            assert as_rows(top_k(table, *query)) == as_rows(top_k(reference, *query))
