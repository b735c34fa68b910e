"""Texts as samples: token ids and what goes with them, packed into one tensor, and the words that they stand for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset

from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.visualization.mining.datasets import indexed
from crp.visualization.mining.marks import Source, _behind, source_of
from crp.wording import shortened

#: What a model may read of every token, beside its id.
FIELDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
#: Entries of the last row of a packed text: a token of the text, and the one whose prediction is explained.
TOKEN, EXPLAINED = 1, 2


class Words(NamedTuple):
    """Tokens of a text as they are shown.

    Attributes
    ----------
    words : tuple of str
        With the white space before them.
    special : frozenset of int
        Places of tokens that stand for no text, such as the begin.
    position : int or None
        Place of the token whose prediction is explained.
    """

    words: tuple[str, ...]
    special: frozenset[int]
    position: int | None


class _Text(NamedTuple):
    """Fields of one text, each (tokens,), without padding; its words where they are known, and its label."""

    fields: dict[str, Tensor]
    named: bool
    text: str | None
    label: Any


class Texts:
    """Dataset of texts, for mining language models and classifiers of texts.

    Padding is taken off, so that it has no part in anything: ``attention_mask`` says which tokens are of the text. A
    batch of several lengths is filled up on the right while it is attributed, where that changes nothing.

    Parameters
    ----------
    dataset : Dataset
        Items are dicts as tokenizers give them, with ``"input_ids"`` and maybe ``"attention_mask"``,
        ``"token_type_ids"`` and ``"position_ids"``; or ids of shape (tokens,); or texts, in a dict or by themselves.
        The last three may be the first of a pair with a label.
    tokenizer : callable, optional
        ``tokenizer(text)`` gives such a dict, or a list of ids; as those of Hugging Face do. It also says which words
        ids stand for.
    position : int or "each", optional
        For language models, whose output is (batch, positions, vocabulary): the token at which the prediction of the
        next one is explained; -1 is the last of the text. ``"each"`` makes a sample of every token but the last of a
        text, whose label is the token that follows. None is for classifiers, whose output is (batch, classes).
    text, label : str
        Keys of a dict that hold the text and, if there is one, the label.

    Raises
    ------
    TypeError, ValueError
        If the position is none.

    Examples
    --------
    >>> texts = Texts([{"input_ids": [0, 5, 7], "attention_mask": [0, 1, 1], "label": 3}], position=-1)
    >>> data, label = texts[0]
    >>> data.tolist(), label
    ([[5, 7], [1, 1], [1, 2]], 3)
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any = None,
        *,
        position: int | str | None = None,
        text: str = "text",
        label: str = "label",
    ) -> None:
        if isinstance(position, str) and position != "each":
            raise InputError(f"position must be an int, 'each' or None, not {position!r}")
        if not isinstance(position, int | str | None) or isinstance(position, bool):
            raise InputTypeError(f"position must be an int, 'each' or None, not {position!r}")
        if isinstance(dataset, Texts):
            raise InputTypeError("the dataset is of Texts already")
        if isinstance(tokenizer, str) or not (tokenizer is None or callable(tokenizer) or hasattr(tokenizer, "decode")):
            raise InputTypeError(
                f"tokenizer must be a function of a text, such as AutoTokenizer.from_pretrained(...), not {tokenizer!r}"
            )
        self.dataset = indexed(dataset)
        self.tokenizer, self.position, self.text, self.label = tokenizer, position, text, label
        #: For "each": text and position of every sample.
        self._places: list[tuple[int, int]] | None = None
        self._known_form: tuple[tuple[str, ...], bool] | None = None
        if position == "each":
            self._places = [(i, at) for i in range(len(self.dataset)) for at in range(self._count(i))]
            if not self._places and len(self.dataset):
                raise InputError(
                    "position='each' explains the token that follows each other one, and every text has one token only"
                )

    def __len__(self) -> int:
        return len(self.dataset) if self._places is None else len(self._places)

    def __repr__(self) -> str:
        return f"Texts({type(self.dataset).__name__}, position={self.position!r})"

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        text, at = self._read(index)
        if (names := tuple(text.fields)) != self.form[0]:
            raise InputError(f"the text has the fields {names}, and others have {self.form[0]}")
        fields, n = list(text.fields.values()), len(text.fields["input_ids"])
        kinds = torch.full((n,), TOKEN)
        label = text.label
        if at is not None:
            kinds[at] = EXPLAINED
        if self._places is not None:
            assert at is not None
            label = int(text.fields["input_ids"][at + 1])
        return torch.stack([*fields, kinds]), label

    def source(self, index: int) -> Source | None:
        """File of a text, where the dataset tells it."""
        return source_of(self.dataset, self.place(index))

    def place(self, index: int) -> int:
        """Which text of the dataset a sample is of; those of several positions share one."""
        return index if self._places is None else self._places[index][0]

    def words(self, index: int) -> Words:
        """Tokens of a sample as they are shown."""
        text, at = self._read(index)
        words, special = words_of(self.tokenizer, text.fields["input_ids"].tolist(), text.text)
        return Words(words, special, at)

    def word(self, token: int) -> str:
        """What a single id stands for."""
        return words_of(self.tokenizer, [token], None)[0][0]

    @property
    def padding(self) -> int:
        """Id that texts are filled up with."""
        own = getattr(self.tokenizer, "pad_token_id", None)
        return own if isinstance(own, int) else 0

    @property
    def form(self) -> tuple[tuple[str, ...], bool]:
        """Fields of a packed text, in order; and whether the model is called by their names, or with ids alone."""
        if self._known_form is None:
            self._known_form = self._find_form()
        return self._known_form

    def _find_form(self) -> tuple[tuple[str, ...], bool]:
        for index in range(min(len(self.dataset), 100)):
            try:
                text = self._text(index)
                return tuple(text.fields), text.named
            except Exception:  # an unreadable text, which mining will report
                continue
        return ("input_ids",), False

    def describe(self) -> dict[str, Any]:
        """What a table says of its texts."""
        return {
            "position": self.position,
            "fields": list(self.form[0]),
            "tokenizer": None if self.tokenizer is None else _describe_tokenizer(self.tokenizer),
        }

    def _count(self, index: int) -> int:
        try:
            return max(len(self._text(index).fields["input_ids"]) - 1, 0)
        except Exception:  # an unreadable text, which mining will report
            return 1

    def _read(self, index: int) -> tuple[_Text, int | None]:
        """A sample's text, and the place of the token whose prediction is explained."""
        if self._places is not None:
            of_text, at = self._places[index]
            return self._text(of_text), at
        text = self._text(index)
        if self.position is None:
            return text, None
        n, place = len(text.fields["input_ids"]), int(self.position)
        if not -n <= place < n:
            raise OutOfRangeError(f"the text has {n} tokens, of which none is at position {place}")
        return text, place % n

    def _text(self, index: int) -> _Text:
        item = self.dataset[index]
        label = None
        if isinstance(item, tuple | list) and len(item) == 2 and not isinstance(item[0], int):
            item, label = item
        if isinstance(item, Mapping):
            label = item.get(self.label, label)
        words = item if isinstance(item, str) else item.get(self.text) if isinstance(item, Mapping) else None
        found: Any = item
        if isinstance(item, Mapping) and "input_ids" in item:
            pass
        elif isinstance(words, str):
            if self.tokenizer is None:
                raise InputTypeError(
                    "the dataset gives texts, and no tokenizer makes ids of them; give Texts(..., tokenizer)"
                )
            found = self.tokenizer(words)
        elif isinstance(item, Mapping):
            raise InputTypeError(
                f"a text has neither 'input_ids' nor {self.text!r}; it has {', '.join(map(repr, item))}. Say where the "
                "text is: Texts(..., text=...)"
            )
        named = isinstance(found, Mapping)
        fields = _without_padding(_fields(found) if named else {"input_ids": _ids(found, "input_ids")})
        return _Text(fields, named, words if isinstance(words, str) else None, label)


