"""Mining every position of texts: those of a text share a forward pass, and have the rows of each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import rows_of, same_rows
from test_mining_texts import KINDS, NEURONS, columns
from text_cases import model_of, texts_of_ids
from torch import nn
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.composites import AttnLRP
from crp.visualization import Table, Texts, mine
from crp.visualization.mining import text_batches


def counted(attribution: CondAttribution) -> list[int]:
    """Number of texts in each forward pass that keeps a graph, from now on."""
    passes: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            passes.append(len(kwargs["input_ids"]))

    attribution.model.register_forward_hook(count, with_kwargs=True)
    return passes


@pytest.fixture(scope="module", params=["label", "top-3"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Table]]:
    """Which targets, and a table for each position of five texts, mined by itself."""
    attribution, layers, tables = CondAttribution(model_of("gpt2")), KINDS["gpt2"][1], []
    for item in texts_of_ids(5):
        ids = item["input_ids"][-sum(item["attention_mask"]) :]
        for at, following in enumerate(ids[1:]):
            targets = [following] if request.param == "label" else request.param
            text, path = Texts([item], position=at), tmp_path_factory.mktemp("alone") / "table"
            tables.append(mine(attribution, text, layers, AttnLRP(), path, targets=targets, progress=False))
    return request.param, tables


@pytest.mark.parametrize(
    ("batch_size", "wanted"),
    [(3, [1, 1, 1, 2]), (16, [2, 3]), (100, [5])],
    ids=["less than a text", "several texts", "all"],
)
def test_positions_of_a_text_share_one_forward_pass(
    alone: tuple[str, list[Table]], batch_size: int, wanted: list[int], tmp_path: Path
) -> None:
    """Whatever goes back at once, each text goes forward once, and rows are those of positions one by one."""
    items = texts_of_ids(5)
    layers = KINDS["gpt2"][1]
    assert [sum(item["attention_mask"]) - 1 for item in items] == [5, 8, 5, 1, 2]
    attribution = CondAttribution(model_of("gpt2"))
    passes = counted(attribution)
    targets, tables = alone
    settings: dict[str, Any] = {"targets": targets, "progress": False}
    table = mine(
        attribution, Texts(items, position="each"), layers, AttnLRP(), tmp_path / "a", batch_size=batch_size, **settings
    )
    assert passes == [1, 1, *wanted]  # (two tell whether positions are scored each by itself)
    labels = [target for _, target in rows_of(table)]
    n = 3 if targets == "top-3" else 1
    assert len(labels) == 21 * n and len(tables) == 21
    for i, one in enumerate(tables):
        assert [target for _, target in rows_of(one)] == labels[n * i : n * (i + 1)]
        for key in ((at, m, k) for at in layers for m in table.modes for k in table.kinds):
            of_all, of_one = columns(table, *key), columns(one, *key)
            np.testing.assert_allclose(of_all[2][n * i : n * (i + 1)], of_one[2], rtol=1e-10, atol=1e-15)
            np.testing.assert_array_equal(of_all[3][n * i : n * (i + 1)], of_one[3])


@pytest.mark.parametrize("composite", [ZennitEpsilonPlus(), None], ids=["zennit", "gradient"])
def test_positions_without_a_graph_that_stays(composite: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 11)).double().eval()
    ids = [item["input_ids"] for item in texts_of_ids(5, "none")]
    tables = [
        mine(
            CondAttribution(model), Texts(ids, position="each"), {"1": NEURONS}, composite, tmp_path / str(size),
            batch_size=size, targets="top-3", progress=False,
        )
        for size in (4, 1)
    ]  # fmt: skip
    same_rows(*tables, 1e-10)


def test_a_longer_text_has_further_forward_passes_and_memory_that_fails_smaller_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_batches, "_LONGEST", 2)
    texts = Texts([{"input_ids": [3, 4, 5, 6, 7, 8, 9, 10, 3]}], position="each")
    attribution = CondAttribution(model_of("gpt2"))
    passes = counted(attribution)
    layers, settings = KINDS["gpt2"][1], {"progress": False, "shard_size": 100}
    table = mine(attribution, texts, layers, AttnLRP(), tmp_path / "a", batch_size=3, **settings)
    assert passes == [1, 1, 1, 1]
    sizes: list[int] = []

    class Scarce(CondAttribution):
        def relevance_init(self, prediction: torch.Tensor, *others: Any) -> torch.Tensor:
            sizes.append(len(prediction))
            if len(prediction) > 2:
                raise torch.OutOfMemoryError("can't allocate memory")
            return super().relevance_init(prediction, *others)

    with pytest.warns(UserWarning, match="lower batch_size"):
        again = mine(Scarce(attribution.model), texts, layers, AttnLRP(), tmp_path / "b", batch_size=4, **settings)
    same_rows(table, again, 1e-10)
    assert sizes == [4, 2, 2, 2, 2]
