"""Answers that are read block by block are those of numpy over the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from table_maker import Source, make_table

from crp.concepts import normalize
from crp.visualization.analysis import (
    RowSelection,
    co_occurrence,
    frames,
    histogram,
    similarity,
    top_concepts,
    write_frame,
)
from crp.visualization.table.store import Table

RANGES = [(0, 40), (30, 70), (70, 100)]
CHOICES = [
    {},
    {"target": "max", "normed": False},
    {"of_class": 2},
    {"mode": "activation", "normed": False, "samples": [2, 5, 8, 11, 44, 50, 71]},
]


def whole(source: Source, rows: RowSelection) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and values that are meant, all at once."""
    keep = np.ones(len(source.sample), bool)
    if rows.of_class is not None:
        keep &= source.target == rows.of_class
    if rows.samples is not None:
        keep &= np.isin(source.sample, rows.samples)
    if rows.mode == "activation":
        keep &= np.diff(source.sample, prepend=-1) != 0
    name = f"{rows.mode}.{rows.target}"
    value = source.columns[f"{name}/a"]
    if rows.normed:
        value = normalize(torch.from_numpy(value)).numpy()
    return np.flatnonzero(keep), value[keep]


@pytest.fixture(params=CHOICES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Table, RowSelection, np.ndarray, np.ndarray]:
    table, source = make_table(tmp_path, RANGES, n_concepts=6)
    rows = RowSelection("a", **request.param)
    return table, rows, *whole(source, rows)


def test_concepts_by_their_mean(case: Any) -> None:
    table, rows, _, value = case
    found = top_concepts(table, rows, 4)
    mean = value.mean(axis=0, dtype=np.float64)
    assert found.concept.tolist() == np.argsort(-mean, kind="stable")[:4].tolist()
    np.testing.assert_allclose(found.value, np.sort(mean)[::-1][:4], rtol=1e-12)
    assert len(top_concepts(table, rows, 99).concept) == 6


def test_concepts_of_one_sample(tmp_path: Path) -> None:
    table, source = make_table(tmp_path, n_concepts=6)
    (row,) = np.flatnonzero(source.sample == 4)[:1]
    found = top_concepts(table, RowSelection("b", normed=False, samples=[4]), 6)
    assert found.value.tolist() == sorted(source.columns["relevance.sum/b"][row].tolist(), reverse=True)


def test_histograms(case: Any) -> None:
    table, rows, _, value = case
    for bins in (7, [-1.0, -0.5, 0.0, 0.2, 2.0]):
        for density in (False, True):
            found = histogram(table, rows, 3, bins, density)
            count, edges = np.histogram(value[:, 3].astype(np.float64), bins, density=density)
            np.testing.assert_allclose(found.edges, edges, rtol=1e-12)
            np.testing.assert_allclose(found.height, count, rtol=1e-12)
            assert found.height.dtype == (np.float64 if density else np.int64)


def test_similarity(case: Any) -> None:
    table, rows, _, value = case
    value = value.astype(np.float64)
    norm = np.linalg.norm(value, axis=0)
    np.testing.assert_allclose(similarity(table, rows), value.T @ value / np.outer(norm, norm), atol=1e-12)
    np.testing.assert_allclose(similarity(table, rows, "correlation"), np.corrcoef(value.T), atol=1e-12)


def test_a_concept_that_is_always_zero_is_like_none(tmp_path: Path) -> None:
    source = Source(n_concepts=3)
    source.columns["relevance.sum/a"][:, 1] = 0
    table, _ = make_table(tmp_path, [(0, 10)], n_concepts=3)
    table.add(source.write(table, 0, 10))
    for kind in ("cosine", "correlation"):
        found = similarity(table, RowSelection("a"), kind)  # type: ignore[arg-type]
        assert found[1].tolist() == [0, 0, 0] and found[0, 0] == pytest.approx(1)


def test_co_occurrence(case: Any) -> None:
    table, rows, _, value = case
    expected = np.zeros((6, 6), int)
    for row in value:
        best = sorted(range(6), key=lambda c: (-row[c], c))[:2]
        for one in best:
            for other in best:
                expected[one, other] += 1
    assert co_occurrence(table, rows, 2).tolist() == expected.tolist()


def test_frames(case: Any) -> None:
    pandas = pytest.importorskip("pandas")
    table, rows, numbers, value = case
    source = Source(n_concepts=6)
    whole_frame = pandas.concat(list(frames(table, rows, [4, 1])), ignore_index=True)
    assert list(whole_frame) == ["sample", "target", "4", "1"]
    assert whole_frame["sample"].tolist() == source.sample[numbers].tolist()
    assert whole_frame["target"].tolist() == source.target[numbers].tolist()
    assert whole_frame["4"].tolist() == value[:, 4].tolist()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_files(case: Any, tmp_path: Path, suffix: str) -> None:
    pandas = pytest.importorskip("pandas")
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    table, rows, numbers, value = case
    path = write_frame(table, rows, tmp_path / f"x.{suffix}")
    read = pandas.read_csv(path) if suffix == "csv" else pandas.read_parquet(path)
    assert list(read) == ["sample", "target", *map(str, range(6))]
    np.testing.assert_allclose(read.iloc[:, 2:].to_numpy(), value, rtol=1e-6)
    assert read["sample"].tolist() == Source(n_concepts=6).sample[numbers].tolist()


def test_mistakes_are_told(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    with pytest.raises(ValueError, match=r"has no rows of class 17; its classes are 0, 1, 2"):
        top_concepts(table, RowSelection("a", of_class=17))
    with pytest.raises(ValueError, match="has no rows of class 0 among the samples that are named; its classes are 0"):
        top_concepts(table, RowSelection("a", of_class=0, samples=[]))
    with pytest.raises(KeyError, match="'c' not found in the table"):
        similarity(table, RowSelection("c"))
    with pytest.raises(IndexError, match="there is no concept 5"):
        histogram(table, RowSelection("a"), 5)
    for wrong in (
        lambda: top_concepts(table, RowSelection("a"), 0),
        lambda: co_occurrence(table, RowSelection("a"), 0),
    ):
        with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
            wrong()
    with pytest.raises(ValueError, match="bins must be a whole number of at least 1, not 0"):
        histogram(table, RowSelection("a"), 1, 0)
    for bins in ([1.0, 0.5], [0.5], [np.nan, 1.0], [[0.0, 1.0]], np.array(3)):
        with pytest.raises(ValueError, match="bins must be a number, or edges in ascending order, not"):
            histogram(table, RowSelection("a"), 1, bins)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no value of concept 1 is between 50\.0 and 60\.0: there is no density"):
        histogram(table, RowSelection("a"), 1, [50, 55, 60], density=True)
    assert not histogram(table, RowSelection("a"), 1, [50, 55, 60]).height.any()
    with pytest.raises(ValueError, match="kind must be one of 'cosine', 'correlation', not 'dot'"):
        similarity(table, RowSelection("a"), "dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must end in \.csv or \.parquet"):
        write_frame(table, RowSelection("a"), tmp_path / "x.txt")
    rows: Any = "a"
    for ask in (top_concepts, similarity, co_occurrence, lambda *given: histogram(*given, 1)):
        with pytest.raises(TypeError, match=r"rows must be a RowSelection, such as RowSelection\('conv'\), not 'a'"):
            ask(table, rows)


def test_a_file_stays_where_there_is_nothing_to_write(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    table, _ = make_table(tmp_path)
    (tmp_path / "x.csv").write_text("before")
    with pytest.raises(ValueError, match="has no rows of class 17"):
        write_frame(table, RowSelection("a", of_class=17), tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "before"
