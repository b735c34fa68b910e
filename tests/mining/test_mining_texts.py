"""Mining texts: scores for each concept and token, of each text as if it were alone; runs go on; words are known."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import files_of, rows_of, same_rows
from text_cases import Letters, model_of, texts_of_ids
from torch import nn
from torch.utils.data import Subset

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlus
from crp.concepts import AxisConcept, ChannelConcept
from crp.concepts.scores import scores_of
from crp.errors import ConceptError
from crp.outputs import Position
from crp.visualization import Table, Texts, mine
from crp.visualization.mining.texts import texts_in, words_in, words_of

NEURONS = AxisConcept(-1)
#: Family, layers with their concepts, and the position that is explained.
KINDS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "gpt2": ("gpt2", {"transformer.h.0.mlp.act": NEURONS, "transformer.h.1.ln_2": AxisConcept(-1, 2)}, -1),
    "llama": ("llama", {"model.layers.0.self_attn.v_proj": AxisConcept(-1, 1), "model.layers.1.mlp": NEURONS}, -2),
    "bert": ("bert", {"bert.encoder.layer.0.intermediate": NEURONS, "bert.pooler": NEURONS}, None),
    "roberta": ("roberta", {"roberta.encoder.layer.1.output": NEURONS}, None),
}


def mined(path: Path, texts: Texts, name: str = "gpt2", composite: Any = None, **changes: Any) -> Any:
    family, layers, _ = KINDS[name]
    settings: dict[str, Any] = {"batch_size": 4, "shard_size": 8, "progress": False, "targets": "prediction"}
    attribution = CondAttribution(model_of(family))
    layers = changes.pop("layer_map", layers)
    return mine(attribution, texts, layers, composite or AttnLRP(), path, **settings | changes)


def columns(table: Any, layer: str, mode: str, kind: str) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*table.blocks(layer, mode, kind), strict=True)]


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pad", ["left", "right", "none"])
def test_texts_are_scored_as_each_alone(name: str, pad: str, tmp_path: Path) -> None:
    """Of padding, neither relevance nor activation is counted, nor a position; rows are those of single texts."""
    family, layers, position = KINDS[name]
    items = texts_of_ids(9, pad)
    # (RoBERTa counts positions by the ids that are no padding)
    texts = Texts(items, Letters() if family == "roberta" else None, position=position)
    table = mined(tmp_path / "a", texts, name)
    attribution = CondAttribution(model_of(family))
    found = {
        key: columns(table, *key) for key in ((at, m, k) for at in layers for m in table.modes for k in table.kinds)
    }
    for i, item in enumerate(items):
        ids = torch.tensor([[t for t, kept in zip(item["input_ids"], item["attention_mask"], strict=True) if kept]])
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = attribution.model(**data).logits.detach()
        place = None if position is None else position % ids.shape[1]
        target = int((output[0] if place is None else output[0, place]).argmax())
        y = target if place is None else Position(place, target)
        alone = attribution(data, [{"y": y}], AttnLRP(), record_layer=list(layers), exclude_parallel=False)
        for layer, concept in layers.items():
            for mode, values in (("relevance", alone.relevances), ("activation", alone.activations)):
                by_token = concept.arranged(values[layer])
                by_token = by_token.flatten(2, -2).sum(2) if by_token.dim() > 3 else by_token
                wanted = scores_of(by_token)
                for kind in ("sum", "max"):
                    _, of, value, at = found[layer, mode, kind]
                    assert of[i] == target
                    np.testing.assert_allclose(value[i], getattr(wanted, kind)[0], rtol=1e-9, atol=1e-14)
                np.testing.assert_array_equal(at[i], wanted.position[0])
                assert at[i].max() < ids.shape[1]


def test_activations_alone_and_texts_without_labels(tmp_path: Path) -> None:
    items = [{key: item[key] for key in ("input_ids", "attention_mask")} for item in texts_of_ids(9)]
    both = mined(tmp_path / "a", Texts(items, position=-1))
    alone = mined(tmp_path / "b", Texts(items, position=-1), modes=["activation"], targets="label")
    for layer in KINDS["gpt2"][1]:
        np.testing.assert_allclose(
            *(columns(table, layer, "activation", "max")[2] for table in (both, alone)), rtol=1e-12
        )


def test_every_position_is_a_sample_and_its_label_the_next_token(tmp_path: Path) -> None:
    items = texts_of_ids(4)
    texts = Texts(items, position="each")
    kept = [[t for t, m in zip(item["input_ids"], item["attention_mask"], strict=True) if m] for item in items]
    assert len(texts) == sum(len(ids) - 1 for ids in kept)
    assert [texts[i][1] for i in range(len(texts))] == [token for ids in kept for token in ids[1:]]
    table = mined(tmp_path / "a", texts, targets="label")
    assert [target for _, target in rows_of(table)] == [token for ids in kept for token in ids[1:]]
    # (the first position of a text knows its first token only)
    first = np.cumsum([0, *(len(ids) - 1 for ids in kept)])[:-1]
    *_, at = columns(table, "transformer.h.0.mlp.act", "relevance", "max")
    value = columns(table, "transformer.h.0.mlp.act", "relevance", "sum")[2]
    assert not at[first][value[first] > 0].any()


@pytest.mark.parametrize("targets", ["top-3", [4, 7], "all"])
def test_several_tokens_at_a_position(targets: Any, tmp_path: Path) -> None:
    texts = Texts(texts_of_ids(6), position=-1)
    table = mined(tmp_path / "a", texts, targets=targets)
    one_by_one = mined(tmp_path / "b", texts, targets=targets, batch_size=1)
    assert len(rows_of(table)) == 6 * {"top-3": 3, "all": 11}.get(str(targets), 2)
    same_rows(table, one_by_one, 1e-9)


@pytest.mark.parametrize("composite", [CPLRP(), EpsilonPlus(), None], ids=["cp", "plus", "gradient"])
def test_batches_of_texts_and_single_ones_give_the_same(composite: Any, tmp_path: Path) -> None:
    texts = Texts(texts_of_ids(7), position=-1)
    settings = {"layer_map": {"transformer.h.0.mlp.act": NEURONS}}
    tables = []
    for size in (5, 1):
        attribution = CondAttribution(model_of("gpt2"))
        tables.append(
            mine(
                attribution, texts, settings["layer_map"], composite, tmp_path / str(size),
                batch_size=size, targets="prediction", progress=False,
            )
        )  # fmt: skip
    same_rows(*tables, 1e-9)


class Bag(nn.Module):
    """Mean over all tokens, also those of padding: (n, tokens) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.out = nn.Embedding(11, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.mix(self.words(ids))).mean(1))


