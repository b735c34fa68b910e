"""Drawer of texts: a file for each text, with the relevance of its tokens through every concept that shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from crp.concepts import mask_of
from crp.image.texts import TextHeatmap, readable
from crp.visualization.report.addresses import Addresses
from crp.visualization.report.drawing import Drawer, Drawn, HeatmapFile, Row, scores, top_classes
from crp.visualization.report.render import TONES
from crp.visualization.report.suspects import Suspect, find_text_suspects
from crp.visualization.report.tiles import WHOLE, ShownText
from crp.visualization.table.manifest import Array
from crp.visualization.table.store import Table
from crp.visualization.text_references import (
    condition_at,
    layers_of_tokens,
    read_text,
    samples_by_text,
    text_of,
    token_ids,
)
from crp.visualization.without import predict_without

#: Tokens on either side of the strongest one, in a window; and of long texts, where they stand for their concepts.
REACH, FAR = 8, 100
#: Letters of a text that it is found by.
_LETTERS = 60
#: What files of heatmaps hold; those of another version are drawn again.
_VERSION = 3


class TextDrawer(Drawer):
    """Drawer of a dataset of texts. All heatmaps of a text share a forward pass."""

    pictures = False
    sample_word = "text"
    about_suspects = (
        "A concept of what a class is about speaks through many words, on all texts of the class. A mark, such as a "
        "name, a link or a heading, is one word on some of them, where little else is looked at. The figure is the "
        "product of the concept's share in the class, of how much more of its relevance lies on one word than of that "
        "of all else in its layer (in nats), and of the share of texts without it. It may be a word that the class is "
        "about: a suspect is a reason to look, not a proof."
    )
    suspects_in_short = "Concepts whose relevance stays on one word, on some texts of a class: look at these first."

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        texts = self.fv.texts
        assert texts is not None
        self._texts = texts
        if texts.position is not None:
            self.class_word = "tokens"
        self._found: dict[Row, tuple[Array, Drawn]] = {}
        self._words: dict[int, TextHeatmap] = {}
        asked = read_text(self.fv.dataset, int(Table.open(self.fv.path).rows().sample[0]), self.fv.device)
        self._layers_of_tokens = layers_of_tokens(self.fv.attribution, asked, self.layers)

    # --- what is drawn

    def files(self, wanted: Mapping[str, list[Row]], part: tuple[int, int]) -> list[HeatmapFile]:
        """A file for each text, with the rows that any page asks for; those of one text's positions stay together."""
        self._rows |= wanted
        of_sample: dict[int, dict[Row, None]] = {}
        for rows in wanted.values():
            for row in rows:
                of_sample.setdefault(row.sample, {})[row] = None
        jobs = {sample: self.job(Addresses.text_maps(sample), list(of_sample[sample])) for sample in sorted(of_sample)}
        together = samples_by_text(self.fv.dataset, list(jobs))
        return [jobs[sample] for samples in together[part[0] :: part[1]] for sample in samples]

    def draw(self, jobs: Sequence[HeatmapFile]) -> Iterator[int]:
        """Draw what is missing, and yield after each text how many more heatmaps are there."""
        of_sample = {job.rows[0].sample: job for job in jobs}
        for samples in samples_by_text(self.fv.dataset, list(of_sample)):
            waiting = [of_sample[sample] for sample in samples if not self._is_drawn(of_sample[sample])]
            if waiting:
                self._draw_text(waiting)
            yield sum(len(of_sample[sample].rows) for sample in samples)

    def _is_drawn(self, job: HeatmapFile) -> bool:
        """Whether all heatmaps of a text are in its file; those that are there are read in any case."""
        wanted = {(*row, self.below_of(row.layer)): row for row in job.rows}
        n = len(self._words_of(job.rows[0].sample).words)
        try:
            content = json.loads((self.folder / job.address).read_text(encoding="utf-8"))
            if content["key"] != job.key:
                return False
            for *about, heat, facts in content["rows"]:
                row, values = wanted.get(tuple(about)), np.asarray(heat, np.float32)
                if row is not None and values.shape == (n,):
                    self._found[row] = values, Drawn(*facts)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return all(row in self._found for row in job.rows)

    def _draw_text(self, jobs: Sequence[HeatmapFile]) -> None:
        """Draw the heatmaps of some positions of one text that are missing, and write the file of each."""
        asked = read_text(self.fv.dataset, jobs[0].rows[0].sample, self.fv.device)
        places = {job.rows[0].sample: self._position(job.rows[0].sample) for job in jobs}
        rows = [row for job in jobs for row in job.rows if row not in self._found]
        # (relevance starts at the output, for a target; or at a layer, whose concept is shown as it is)
        rows.sort(key=lambda row: (_start(row) or "", self.code_of(row)))
        for (start, _), alike in groupby(rows, key=lambda row: (_start(row), self.code_of(row))):
            group = list(alike)
            if start is not None:
                self._draw_rows(asked, group, places)
            else:  # (nothing is explained)
                n = len(self._words_of(group[0].sample).words)
                self._found |= dict.fromkeys(group, (np.zeros(n, np.float32), Drawn(WHOLE, [], None, None, None)))
        for job in jobs:
            found = []
            for row in job.rows:
                heat, facts = self._found[row]
                found.append([*row, self.below_of(row.layer), [float(str(value)) for value in heat], facts])
            self._write_file(job, json.dumps({"key": job.key, "rows": found}).encode())

    def _draw_rows(self, asked: Any, rows: Sequence[Row], places: Mapping[int, int | None]) -> None:
        """Draw rows of one text that start at the output, or at one layer."""
        attribution, size = self.fv.attribution, self.options.batch_size
        start_layer, init_rel = _start(rows[0]) or None, self.init_of(rows[0])
        masks: Any = {layer: mask_of(concept) for layer, concept in self.fv.layer_map.items()}
        parts = attribution.generate(
            asked.data,
            [{} if init_rel else self._condition(asked, row, places[row.sample]) for row in rows],
            self.composite,
            record_layer=self.layers_below(rows),
            mask_map=masks,
            start_layer=start_layer,
            init_rel=init_rel,
            batch_size=size,
            exclude_parallel=start_layer is None,
            verbose=False,
        )
        for start, part in zip(range(0, len(rows), size), parts, strict=True):
            some = rows[start : start + size]
            lower: dict[int, list[tuple[int, float]]] = {}
            for layer in self.layers_below(some):
                here = [i for i, row in enumerate(some) if self.below_of(row.layer) == layer]
                lower |= dict(zip(here, self.shares(part, layer, here), strict=True))
            said = _at(part.prediction, [places[row.sample] for row in some])
            before, predicted = scores(said, [row.target for row in some])
            if not self.exclusive:
                before = [None] * len(some)
            after = self._without(asked, some, places)
            heatmaps = part.heatmap.detach().cpu().double().numpy()
            for i, row in enumerate(some):
                top = top_classes(said, i) if row.layer is None and self.exclusive else []
                facts = Drawn(WHOLE, lower.get(i, []), before[i], after.get(i), predicted[i], top)
                self._found[row] = heatmaps[i].astype(np.float32), facts

    def _condition(self, asked: Any, row: Row, position: int | None) -> dict[str, Any]:
        through = {} if row.layer is None else {row.layer: [row.concept]}
        if row.target < 0:
            return through
        return condition_at(asked, self.fv.attribution.MODEL_OUTPUT_NAME, position, row.target) | through

    def _without(self, asked: Any, rows: Sequence[Row], places: Mapping[int, int | None]) -> dict[int, float | None]:
        """Scores of the targets when each row's concept is switched off, by the row's number."""
        found: dict[int, float | None] = {}
        if not self.exclusive:
            return found
        for layer in sorted({row.layer for row in rows if row.layer is not None and row.target >= 0}):
            here = [i for i, row in enumerate(rows) if row.layer == layer]
            mask = mask_of(self.fv.layer_map[layer])
            masks = [mask(i, [rows[number].concept], layer) for i, number in enumerate(here)]
            at = [place for i in here if (place := places[rows[i].sample]) is not None] or None
            said = predict_without(self.fv.attribution, asked.data, layer, masks, at)
            if said is not None:
                found |= dict(zip(here, scores(said, [rows[i].target for i in here])[0], strict=True))
        return found

    # --- what pages show

    def known(self, address: str) -> list[Drawn]:
        """What is known of the rows that were asked for by an address; nothing where they are not drawn."""
        found = [self._found.get(row) for row in self._rows.get(address, [])]
        return [one[1] for one in found if one is not None]

    def tile(self, address: str, place: int, alt: str, at: int | None = None) -> ShownText:
        """The tokens about the one on which a concept, or else the relevance, is strongest, in the colours of all."""
        row = self._rows[address][place]
        text = self._text(row, self._found[row][0], at if row.layer in self._layers_of_tokens else None)
        middle = text.strongest
        if middle is None:
            middle = int(np.abs(self._found[row][0]).argmax())
        window = text.window(REACH, middle)
        return ShownText(_tokens(window), min(middle, REACH), "", "", [])

    def whole(self, address: str, place: int, alt: str) -> ShownText:
        """All tokens of a text; through a concept, those about the strongest one."""
        row = self._rows[address][place]
        heat = self._found[row][0]
        return _about_strongest(self._text(row, heat), heat, len(heat) if row.layer is None else FAR)

    def far(self, sample: int) -> int:
        """Tokens on either side of the strongest one that stand for a concept in a long text."""
        return FAR if len(self._words_of(sample).words) > FAR + 1 else 0

    def apart(self, address: str, place: int, alt: str) -> ShownText:
        """What sets a concept apart in a text."""
        rows = self._rows[address]
        one, other = (self._found[rows[i]][0] for i in (place, 0))
        heat = one / (np.abs(one).sum() or 1.0) - other / (np.abs(other).sum() or 1.0)
        return _about_strongest(self._text(rows[place], heat), heat, FAR)

    def find_suspects(self, table: Table, targets: Sequence[int]) -> list[Suspect]:
        """Concepts whose relevance stays on one word."""
        layers = [layer for layer in self.layers if layer in self._layers_of_tokens]
        return find_text_suspects(table, layers, targets, partial(token_ids, self.fv.dataset), self._texts.word)

    def missing(self, table: Table) -> list[tuple[str, str]]:
        """What pages do not show of this table, and why."""
        found = super().missing(table)
        found.append(("Mean of a class", "tokens of different texts have no place in common"))
        found.append(("Maximized pictures", "a token is a whole number, which no gradient can change little by little"))
        if not self.has_labels(table):
            found.append(("Right and wrong", "labels of these texts were not what was explained"))
        if without := [layer for layer in self.layers if layer not in self._layers_of_tokens]:
            reason = f"{', '.join(without)}: its values are of a whole text, so that no token is underlined"
            found.append(("Strongest tokens and suspects", reason))
        return found

    def has_labels(self, table: Table) -> bool:
        """Whether labels are what is predicted; those of a text with a position are so where they were explained."""
        return not isinstance(self._texts.position, int) or table.header.recipe.get("targets") in (None, "label")

    def class_name(self, target: int, names: Mapping[int, str]) -> str:
        """How a class is called; a token by its word."""
        if self._texts.position is not None and target >= 0:
            return repr(readable(self._texts.word(target)))
        return super().class_name(target, names)

    def found_by(self, sample: int, name: str) -> str:
        """What the search finds a text by: its name and its first words."""
        text = " ".join(readable("".join(self._words_of(sample).words)).split())
        return f"{name}: {text if len(text) <= _LETTERS else f'{text[:_LETTERS]}…'}"

    # --- texts

    def _settings(self) -> list[Any]:
        return [_VERSION, self.identity]

    def _key(self, rows: Sequence[Row]) -> str:
        # (the file tells its rows, so that a text whose references have changed costs what is new)
        return super()._key(())

    def _words_of(self, sample: int) -> TextHeatmap:
        """A text without colours."""
        if sample not in self._words:
            self._words[sample] = text_of(self.fv.dataset, sample, None)
        return self._words[sample]

    def _position(self, sample: int) -> int | None:
        """Token whose prediction is explained."""
        return None if self._texts.position is None else self._words_of(sample).explained

    def _text(self, row: Row, heat: Array, strongest: int | None = None) -> TextHeatmap:
        return replace(self._words_of(row.sample), relevance=heat, strongest=strongest)


