"""Texts as inputs: the page on methods runs, and `crp.explain` and `CondAttribution` give the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from text_cases import model_of

import crp
from crp.attribution import CondAttribution
from crp.composites import AttnLRP
from crp.concepts import AxisConcept
from crp.outputs import Position

PAGE = Path(__file__).resolve().parents[2] / "tutorials" / "methods.md"
IDS = torch.tensor([[3, 4, 5, 1, 9, 2], [4, 4, 7, 8, 3, 3]])
DATA = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]),
}


def test_the_block_of_the_page_on_methods_runs() -> None:
    (code,) = re.findall(r"### Texts\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {
        "ids": IDS[:1], "mask": torch.ones_like(IDS[:1]), "token": 5, "other": 6, "model": model_of("gpt2"),
        "CondAttribution": CondAttribution, "AttnLRP": AttnLRP, "AxisConcept": AxisConcept, "Position": Position,
    }  # fmt: skip
    exec(
        compile(code.replace("groups=12", "groups=2").replace("h.5", "h.1").replace("[3]", "[1]"), str(PAGE), "exec"),
        names,
    )
    assert names["both"].heatmap.shape == (2, 6)
    why, rather, one, heads = (names[name] for name in ("why", "rather", "one", "heads"))
    attribution = names["CondAttribution"](names["model"])
    rival = attribution(names["data"], [{"y": Position(-1, 6)}], AttnLRP()).heatmap[0]
    # (what starts at the output is linear: the contrast is the difference)
    torch.testing.assert_close(names["both"].heatmap[1], names["both"].heatmap[0] - rival, rtol=1e-9, atol=1e-12)
    assert rather["y"].signed() == [((-1, 5), 1), ((-1, 6), -1)]
    layer = "transformer.h.1.attn.c_proj.input"
    parts = [
        attribution(names["data"], [{**why, layer: [head]}], AttnLRP(), mask_map=heads.mask).heatmap[0]
        for head in range(2)
    ]
    all_heads = attribution(names["data"], [{**why, layer: [0, 1]}], AttnLRP(), mask_map=heads.mask).heatmap[0]
    torch.testing.assert_close(sum(parts), all_heads, rtol=1e-9, atol=1e-12)
    assert layer in one and parts[0].abs().max() > 0 and not torch.allclose(*parts)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("explain", ["all", "several"])
def test_both_ways_give_the_same_of_masked_texts(name: str, explain: str) -> None:
    """With padding, its mask and positions; one target for all texts, and one for each."""
    model = model_of(name)
    targets = [Position(-1, 5, against=2), Position(-1, [3, 4])] if explain == "several" else [Position(-1, 5)] * 2
    conditions = [{"y": target} for target in targets]
    found = CondAttribution(model)(DATA, conditions, AttnLRP()).heatmap
    same = crp.explain("attn_lrp", model, DATA, targets if explain == "several" else targets[0])
    torch.testing.assert_close(found, same, rtol=1e-9, atol=1e-12)
    assert found.shape == IDS.shape and not found[1, :2].any() and found[:, 2:].abs().max() > 1e-6


@pytest.mark.parametrize("form", ["output", "tuple", "tensor"])
def test_outputs_of_every_form(form: str) -> None:
    """A `ModelOutput`, a tensor of a model that returns its logits, and a tuple with a choice of one's own."""
    model = model_of("gpt2")

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = self.inner(input_ids=input_ids).logits
            return logits if form == "tensor" else (logits, None)

    def first(returned: Any) -> Any:
        return returned[0]

    shown: Any = model if form == "output" else Wrapped().eval()
    more: dict[str, Any] = {"output": first} if form == "tuple" else {}
    found = CondAttribution(shown, **more)({"input_ids": IDS}, [{"y": Position(2, 5)}], AttnLRP()).heatmap
    wanted = CondAttribution(model)(IDS, [{"y": Position(2, 5)}], AttnLRP()).heatmap
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert not found[:, 3:].any() and found[:, :3].abs().max() > 1e-6