def test_texts_that_must_not_be_filled_up_are_mined_by_length(tmp_path: Path) -> None:
    items = [torch.tensor(item["input_ids"]) for item in texts_of_ids(8, "none")]
    attribution = CondAttribution(Bag().double().eval())
    tables = []
    with pytest.warns(UserWarning, match="texts of each length are mined by themselves"):
        for size in (8, 1):
            tables.append(
                mine(
                    attribution, Texts(items), {"mix": NEURONS}, EpsilonPlus(), tmp_path / str(size),
                    batch_size=size, targets="prediction", progress=False,
                )
            )  # fmt: skip
    same_rows(*tables, 1e-12)
    one = attribution(items[0][None], [{"y": rows_of(tables[0])[0][1]}], EpsilonPlus(), record_layer=["mix"])
    np.testing.assert_allclose(columns(tables[0], "mix", "relevance", "sum")[2][0], one.relevances["mix"][0].sum(0))


def test_a_subset_and_worker_processes(tmp_path: Path) -> None:
    texts = Texts(texts_of_ids(8), position=-1)
    whole = mined(tmp_path / "a", texts)
    part = mined(tmp_path / "b", Subset(texts, [5, 2]))
    for layer in KINDS["gpt2"][1]:
        left, right = (columns(table, layer, "relevance", "sum")[2] for table in (whole, part))
        np.testing.assert_allclose(left[[5, 2]], right, rtol=1e-9, atol=1e-14)
    assert words_in(Subset(texts, [5, 2]), 0) == texts.words(5)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_read_texts(tmp_path: Path) -> None:
    texts = Texts(texts_of_ids(8), position=-1)
    same_rows(mined(tmp_path / "a", texts), mined(tmp_path / "b", texts, num_workers=2), 0)


# --- what goes on ---------------------------------------------------------------------------------------------------


def test_a_run_goes_on_and_an_unreadable_text_is_listed(tmp_path: Path) -> None:
    items: list[Any] = texts_of_ids(20)
    texts = Texts(items, position=-1)
    reference = mined(tmp_path / "a", texts)
    mined(tmp_path / "b", texts, start=0, stop=11)
    again = mined(tmp_path / "b", texts)
    assert rows_of(again) == rows_of(reference) and again.coverage().missing == []
    same_rows(again, reference, 1e-9)
    broken = Texts([*items[:3], {"input_ids": [3, 4], "attention_mask": [0, 0]}, *items[4:]], position=-1)
    with pytest.warns(UserWarning, match="1 sample was skipped"):
        table = mined(tmp_path / "c", broken, on_error="skip")
    assert table.coverage().skipped == {3: "the attention_mask of the text lets no token through"}


