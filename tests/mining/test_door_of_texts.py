"""Texts that cannot be mined are refused in our words; of others, nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import rows_of
from text_cases import Letters, model_of

from crp.attribution import CondAttribution
from crp.composites import AttnLRP
from crp.concepts import AxisConcept
from crp.errors import CRPError
from crp.visualization import Texts, mine

LAYER = "transformer.h.0.mlp.act"
LONG = {"input_ids": [3] * 17}


def mined(path: Path, items: Any, tokenizer: Any = None, position: Any = -1, **options: Any) -> Any:
    """Table of texts, by a model of 11 token ids and 16 positions."""
    texts = Texts(items, tokenizer, position=position)
    settings: dict[str, Any] = {"targets": "prediction", "progress": False, "batch_size": 4} | options
    return mine(CondAttribution(model_of("gpt2")), texts, {LAYER: AxisConcept(-1)}, AttnLRP(), path, **settings)


def ids(*numbers: Any, **others: Any) -> list[dict[str, Any]]:
    return [{"input_ids": list(numbers)} | others]


WHOLE = r"'input_ids' must be whole numbers of shape \(tokens,\), not "
WRONG: dict[str, tuple[Any, str]] = {
    "negative id": (ids(3, -1, 5), "sample 0: it holds the id -1, of which the model has no embedding"),
    "id beyond": (ids(3, 11), "sample 0: it holds the id 11, of which the model has no embedding"),
    "more tokens than positions": ([LONG], r"layer 'transformer.wpe' \(Embedding\) has .* numbers 0 to 15 and gets 16"),
    "position beyond": (ids(3, 4, position_ids=[0, 99]), "'transformer.wpe' .* has embeddings of the numbers 0 to 15"),
    "fractions": (ids(3.0, 4.5), WHOLE + r"\(2,\) of torch.float32"),
    "truth": (ids(True, False), WHOLE + r"\(2,\) of torch.bool"),
    "words": (ids("3", "4"), WHOLE + r"\['3', '4'\]"),
    "ragged": (ids([3, 4], [5]), WHOLE + r"\[\[3, 4\], \[5\]\]"),
    "two texts": (ids([3, 4], [5, 6]), WHOLE + r"\(2, 2\) of torch.int64"),
    "nothing": ([None], WHOLE + "None"),
    "bytes": ([b"abc"], WHOLE + "b'abc'"),
    "no token": (ids(), "the text has no tokens"),
    "mask of numbers": (ids(3, 4, 5, attention_mask=[1, 2, 2]), r"must be 0 and 1; it holds \[1, 2\]"),
    "negative mask": (ids(3, 4, attention_mask=[1, -1]), r"must be 0 and 1; it holds \[-1, 1\]"),
    "mask with a hole": (
        ids(3, 4, 5, attention_mask=[1, 0, 1]),
        "leaves out tokens between others, and not at its ends",
    ),
    "mask of none": (ids(3, 4, attention_mask=[0, 0]), "lets no token through"),
    "short mask": (
        ids(3, 4, 5, attention_mask=[1, 1]),
        "different numbers of tokens: {'input_ids': 3, 'attention_mask'",
    ),
    "a word as dataset": ("abc", "the dataset must be a list of samples, .*, not the word 'abc'"),
    "texts of texts": (Texts(ids(3, 4), position=-1), "the dataset is of Texts already"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore:.*were attributed in parts")
def test_texts_that_cannot_be_mined(tmp_path: Path, case: str) -> None:
    items, message = WRONG[case]
    with pytest.raises(CRPError, match=message):
        mined(tmp_path, items)


TOKENIZERS: dict[str, tuple[Any, str]] = {
    "a name": (
        "gpt2",
        r"tokenizer must be a function of a text, such as AutoTokenizer.from_pretrained\(...\), not 'gpt2'",
    ),
    "a number": (3, "tokenizer must be a function of a text"),
    "none": (None, "no tokenizer makes ids of them"),
    "one that gives nothing": (lambda text: None, WHOLE + "None"),
    "one that gives the text": (lambda text: text, WHOLE + "'ab'"),
    "one that gives no ids": (lambda text: {"tokens": [1, 2]}, "the tokenizer gives no 'input_ids'; it gives 'tokens'"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_what_is_no_tokenizer(tmp_path: Path, case: str) -> None:
    tokenizer, message = TOKENIZERS[case]
    with pytest.raises(CRPError, match=message):
        mined(tmp_path, ["ab"], tokenizer)


@pytest.mark.parametrize("position", [1.0, "all", True, [0, 1], np.int64(1)], ids=repr)
def test_what_is_no_position(position: Any) -> None:
    with pytest.raises(CRPError, match="position must be an int, 'each' or None"):
        Texts(["ab"], Letters(), position=position)


def test_texts_of_one_token_have_no_next_one() -> None:
    with pytest.raises(CRPError, match="every text has one token only"):
        Texts([*ids(3), *ids(4)], position="each")
    assert len(Texts([*ids(3), *ids(4, 5)], position="each")) == 1 and len(Texts([], position="each")) == 0


@pytest.mark.filterwarnings("ignore:.*samples? (was|were) skipped", "ignore:.*were attributed in parts")
def test_a_first_text_that_is_too_long_is_skipped_with_all_its_positions(tmp_path: Path) -> None:
    items = [LONG, *ids(4, 5, 6)]
    table = mined(tmp_path, items, position="each", on_error="skip")
    assert list(table.coverage().skipped) == list(range(16)) and [s for s, _ in rows_of(table)] == [16, 17]
    with pytest.raises(CRPError, match=r"sample 0: .*has embeddings of the numbers 0 to 15 and gets 16"):
        mined(tmp_path / "stop", items, position="each")


@pytest.mark.filterwarnings("ignore:.*were attributed in parts")
def test_a_model_with_a_decoder_lacks_its_ids(tmp_path: Path) -> None:
    texts = Texts(ids(3, 4, 5, attention_mask=[1, 1, 1]), position=-1)
    layer = {"encoder.block.0.layer.1.DenseReluDense.wi": AxisConcept(-1)}
    with pytest.raises(CRPError, match="the model has a decoder, and the data have no 'decoder_input_ids'"):
        mine(CondAttribution(model_of("t5")), texts, layer, AttnLRP(), tmp_path, targets=[3], progress=False)


@pytest.mark.parametrize("bad", [[3, 99, 4], [3] * 17], ids=["id", "length"])
@pytest.mark.filterwarnings("ignore:.*samples? (was|were) skipped", "ignore:.*were attributed in parts")
@pytest.mark.filterwarnings("ignore:the model says something else of a text that is filled up")
def test_a_bad_text_is_skipped_by_itself(tmp_path: Path, bad: list[int]) -> None:
    items = [ids(3, 4, 5)[0], ids(*bad)[0], ids(6, 7)[0]]
    table = mined(tmp_path / "one", items, on_error="skip")
    assert list(table.coverage().skipped) == [1]
    plain = mined(tmp_path / "other", [items[0], items[2]])
    assert [sample for sample, _ in rows_of(table)] == [0, 2]
    for kind in ("sum", "max"):
        one, other = (
            np.concatenate([block.value for block in each.blocks(LAYER, "relevance", kind)]) for each in (table, plain)
        )
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


def test_attribution_tells_the_layer_of_a_position_that_is_none() -> None:
    data = {"input_ids": torch.tensor([[3, 4]]), "position_ids": torch.tensor([[0, 99]])}
    message = r"layer 'transformer.wpe' \(Embedding\) has embeddings of the numbers 0 to 15 and gets 99"
    with pytest.raises(IndexError, match=message):
        CondAttribution(model_of("gpt2"))(data, [{"y": 1}], AttnLRP())


@pytest.mark.filterwarnings("ignore:.*were attributed in parts")
def test_an_error_of_the_model_is_not_put_down_to_filling_up(tmp_path: Path) -> None:
    """(A warning about padding would be an error here.)"""
    model = model_of("gpt2")

    def broken(*_: Any) -> None:
        raise RuntimeError("the model's own trouble")

    model.get_submodule(LAYER).register_forward_hook(broken)
    texts = Texts([*ids(3, 4), *ids(3, 4, 5)], position=-1)
    with pytest.raises(Exception, match="the model's own trouble"):
        mine(CondAttribution(model), texts, {LAYER: AxisConcept(-1)}, AttnLRP(), tmp_path, targets="prediction",
             progress=False, batch_size=4)  # fmt: skip