def texts_in(dataset: Any) -> Texts | None:
    """The texts that a dataset is of, also behind a `torch.utils.data.Subset`; None for anything else."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, Texts) else None


def words_in(dataset: Any, index: int) -> Words:
    """Words of a sample of a dataset of texts, which may be behind a `torch.utils.data.Subset`."""
    texts, number = _behind(dataset, index)
    words: Words = texts.words(number)
    return words


def place_in(dataset: Any, index: int) -> int:
    """Which text a sample of such a dataset is of."""
    texts, number = _behind(dataset, index)
    return int(texts.place(number))


def n_items_of(dataset: Any, samples: Sequence[int]) -> int:
    """Number of items that samples are made of: fewer than samples where these are positions of one text."""
    return len({place_in(dataset, sample) if texts_in(dataset) is not None else sample for sample in samples})


def words_of(tokenizer: Any, ids: Sequence[int], text: str | None) -> tuple[tuple[str, ...], frozenset[int]]:
    """Words that ids stand for, with the white space before them, and the places of special tokens.

    Parameters
    ----------
    tokenizer : object
        As those of Hugging Face; without ``convert_ids_to_tokens``, its ``decode([id])``; None shows the numbers.
    ids : sequence of int
    text : str, optional
        Where the tokenizer tells offsets in it, words are those of the text itself.
    """
    if tokenizer is None:
        return tuple(f" {token}" for token in ids), frozenset()
    marks = set(getattr(tokenizer, "all_special_ids", ()))
    special = frozenset(place for place, token in enumerate(ids) if token in marks)
    if text is not None and getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True)
        if list(found["input_ids"]) == list(ids):
            return _slices(text, found["offset_mapping"], special, tokenizer, ids), special
    begins = " " if _has_wordpieces(tokenizer) else ""
    return tuple(
        _word(tokenizer, token, begins if place not in special else "") for place, token in enumerate(ids)
    ), special


def _has_wordpieces(tokenizer: Any) -> bool:
    """Whether pieces that go on a word are marked, and the others, which begin one, are not."""
    number = getattr(tokenizer, "convert_tokens_to_ids", None)
    return callable(number) and number("##s") not in (None, getattr(tokenizer, "unk_token_id", None))


def _slices(text: str, offsets: Any, special: frozenset[int], tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Parts of a text, of which each ends where a token does."""
    words, end = [], 0
    for place, (_, stop) in enumerate(offsets):
        if place in special and stop <= end:
            words.append(_word(tokenizer, ids[place]))
            continue
        words.append(text[end:stop])
        end = max(end, stop)
    if words and end < len(text):
        words[-1] += text[end:]
    return tuple(words)


