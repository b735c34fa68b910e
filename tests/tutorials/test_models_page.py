"""The page on models: its code runs, and gives what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "tutorials" / "models.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_heatmaps_have_a_row_for_each_condition(names):
    assert names["result"].heatmap.shape == names["found"].heatmap.shape == (6, 64, 64)
    assert names["heatmap"].shape == names["whole"].shape == names["part"].shape == (3, 64, 64)


def test_heads_share_the_relevance_of_their_layer(names):
    whole = names["found"].relevances[names["layer"]][::2]
    assert names["of_heads"].shape == (3, 3)
    of_heads = names["heads"].attribute(whole, layer_name=names["layer"], abs_norm=False)
    assert torch.allclose(of_heads.sum(1), whole.flatten(1).sum(1), rtol=1e-3, atol=1e-5)


def test_texts_have_a_number_for_each_token(names):
    assert names["of_tokens"].shape == (1, 4)


def test_several_inputs_have_a_heatmap_each(names):
    assert names["of_picture"].shape == (2, 8, 8) and names["of_vector"].shape == (2,)
