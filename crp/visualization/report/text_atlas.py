"""What an atlas of texts shows: heatmaps of texts, each in a file that is computed once, and the tokens of a page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from zennit.core import Composite

from crp.errors import InputError
from crp.image.texts import TextHeatmap, readable
from crp.visualization.feature import FeatureVisualization
from crp.visualization.report.addresses import Addresses
from crp.visualization.report.facts import LayerFacts, References
from crp.visualization.report.options import ReportOptions
from crp.visualization.report.render import TONES, percent
from crp.visualization.table.files import write_atomic
from crp.visualization.text_references import TextRow, read_text, samples_by_text, text_heatmaps, text_of

#: Tokens on either side of the strongest one, in a window.
REACH = 8
#: Letters of a text that it is called by.
_LETTERS = 60
#: What files of heatmaps hold; those of another version are computed again.
_VERSION = 1


class _Cell(NamedTuple):
    """A reference of a concept: the text, for which class or token, and how much."""

    layer: str
    concept: int
    sample: int
    target: int


class _Job(NamedTuple):
    """Heatmaps of a text to compute: through concepts, and the whole one for a target (-1 for none)."""

    sample: int
    cells: list[_Cell]
    target: int
    key: str

    @property
    def n_heatmaps(self) -> int:
        """How many there are."""
        return len(self.cells) + (self.target >= 0)


class ShownText(NamedTuple):
    """A text on a page.

    Attributes
    ----------
    tokens : list of (str, str)
        Each with the classes of its style.
    href : str
        Page of the text; empty on that page itself.
    value, note : str
        Written beside it.
    """

    tokens: list[tuple[str, str]]
    href: str = ""
    value: str = ""
    note: str = ""


class TextAtlas:
    """What the pages of an atlas of texts show.

    Parameters
    ----------
    fv : FeatureVisualization
        Of a dataset of texts.
    composite : zennit Composite, or None for the plain gradient
    facts : dict of str to LayerFacts
        In the order of the model.
    cells : dict of (layer, concept) to References
    class_names : mapping of int to str
        Of all classes with a page; tokens are called by their words.
    options : ReportOptions
    folder : Path
    identity : str
        What every heatmap depends on: model, data, composite.

    Raises
    ------
    ValueError
        If a finding has pictures, which have no place here.
    """

    def __init__(
        self,
        fv: FeatureVisualization,
        composite: Composite | None,
        facts: Mapping[str, LayerFacts],
        cells: Mapping[tuple[str, int], References],
        class_names: Mapping[int, str],
        options: ReportOptions,
        folder: Path,
        identity: str,
    ) -> None:
        if pictured := [one.title for one in options.findings if one.tiles]:
            raise InputError(f"finding {pictured[0]!r} has pictures, and an atlas of texts shows none; leave them out")
        self.fv, self.composite, self.facts, self.options = fv, composite, facts, options
        self.folder, self.identity = folder, identity
        self.addresses = Addresses(list(facts))
        self._names = class_names
        #: Addresses of the files of heatmaps.
        self.used: set[str] = set()
        self._heat: dict[_Cell | int, Tensor] = {}
        self.cells = cells
        self.samples: dict[int, int] = {}
        for references in self.cells.values():
            for reference in references.samples():
                self.samples.setdefault(reference.sample, reference.target)
        self.class_names: dict[int, str] = {target: self.name(target) for target in class_names}
        self.sample_names = {sample: self._called(sample) for sample in sorted(self.samples)}

    def _called(self, sample: int) -> str:
        words = "".join(text_of(self.fv.dataset, sample, None).words)
        text = " ".join(readable(words).split())
        return f"text {sample}: {text if len(text) <= _LETTERS else f'{text[:_LETTERS]}…'}"

    def name(self, target: int) -> str:
        """Name of a class, or the word of a token."""
        texts = self.fv.texts
        if texts is not None and self._of_tokens and target >= 0:
            return repr(readable(texts.word(target)))
        return self._names.get(target, str(target))

    def label(self, layer: str, concept: int) -> str:
        """What a concept is called."""
        own = self.options.concept_names.get((layer, concept), "")
        return f"{layer} · {concept}{f' {own}' if own else ''}"

    def draw(self, best: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]], **bar: Any) -> None:
        """Compute the heatmaps that are missing, or a part of them; those of one text share a forward pass."""
        wanted: dict[int, list[_Cell]] = {sample: [] for sample in self.samples}
        for (layer, concept), references in self.cells.items():
            for one in references.samples():
                wanted[one.sample].append(_Cell(layer, concept, one.sample, one.target))
        top = list(self.facts)[-1]
        for sample, target in self.samples.items():
            few = best[sample].get(top, [])[: self.options.n_sample_concepts]
            wanted[sample] += [_Cell(top, concept, sample, target) for concept, _ in few]
        texts = samples_by_text(self.fv.dataset, list(wanted))
        part, n_parts = self.options.part or (0, 1)
        for samples in tqdm(texts[part::n_parts], desc="Heatmaps", **bar):
            jobs = [self._job(sample, wanted[sample]) for sample in samples]
            self._compute([job for job in jobs if not self._is_known(job)])

    def _job(self, sample: int, cells: Sequence[_Cell]) -> _Job:
        """Heatmaps of a text, with the key of all that they depend on."""
        known = [cell for cell in dict.fromkeys(cells) if cell.target >= 0]
        target = self.samples[sample]
        content = json.dumps([_VERSION, self.identity, known, target])
        return _Job(sample, known, target, hashlib.sha256(content.encode()).hexdigest()[:32])

    def _is_known(self, job: _Job) -> bool:
        """Whether a text's heatmaps are in their file, which is read."""
        address = Addresses.text_maps(job.sample)
        self.used.add(address)
        try:
            content = json.loads((self.folder / address).read_text(encoding="utf-8"))
            is_right, found = content["key"] == job.key, torch.tensor(content["heat"], dtype=torch.float64)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not is_right or len(found) != job.n_heatmaps:
            return False
        self._keep(job, found)
        return True

    def _compute(self, jobs: Sequence[_Job]) -> None:
        """Compute the heatmaps of some positions of one text, and write each to its file."""
        rows: list[TextRow] = []
        for job in jobs:
            at = read_text(self.fv.dataset, job.sample, self.fv.device).positions
            position = None if at is None else at[0]
            rows += [TextRow((cell.target,), cell.layer, cell.concept, position=position) for cell in job.cells]
            rows += [TextRow((job.target,), position=position)] if job.target >= 0 else []
        if not rows:
            return
        asked = read_text(self.fv.dataset, jobs[0].sample, self.fv.device)
        found = text_heatmaps(
            self.fv.attribution, asked, rows, self.fv.layer_map, self.composite, self.options.batch_size
        )
        parts = torch.split(found.cpu().double(), [job.n_heatmaps for job in jobs])
        for job, heat in zip(jobs, parts, strict=True):
            self._keep(job, heat)
            numbers = [[float(f"{value:.9g}") for value in row] for row in heat.tolist()]
            path = self.folder / Addresses.text_maps(job.sample)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"key": job.key, "heat": numbers}).encode())

    def _keep(self, job: _Job, found: Tensor) -> None:
        self._heat |= dict(zip(job.cells, found, strict=False))
        if job.target >= 0:
            self._heat[job.sample] = found[-1]

    def whole(self, sample: int) -> ShownText:
        """A text with the relevance of the class or token that it is shown for."""
        return ShownText(_tokens(text_of(self.fv.dataset, sample, self._heat.get(sample))))

    def through(self, layer: str, concept: int, sample: int, target: int) -> ShownText:
        """A text with the relevance that flows through a concept."""
        heat = self._heat.get(_Cell(layer, concept, sample, target))
        return ShownText(_tokens(text_of(self.fv.dataset, sample, heat)))

    @property
    def classes(self) -> str:
        """What targets are."""
        return "tokens" if self._of_tokens else "classes"

    @property
    def _of_tokens(self) -> bool:
        return self.fv.texts is not None and self.fv.texts.position is not None

    def references(
        self, layer: str, concept: int, mode: str, n: int | None = None, target: int | None = None
    ) -> list[ShownText]:
        """Windows about the strongest tokens of a concept's references, those for a target first."""
        facts, chosen = self.facts[layer], self.cells[layer, concept][mode == "activation"]
        chosen = sorted(chosen, key=lambda one: target is not None and one.target != target)
        found = facts.relevant if mode == "relevance" else facts.active
        assert found is not None
        normed = (self.fv.RelMax if mode == "relevance" else self.fv.ActMax).abs_norm
        places = list(zip(found.sample[:, concept].tolist(), found.target[:, concept].tolist(), strict=True))
        shown = []
        for one in chosen[:n]:
            at = int(found.position[places.index((one.sample, one.target)), concept])
            heat = self._heat.get(_Cell(layer, concept, one.sample, one.target))
            window = text_of(self.fv.dataset, one.sample, heat, at).window(REACH)
            value = percent(one.value) if normed else f"{one.value:.3g}"
            note = f"for {self.name(one.target)}" if one.target >= 0 else ""
            shown.append(ShownText(_tokens(window), Addresses.sample(one.sample), value, note))
        return shown


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
