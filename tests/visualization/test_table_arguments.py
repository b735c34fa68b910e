"""Where a function takes a table, it takes its folder, too, and says so where it is given something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from feature_net import mined

from crp import audit
from crp.errors import InputTypeError
from crp.visualization import Table, analysis
from crp.visualization.report import find_suspects
from crp.visualization.table import derived, ranking

ROWS = analysis.RowSelection("second")
CLASS = ROWS._replace(of_class=1)
FOUND = audit.Interventions(
    "second", np.arange(1), np.arange(2), np.zeros(2, np.int64), np.ones((2, 1)), np.ones((2, 1)), 0.0, False
)  # fmt: skip


def kept(table):
    """Clusters of a table, as they are kept beside it."""
    found = audit.clusters(table, "second", 1, n=1, n_neighbours=2)
    audit.save_clusters(table, found, "second", 1)
    named = audit.with_concepts(table, found, "second", 1)
    return derived.read_kept(table, "clusters", "second", 1).arrays["label"], named.vectors


def audited(table):
    """Prototypes of a table, kept beside it and read again, and the audit of its samples."""
    found = audit.prototypes(table, "second", 1)
    found.save(table)
    again = audit.Prototypes.load(table, "second")
    assert again.classes.keys() == found.classes.keys()
    every = audit.audit_table(table, again)
    audit.save_audit(table, found, every)
    return [one.sample for one in every], derived.read_kept(table, "audit", "second").arrays["percentile"]


CALLS = {
    "list_targets": ranking.list_targets,
    "top_k": lambda table: ranking.top_k(table, "second", k=3, of_class=1, samples=[1, 4]),
    "class_statistics": lambda table: ranking.class_statistics(table, "second", 2),
    "class_means": lambda table: ranking.class_means(table, "second"),
    "top_concepts": lambda table: analysis.top_concepts(table, ROWS),
    "histogram": lambda table: analysis.histogram(table, ROWS, 1, 5),
    "similarity": lambda table: analysis.similarity(table, ROWS),
    "co_occurrence": lambda table: analysis.co_occurrence(table, ROWS, 2),
    "blocks": lambda table: np.concatenate([block.value for block in CLASS.blocks(table)]),
    "frames": lambda table: [frame.to_numpy() for frame in analysis.frames(table, ROWS)],
    "clusters": kept,
    "prototypes": audited,
    "interventions": lambda table: FOUND.save(table).name,
    "find_suspects": lambda table: find_suspects(table, {"second": (3, 3)}, [0, 1, 2]),
    "list_kept": lambda table: [one.kind for one in derived.list_kept(table)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mined(tmp_path_factory.mktemp("tables")).path


@pytest.mark.parametrize("name", CALLS)
def test_a_folder_is_opened(folder, name):
    expected = CALLS[name](Table.open(folder))
    for given in (str(folder), Path(folder)):
        found = CALLS[name](given)
        for pair in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
            np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_table_is_refused(name):
    message = r"a table is given as Table\.open\(folder\), .* not 3|explanations must be of shape"
    with pytest.raises((TypeError, ValueError), match=message):
        CALLS[name](3)
    with pytest.raises(FileNotFoundError, match="nothing was mined into nowhere"):
        CALLS[name]("nowhere")


def test_suspects_are_asked_by_layer(folder):
    with pytest.raises(TypeError, match="spaces must be given by layer"):
        find_suspects(folder, ["second"], [0])
    with pytest.raises(
        TypeError, match=r"with FeatureVisualization.open\(folder\) in place of the table, they are found"
    ):
        find_suspects(folder)
    with pytest.raises(ValueError, match="n must be a whole number of at least 1, not 0"):
        find_suspects(folder, {"second": (3, 3)}, [0], 0)
    for space in (3, (3,), "33", (3, 3, 3), (0, 3), (1.5, 3), (True, 3)):
        with pytest.raises(ValueError, match="space of layer 'second' must be"):
            find_suspects(folder, {"second": space}, [0, 1, 2])


def test_an_open_table_is_given_back(folder):
    table = Table.open(folder)
    assert Table.open(table) is table


@pytest.mark.parametrize("samples", [[0.7], ["1"], [[1, 2]], "12"], ids=["fraction", "word", "rows", "letters"])
def test_samples_are_whole_numbers(folder, samples):
    """A fraction was cut off, and another sample taken."""
    for call in (
        lambda: ranking.top_k(folder, "second", samples=samples),
        lambda: next(ROWS._replace(samples=samples).blocks(folder)),
    ):
        with pytest.raises(TypeError, match="samples must be whole numbers"):
            call()


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"], ids=repr)
def test_how_many_is_a_whole_number(folder, k):
    calls = [
        lambda: ranking.top_k(folder, "second", k=k),
        lambda: ranking.class_statistics(folder, "second", 0, mean_n=k),
        lambda: analysis.top_concepts(folder, ROWS, k),
        lambda: analysis.co_occurrence(folder, ROWS, k),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            call()


# --- one class, one concept -----------------------------------------------------------------------------------------

OF_A_CLASS = {
    "top_k": lambda table, number: ranking.top_k(table, "second", k=3, of_class=number),
    "blocks": lambda table, number: [*Table.open(table).blocks("second", of_class=number)],
    "rows": lambda table, number: [*ROWS._replace(of_class=number).blocks(table)],
    "read_kept": lambda table, number: derived.read_kept(table, "clusters", "second", number).arrays["label"],
    "clusters": lambda table, number: audit.clusters(table, "second", number, n=1, n_neighbours=2).label,
    "save_clusters": lambda table, number: audit.save_clusters(
        table, audit.clusters(table, "second", 1, n=1, n_neighbours=2), "second", number
    ),
}
OF_A_CONCEPT = {
    "class_statistics": lambda table, number: ranking.class_statistics(table, "second", number),
    "column": lambda table, number: Table.open(table).column("second", number),
    "histogram": lambda table, number: analysis.histogram(table, ROWS, number, 5),
}
OF_CONCEPTS = {
    "top_k": lambda table, numbers: ranking.top_k(table, "second", concepts=numbers),
    "blocks": lambda table, numbers: [*Table.open(table).blocks("second", concepts=numbers)],
    "frames": lambda table, numbers: [frame.to_csv() for frame in analysis.frames(table, ROWS, numbers)],
}
#: What is no number of a class, or of a concept.
NONE = [True, 1.0, "1", [1, 2], torch.tensor([1, 2]), None]


def same(found, expected):
    for pair in zip(found, expected, strict=True):
        (same if isinstance(pair[0], tuple) else np.testing.assert_array_equal)(*pair)


@pytest.mark.parametrize("given", [np.int64(1), np.array(1), torch.tensor(1)], ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("call", [*OF_A_CLASS.values(), *OF_A_CONCEPT.values(), *OF_CONCEPTS.values()])
def test_numbers_may_be_of_numpy_or_torch(folder, call, given):
    kept(folder)
    found, expected = call(folder, given), call(folder, 1)
    if isinstance(found, Path):
        assert found == expected
    else:
        same(found, expected)


@pytest.mark.parametrize("given", NONE[:-1], ids=repr)
@pytest.mark.parametrize("name", OF_A_CLASS)
def test_what_is_no_class_is_refused(folder, name, given):
    with pytest.raises(InputTypeError, match="of_class must be "):
        OF_A_CLASS[name](folder, given)


@pytest.mark.parametrize("given", NONE, ids=repr)
@pytest.mark.parametrize("name", OF_A_CONCEPT)
def test_what_is_no_concept_is_refused(folder, name, given):
    with pytest.raises(InputTypeError, match="layer 'second': concept ids must be integers"):
        OF_A_CONCEPT[name](folder, given)


@pytest.mark.parametrize("given", [[True], 1.0, "1", [[1, 2]]], ids=repr)
@pytest.mark.parametrize("name", OF_CONCEPTS)
def test_what_are_no_concepts_is_refused(folder, name, given):
    with pytest.raises(InputTypeError, match="layer 'second': concept ids must be integers"):
        OF_CONCEPTS[name](folder, given)


def test_columns_of_a_frame_are_the_concepts(folder):
    (frame,) = analysis.frames(folder, ROWS, [-1, torch.tensor(0)])
    n = Table.open(folder).n_concepts("second")
    assert [*frame.columns[2:]] == [str(n - 1), "0"]