def _start(row: Row) -> str | None:
    """Layer where the relevance of a row starts; empty for the output, and None where nothing is explained."""
    return "" if row.target >= 0 else row.layer


def _at(prediction: Any, positions: Sequence[int | None]) -> Any:
    """Scores of each row: of a language model, those at the position that is explained."""
    if isinstance(prediction, Tensor) and prediction.dim() == 3 and positions[0] is not None:
        return prediction[list(range(len(prediction))), list(positions)]
    return prediction


def _about_strongest(text: TextHeatmap, heat: Array, reach: int) -> ShownText:
    """The tokens on either side of the one with the most relevance."""
    middle = int(np.abs(heat).argmax())
    return ShownText(_tokens(text.window(reach, middle)), min(middle, reach), "", "", [])


def _tokens(text: TextHeatmap) -> list[tuple[str, str]]:
    """Words of a text, each with the classes of its style."""
    found = []
    for place, (word, strength) in enumerate(zip(text.words, text.strengths.tolist(), strict=True)):
        step = round(abs(strength) * TONES)
        kinds = [f"{'p' if strength > 0 else 'n'}{step}"] if step else []
        kinds += ["special"] * (place in text.special) + ["strongest"] * (place == text.strongest)
        kinds += ["explained"] * (place == text.explained)
        found.append((readable(word), " ".join(kinds)))
    return found
