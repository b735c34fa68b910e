"""Language models that are mined score tokens where a text is explained only, if their output layer does so by itself.

Each table is compared with that of `Whole`, an attribution of a type of its own, for which all positions are scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mining_cases import same_rows
from test_mining_texts import KINDS, NEURONS
from text_cases import model_of, texts_of_ids
from torch import Tensor, nn
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlus, UniformEpsilon
from crp.errors import StateError
from crp.visualization import Texts, mine

VOCABULARY = 60
LENGTHS = (3, 7, 1, 2, 7)


class Whole(CondAttribution):
    """Not asked for single positions, as its type may do anything."""


class Language(nn.Module):
    """Scores of tokens at each position, (texts, tokens, 60), by a linear layer that the model tells."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 5), nn.Linear(5, VOCABULARY)
        self.skip = nn.Linear(5, VOCABULARY)
        self.scored: list[int] = []
        self.head.register_forward_hook(lambda _, args, output: self.scored.append(output[..., 0].numel()))
        self.double().eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.read(torch.relu(self.mix(self.words(input_ids))).cumsum(1).tanh(), input_ids)

    def read(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        scores: Tensor = self.head(hidden)
        return scores


class Unknown(Language):
    get_output_embeddings = None  # type: ignore[assignment]


class Centred(Language):
    """Its scores at one position depend on those at all."""

    def read(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        scores = self.head(hidden)
        return scores - scores.mean(1, keepdim=True)


class PastTheHead(Language):
    """A part of the scores comes past the head; it is the same at all positions, so that the shape tells nothing."""

    def read(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        return self.head(hidden) + self.skip(hidden[:, :1])


class Flat(Language):
    """Its head knows of no texts."""

    def read(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        return self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


class Own(nn.Linear):
    """A type of its own, which may do anything."""


class OtherHead(Language):
    def __init__(self) -> None:
        super().__init__()
        self.head = Own(5, VOCABULARY).double().eval()
        self.head.register_forward_hook(lambda _, args, output: self.scored.append(output[..., 0].numel()))


class Moody(Language):
    """Its head is called for longer texts, and another layer for short ones."""

    def read(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        return self.head(hidden) if hidden.shape[1] > 3 else self.skip(hidden)


def texts_of(lengths: tuple[int, ...], position: Any) -> Texts:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]
    return Texts([{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids], position=position)


def mined(path: Path, kind: type[CondAttribution], model: Any, texts: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 16, "targets": "prediction", "progress": False} | changes
    composite, layers = settings.pop("composite", AttnLRP()), settings.pop("layers", {"mix": NEURONS})
    return mine(kind(model), texts, layers, composite, path, **settings)


def both(path: Path, model: Any, texts: Any, **changes: Any) -> None:
    """Mine in both ways, and compare."""
    tables = [mined(path / kind.__name__, kind, model, texts, **changes) for kind in (CondAttribution, Whole)]
    same_rows(*tables, 1e-12)


# --- models whose head scores each position by itself ---------------------------------------------------------------


@pytest.mark.parametrize(
    "composite",
    [AttnLRP(), CPLRP(), EpsilonPlus(), None, ZennitEpsilonPlus()],
    ids=["attn", "cp", "plus", "gradient", "zennit"],
)
@pytest.mark.parametrize("position", [-1, 0, "each"])
def test_tables_are_those_of_scores_of_all_positions(composite: Any, position: Any, tmp_path: Path) -> None:
    texts = texts_of(LENGTHS if position == "each" else (3, 7, 1, 7), position)
    both(tmp_path, Language(), texts, composite=composite, targets="top-3")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("position", [-2, "each"])
def test_models_of_hugging_face(name: str, position: Any, tmp_path: Path) -> None:
    family, layers, _ = KINDS[name]
    items = [item for item in texts_of_ids(7) if sum(item["attention_mask"]) > 2]
    both(tmp_path, model_of(family), Texts(items, position=position), layers=layers)


@pytest.mark.parametrize("modes", [["relevance", "activation"], ["activation"]], ids=["relevance", "activation"])
def test_one_position_of_each_text_is_scored(modes: list[str], tmp_path: Path) -> None:
    model = Language()
    mined(tmp_path, CondAttribution, model, texts_of((9, 9, 9), -1), modes=modes)
    # (the first 8 tokens of a text decide, by all of their positions and by one; then classes are chosen and explained)
    assert model.scored == [8, 8, 1, 3, 3]
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize("modes", [["relevance"], ["activation"]], ids=str)
def test_positions_of_a_text_start_together(modes: list[str], tmp_path: Path) -> None:
    """Scores of 32 positions are sent back once, and not for each; forward, they are scored as before."""
    flops = []
    for kind in (CondAttribution, Whole):
        with FlopCounterMode(display=False) as counter:
            mined(tmp_path / kind.__name__, kind, Language(), texts_of((33,), "each"), modes=modes, batch_size=32)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.5 * flops[1] if modes == ["relevance"] else flops[0] >= flops[1]


@pytest.mark.parametrize("batch_size", [2, 3, 5, 100])
def test_parts_of_texts_and_of_targets(batch_size: int, tmp_path: Path) -> None:
    """Rows of several texts and targets go back together as they come: also a position that is mined twice."""
    texts = texts_of(LENGTHS, "each")
    places = [0, 1, 2, 3, 4, 4, 5, 7, 8, 9, 11, 12, 13, 14]
    both(tmp_path, Language(), Subset(texts, places), targets="top-3", batch_size=batch_size)


def test_two_equal_texts_are_one(tmp_path: Path) -> None:
    one = {"input_ids": [3, 4, 5, 6], "attention_mask": [1, 1, 1, 1]}
    both(tmp_path, Language(), Texts([one, one, one], position="each"), targets="label")


# --- others, of which all positions are scored ----------------------------------------------------------------------


OTHERS: dict[str, tuple[type[Language], dict[str, Any]]] = {
    "no head is told": (Unknown, {}),
    "positions depend on each other": (Centred, {}),
    "a head without texts": (Flat, {}),
    "a head of another type": (OtherHead, {}),
    "scores are recorded": (Language, {"layers": {"mix": NEURONS, "head": NEURONS}}),
    "what goes into the head is recorded": (Language, {"layers": {"mix": NEURONS, "head.input": NEURONS}}),
    "epsilon is relative to all scores": (Language, {"composite": UniformEpsilon(epsilon=0.1, norm_scale=True)}),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("position", [-1, "each"])
@pytest.mark.filterwarnings("ignore:the model says something else of a text that is filled up")
def test_other_models_are_scored_at_all_positions(case: str, position: Any, tmp_path: Path) -> None:
    kind, changes = OTHERS[case]
    both(tmp_path, kind(), texts_of((3, 7, 4), position), **changes)


@pytest.mark.parametrize("position", [-1, "each"])
def test_what_comes_past_the_head_counts(position: Any, tmp_path: Path) -> None:
    both(tmp_path, PastTheHead(), texts_of((3, 7, 4), position))


def test_an_output_of_ones_own_is_whole(tmp_path: Path) -> None:
    model = Language()
    attribution = CondAttribution(model, output=lambda scores: scores.flip(1))
    mine(attribution, texts_of((7, 7), 0), {"mix": NEURONS}, AttnLRP(), tmp_path, targets="prediction", progress=False)
    assert model.scored == [14, 14]


def test_a_head_that_is_not_always_called_is_refused(tmp_path: Path) -> None:
    """The first batch has a long text, which decides; then another layer scores all positions of a short one."""
    with pytest.raises(Exception, match=r"scored one position of the first text, and .* has shape") as raised:
        mined(tmp_path, CondAttribution, Moody(), texts_of((7, 3), -1), batch_size=1)
    assert isinstance(raised.value.__cause__, StateError)
    whole = CondAttribution(Moody(), output=lambda scores: scores)
    settings: dict[str, Any] = {"targets": "prediction", "progress": False, "batch_size": 1}
    mine(whole, texts_of((7, 3), -1), {"mix": NEURONS}, AttnLRP(), tmp_path / "b", **settings)


def test_texts_of_one_token_decide_nothing(tmp_path: Path) -> None:
    model = Language()
    mined(tmp_path, CondAttribution, model, texts_of((1, 1, 6), -1), batch_size=1)
    assert model.scored == [1, 1, 1, 1, 6, 6, 1, 1, 1]