def forked(path: Path, texts: Texts, kill_at: int) -> int:
    """Mine in a process of its own, which kills itself when it has listed so many shards; how it ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        add, listed = Table.add, []

        def counting(self: Table, record: Any) -> None:
            add(self, record)
            listed.append(record)
            if len(listed) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        Table.add = counting  # type: ignore[method-assign]
        mined(path, texts, batch_size=16, shard_size=32)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("n", [96, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_give_the_same_files(n: int, tmp_path: Path) -> None:
    texts = Texts(texts_of_ids(n), position=-1)
    ends = [forked(tmp_path / folder, texts, kill_at) for folder, kill_at in (("a", 0), ("b", 1), ("b", 1), ("b", 0))]
    assert ends == [0, -9, -9, 0]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert Table.open(tmp_path / "b").n_rows == n


# --- words ----------------------------------------------------------------------------------------------------------


def test_texts_are_read_by_a_tokenizer_and_shown_as_words() -> None:
    texts = Texts([("abc d", 2), ("ee", 1)], Letters(), position=-1)
    assert texts[0][0].tolist() == [[1, 2, 3, 4, 10, 5], [1] * 6, [1] * 5 + [2]] and texts[1][1] == 1
    words = texts.words(0)
    assert words.words == (">", "a", "b", "c", " ", "d") and words.special == {0} and words.position == 5
    assert texts.word(5) == "d"
    assert Texts([[3, 4]], position=0).words(0) == ((" 3", " 4"), frozenset(), 0)


def _fast(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if kind == "wordpiece":
        names = ["[UNK]", "[PAD]", "sun", "##ny", "day", "##s", "&"]
        inner = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        names = ["<s>", "s", "u", "n", "Ġ", "d", "Ċ", "<", "[UNK]", "Ġd"]
        inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("Ġ", "d")]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("kind", "text", "wanted", "of_ids"),
    [
        ("wordpiece", "sunny  days &", ("sun", "ny", "  day", "s", " &"), (" sun", "ny", " day", "s", " &")),
        ("bytes", "sun d\n<", ("s", "u", "n", " d", "\n", "<"), ("s", "u", "n", " d", "\n", "<")),
    ],
)
def test_words_keep_the_white_space(kind: str, text: str, wanted: tuple[str, ...], of_ids: tuple[str, ...]) -> None:
    tokenizer = _fast(kind)
    texts = Texts([text], tokenizer)
    assert texts.words(0).words == wanted and "".join(wanted) == text
    assert words_of(tokenizer, tokenizer(text)["input_ids"], None)[0] == of_ids


def test_the_tokenizer_is_in_the_recipe(tmp_path: Path) -> None:
    table = mined(tmp_path / "a", Texts([("abc d", 2), ("ee", 1)], Letters(), position=-1))
    about = json.loads(json.dumps(dict(table.header.recipe)))["texts"]
    assert about["position"] == -1 and about["fields"] == ["input_ids", "attention_mask"]
    assert about["tokenizer"]["class"] == "text_cases.Letters" and about["tokenizer"]["words"] == 11
    assert len(about["tokenizer"]["sha256"]) == 64


# --- what cannot be -------------------------------------------------------------------------------------------------


class Backward(AxisConcept):
    """Counts tokens from the end."""

    def code(self, activation: torch.Tensor) -> torch.Tensor:
        return super().code(activation).flip(-1)

    def relevance(self, activation: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        return super().relevance(activation, multiplier).flip(-1)


@pytest.mark.parametrize(
    ("concept", "layer", "message"),
    [
        (ChannelConcept(), "transformer.h.0.mlp.act", r"ChannelConcept\(\) has no value for each token; AxisConcept"),
        (Backward(), "transformer.h.0.mlp.act", r"AxisConcept\(axis=-1, groups=None\) has no value for each token"),
        (AxisConcept(1), "transformer.h.0.mlp.act", r"AxisConcept\(axis=1, groups=None\) has no value for each token"),
    ],
)
def test_concepts_along_the_tokens_are_refused(concept: Any, layer: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match=message):
        mined(tmp_path / "a", Texts(texts_of_ids(8), position=-1), layer_map={layer: concept})


@pytest.mark.parametrize(
    ("name", "position", "message"),
    [
        ("gpt2", None, r"needs an output of shape .*a language model needs Texts\(\.\.\., position=-1\)"),
        ("bert", -1, r"that of a language model is \(samples, positions, vocabulary\)"),
    ],
)
def test_outputs_of_another_kind_are_refused(name: str, position: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        mined(tmp_path / "a", Texts(texts_of_ids(8), position=position), name)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"input_ids": [3, 4], "attention_mask": [1]}, "different numbers of tokens: {'input_ids': 2, 'attention_mask"),
        ({"input_ids": []}, "the text has no tokens"),
        ({"input_ids": [0.5]}, "'input_ids' must be whole numbers"),
        ({"words": "a"}, "neither 'input_ids' nor 'text'; it has 'words'"),
        ("abc", "no tokenizer makes ids of them"),
        ({"input_ids": [3], "token_type_ids": [0]}, "the text has the fields .* and others have"),
    ],
)
def test_texts_that_are_none(item: Any, message: str) -> None:
    texts = Texts([{"input_ids": [3, 4], "attention_mask": [1, 1]}, item])
    assert texts.form == (("input_ids", "attention_mask"), True)
    with pytest.raises((ValueError, TypeError), match=message):
        texts[1]


def test_positions_and_preparations_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="position must be an int, 'each' or None, not 'last'"):
        Texts([[3]], position="last")
    with pytest.raises(TypeError, match="not True"):
        Texts([[3]], position=True)
    with pytest.raises(IndexError, match="the text has 2 tokens, of which none is at position -3"):
        Texts([[3, 4]], position=-3)[0]
    with pytest.raises(TypeError, match=r"texts are ids, which preprocess=.* cannot prepare"):
        mined(tmp_path / "a", Texts([[3, 4]], position=-1), preprocess=torch.neg)
    assert texts_in([[3, 4]]) is None