def _word(tokenizer: Any, token: int, begins: str = "") -> str:
    """What one id stands for, with white space before it where a word begins."""
    named = getattr(tokenizer, "convert_ids_to_tokens", None)
    piece = named(token) if callable(named) else None
    if isinstance(piece, str):
        if piece.startswith("\N{LOWER ONE EIGHTH BLOCK}"):  # (of SentencePiece)
            return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        if piece.startswith("##"):  # (of WordPiece: the word goes on)
            return piece[2:]
    decode = getattr(tokenizer, "decode", None)
    word = decode([token]) if callable(decode) else piece
    return f"{begins}{word}" if word is not None else f" {token}"


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Type and name of a tokenizer, and a hash of its vocabulary, if it tells it."""
    about: dict[str, Any] = {"class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"}
    if name := getattr(tokenizer, "name_or_path", None):
        about["named"] = str(name)
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if callable(vocabulary):
        entries = sorted(vocabulary().items(), key=lambda pair: (pair[1], pair[0]))
        about |= {"words": len(entries), "sha256": hashlib.sha256(json.dumps(entries).encode()).hexdigest()}
    return about


def _fields(item: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model reads of every token, each (tokens,)."""
    if item.get("input_ids") is None:
        raise InputError(f"the tokenizer gives no 'input_ids'; it gives {', '.join(map(repr, item))}")
    found = {name: _ids(item[name], name) for name in FIELDS if item.get(name) is not None}
    lengths = {name: len(field) for name, field in found.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the fields of a text have different numbers of tokens: {lengths}")
    return found


def _ids(values: Any, name: str) -> Tensor:
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"{name!r} must be whole numbers of shape (tokens,), not {shortened(values)}") from error
    if ids.dim() == 2 and len(ids) == 1:  # (as a tokenizer gives with return_tensors="pt")
        ids = ids[0]
    if not ids.numel():
        raise InputError("the text has no tokens")
    if ids.dim() != 1 or ids.is_floating_point() or (ids.dtype == torch.bool and name == "input_ids"):
        raise InputTypeError(
            f"{name!r} must be whole numbers of shape (tokens,), not {tuple(ids.shape)} of {ids.dtype}"
        )
    return ids.to(torch.int64)


def _without_padding(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fields from the first to the last token that the mask lets through."""
    mask = fields.get("attention_mask")
    if mask is None:
        return fields
    if ((mask != 0) & (mask != 1)).any():
        raise InputError(f"the attention_mask of the text must be 0 and 1; it holds {sorted(set(mask.tolist()))}")
    inside = mask.nonzero().flatten()
    if not len(inside):
        raise InputError("the attention_mask of the text lets no token through")
    if len(inside) <= int(inside[-1] - inside[0]):
        raise InputError("the attention_mask of the text leaves out tokens between others, and not at its ends")
    return {name: field[int(inside[0]) : int(inside[-1]) + 1] for name, field in fields.items()}
