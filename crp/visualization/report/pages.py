"""Content of a report's pages, as plain data for the templates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from crp.visualization.report.addresses import Addresses, slug
from crp.visualization.report.drawing import Drawer, Drawn
from crp.visualization.report.facts import LayerFacts, Reference, References
from crp.visualization.report.kept import CLASSES_A_PART, KeptResults, about_concepts, classes_of, ways_of
from crp.visualization.report.options import ReportOptions
from crp.visualization.report.picture_drawing import picture_file
from crp.visualization.report.render import Renderer
from crp.visualization.report.search import write_search
from crp.visualization.report.spliced import Unexplained
from crp.visualization.report.suspects import Suspect
from crp.visualization.report.tiles import AnyShown
from crp.wording import counted, percent

#: Concepts on a part of a layer's page, classes in a concept's table, samples on a class's page, tiles in a small row.
CARDS, CLASSES, SAMPLES, FEW = 240, 12, 24, 5


@dataclass
class Atlas:
    """Everything that pages are made of.

    Attributes
    ----------
    drawer : Drawer
    renderer : Renderer
    options : ReportOptions
    addresses : Addresses
    facts : mapping of layer to LayerFacts
        From the input to the output.
    cells : mapping of (layer, concept) to References
        In the order of the file of heatmaps.
    suspects : list of Suspect
    names, class_names : mapping of int to str
        Of all classes that have a name, and of those with a page.
    explained_for : mapping of sample to list of targets
        Samples that are shown, with a page for each of these classes.
    strongest : mapping of layer to mapping of (sample, target) to list of (concept, share)
        Concepts with the largest shares in each of them.
    sample_names : mapping of sample to str
    labels : mapping of sample to int
        Where a label is one class.
    predictions : mapping of sample to (int, float)
        Class, where the table has it, and its probability; 0 or NaN if there is none.
    kept : KeptResults
        What is kept beside the table: prototypes, clusters and the like.
    unexplained : mapping of layer to Unexplained
        Of layers that are latents of a spliced autoencoder.
    """

    drawer: Drawer
    renderer: Renderer
    options: ReportOptions
    addresses: Addresses
    facts: Mapping[str, LayerFacts]
    cells: Mapping[tuple[str, int], References]
    suspects: Sequence[Suspect]
    names: Mapping[int, str]
    class_names: Mapping[int, str]
    explained_for: Mapping[int, Sequence[int]]
    strongest: Mapping[str, Mapping[tuple[int, int], list[tuple[int, float]]]]
    sample_names: Mapping[int, str]
    labels: Mapping[int, int]
    predictions: Mapping[int, tuple[int, float]]
    kept: KeptResults
    unexplained: Mapping[str, Unexplained]

    # --- words

    def label(self, layer: str, concept: int) -> str:
        """How a concept is called."""
        return f"{layer} · {self.short_label(layer, concept)}"

    def short_label(self, layer: str, concept: int) -> str:
        """How it is called where the layer is known: its number, and its name, if it has one."""
        return f"{concept} {self.options.concept_names.get((layer, concept), '')}".rstrip()

    def class_name(self, target: int) -> str:
        """How a class is called."""
        return self.drawer.class_name(target, self.names)

    def class_address(self, target: int) -> str:
        """Page of a class; the overview where it has none."""
        return Addresses.label(target) if target in self.class_names else "index.html"

    def class_of(self, suspect: Suspect) -> str:
        """Class that a suspect is of, in words."""
        return self.class_name(suspect.target) if suspect.target >= 0 else "all classes"

    @cached_property
    def about(self) -> dict[tuple[str, int], list[tuple[str, str]]]:
        """What kept results say of single concepts, and where."""
        return about_concepts(self.kept, self.addresses, self.class_name)

    def notes(self, layer: str) -> list[str]:
        """What is to be said of all concepts of a layer."""
        return [self.unexplained[layer].sentence] if layer in self.unexplained else []

    def maximized(self, layer: str, concept: int) -> tuple[str, str] | None:
        """Address of a concept's maximized picture, and how it was made; None where there is none."""
        if (layer, concept) not in self.kept.maximized:
            return None
        picture, made = self.kept.maximized[layer, concept]
        content = torch.from_numpy(picture / 255).permute(2, 0, 1)
        return self.drawer.store(*picture_file(content, self.options.picture_size)), made

    # --- tiles

    def known_relevant(self, layer: str, concept: int) -> list[Drawn]:
        """What is known of the references in which a concept is most relevant."""
        return self.known(layer, concept)[: len(self.cells[layer, concept].relevant)]

    def known(self, layer: str, concept: int) -> list[Drawn]:
        """What is known of these references."""
        return self.drawer.known(self.addresses.concept_maps(layer, concept))

    def reference(
        self, layer: str, concept: int, place: int, one: Reference, value: str, href: str | None = None
    ) -> AnyShown | None:
        """Tile of a reference, whose heatmap is in a place of the concept's file; None where it is not drawn."""
        known = self.known(layer, concept)
        if place >= len(known):
            return None
        said = zip(("is relevant", "is active", "speaks against it"), self.cells[layer, concept], strict=True)
        what = [words for words, references in said for _ in references][place]
        # (a concept is active whatever is explained)
        target = self.labels.get(one.sample, -1) if what == "is active" else one.target
        lines = [*self.predicted(one.sample, target, known[place]), (self.sample_names[one.sample], "")]
        alt = f"{self.sample_names[one.sample]}, {self.class_name(target)}, where {layer} {concept} {what}"
        tile = self.drawer.tile(self.addresses.concept_maps(layer, concept), place, alt, one.position)
        return tile._replace(
            href=self.sample_page(one.sample, one.target) if href is None else href, value=value, lines=lines
        )

    def predicted(self, sample: int, target: int, facts: Drawn) -> list[tuple[str, str]]:
        """Lines that tell the label and the prediction, in one where they agree; the class where there is no label."""
        label = self.labels.get(sample)
        of_class = target if label is None else label
        own = [(self.class_name(of_class), "")] if of_class >= 0 else []
        predicted, chance = self.predictions.get(sample, (facts.predicted, 0.0))
        if predicted is None:
            return own
        word = self.class_name(predicted) + (f" {percent(chance)}" if chance > 0 else "")
        if label is None:
            return [*(own if of_class != predicted else []), (f"predicted {word}", "")]
        if predicted == label:
            return [(f"\N{CHECK MARK} {word}", "ok")]
        return [*own, (f"\N{BALLOT X} {word}", "bad")]

    def best(self, layer: str, concept: int, n: int = 1, target: int | None = None) -> list[AnyShown]:
        """Tiles of a concept's best references, which link to the concept; those of a class first."""
        relevant = list(enumerate(self.cells[layer, concept].relevant))
        relevant.sort(key=lambda one: target is not None and one[1].target != target)
        href = self.addresses.concept(layer, concept)
        found = (self.reference(layer, concept, place, one, "", href) for place, one in relevant[:n])
        return [one for one in found if one is not None]

    def first(self, layer: str, concept: int, target: int | None = None) -> AnyShown | None:
        """Tile of its best reference; None where it has none."""
        return next(iter(self.best(layer, concept, 1, target)), None)

    def shown_by_others(self, suspect: Suspect) -> str:
        """Words that say so where what stands for a suspect is of other classes; empty where it is of its own."""
        known = {one.target for one in self.cells[suspect.layer, suspect.concept].relevant}
        is_shown = suspect.target < 0 or suspect.target in known
        return "" if is_shown else f"shown by {self.drawer.sample_word}s of other classes"

    def card(
        self, layer: str, concept: int, value: str, lines: list[tuple[str, str]], target: int | None = None
    ) -> AnyShown | None:
        """Tile of a concept with its name; None where it has no references."""
        tile = self.first(layer, concept, target)
        return None if tile is None else tile._replace(value=value, lines=lines)

    def chip(self, layer: str, concept: int, note: str) -> dict[str, Any]:
        """Small link to a concept, with its best picture and a note."""
        tile, note = self.first(layer, concept), note.replace("-", "\N{MINUS SIGN}")
        return {
            "href": self.addresses.concept(layer, concept),
            "tile": None if tile is None else tile._replace(href=""),
            "label": self.short_label(layer, concept),
            "note": note,
        }

    # --- pages

    def write(self) -> None:
        """Render all pages but the first and the concepts'."""
        for layer in self.facts:
            self._write_layer(layer)
        for target in self.class_names:
            self._write_class(target)
        self._write_suspects()
        names = {sample: self.drawer.found_by(sample, self.sample_names[sample]) for sample in self.explained_for}
        write_search(
            self.renderer, self.addresses, self.facts, self.class_names, names, self.options.concept_names,
            self.kept.texts(),
        )  # fmt: skip

    def _write_layer(self, layer: str) -> None:
        facts = self.facts[layer]
        mean = facts.mean
        order = np.argsort(-mean, kind="stable").tolist()
        suspicion: dict[int, float] = defaultdict(float)
        for one in self.suspects:
            if one.layer == layer:
                suspicion[one.concept] = max(suspicion[one.concept], one.score)
        n_parts = max(1, -(-len(order) // CARDS))
        for part in range(n_parts):
            cards, chosen = [], order[part * CARDS : (part + 1) * CARDS]
            for concept in chosen:
                best = int(facts.shares.value[:, concept].argmax()) if len(facts.shares.targets) else 0
                most = self.class_name(int(facts.shares.targets[best])) if len(facts.shares.targets) else ""
                lines = [(f"{percent(float(mean[concept]))}, most for {most}", "")]
                card = self.card(layer, concept, self.short_label(layer, concept), lines)
                if card is not None:
                    highest = float(facts.shares.value[best, concept])
                    orders = {
                        "share": round(float(mean[concept]), 6),
                        "specific": round(highest / max(float(mean[concept]), 1e-9), 4),
                        "suspect": round(suspicion[concept], 6),
                        "number": concept,
                    }
                    cards.append((card, orders))
            n = len(chosen) - len(cards)
            left_out = f" {counted(n, 'concept here is', 'concepts here are')} relevant for no sample, and left out."
            labels = [f"{p * CARDS + 1} to {min(len(order), (p + 1) * CARDS)}" for p in range(n_parts)]
            page = {
                "name": layer,
                "trail": [("Atlas", "index.html"), (layer, "")],
                "lead": f"{counted(len(order), 'concept')}, those with the largest share of the relevance first."
                + left_out * (n > 0),
                "parts": [(text, self.addresses.layer(layer, p), p == part) for p, text in enumerate(labels)],
                "notes": self.notes(layer),
                "slug": slug(f"{layer}-{part}"),
                "cards": cards,
            }
            address = self.addresses.layer(layer, part)
            self.renderer.page(address, "layer.html", f"{layer} — concept atlas", page=page)

    def _write_class(self, target: int) -> None:
        name, classes, word = self.class_name(target), list(self.class_names), self.drawer.sample_word
        place = classes.index(target)
        before, after = (
            (self.class_names[one], Addresses.label(one)) if one is not None else None
            for one in (classes[place - 1] if place else None, next(iter(classes[place + 1 :]), None))
        )
        rows = next(iter(self.facts.values())).shares
        n_rows = int(rows.rows[rows.targets == target].sum())
        samples = self._samples_of(target)
        suspects = [
            (self.label(one.layer, one.concept), self.addresses.concept(one.layer, one.concept), one.reason)
            for one in self.suspects
            if one.target == target
        ]
        wrong = sum(any(kind == "bad" for _, kind in one.lines) for one in samples)
        page = {
            "name": name,
            "trail": [("Atlas", "index.html"), (name, "")],
            "before": before,
            "after": after,
            "lead": f"{counted(n_rows, word)}. For each layer, the concepts that carry most of the class's relevance.",
            "layers": [self._layer_of_class(layer, target) for layer in reversed(list(self.facts))],
            "samples": samples[:SAMPLES],
            "samples_note": f"Those among the references, wrong predictions first ({wrong} of {len(samples)}).",
            "mean": self.drawer.mean(target, f"mean over samples of {name}"),
            "suspects": suspects[:FEW],
            "kept": self._kept_of(target),
        }
        self.renderer.page(Addresses.label(target), "class.html", f"{name} — concept atlas", page=page)

    def _layer_of_class(self, layer: str, target: int) -> dict[str, Any]:
        """Concepts of a layer that carry most of a class's relevance."""
        facts, running, tiles = self.facts[layer], 0.0, []
        shares = facts.of_class(target)
        order = [int(c) for c in np.argsort(-shares, kind="stable")[: self.options.n_concepts] if shares[c] > 0]
        for concept in order:
            running += float(shares[concept])
            line = f"{percent(float(shares[concept]))}; so far {percent(running)}"
            tiles.append(self.card(layer, concept, self.short_label(layer, concept), [(line, "")], target))
        these = f"{counted(len(order), 'concept')} of {facts.n_concepts}"
        note = f"{percent(running)} of the relevance of {self.class_name(target)} is that of {these}."
        shown = [tile for tile in tiles if tile is not None]
        return {"name": layer, "href": self.addresses.layer(layer), "note": note, "tiles": shown}

    def _kept_of(self, target: int) -> list[tuple[str, str]]:
        """What is kept of a class, and where it is shown."""
        found = []
        for one in self.kept.of("prototypes"):
            if target in (known := classes_of(one)):
                address = self.addresses.kept("prototypes", one.layer, part=known.index(target) // CLASSES_A_PART)
                shares = ", ".join(percent(way["weight"]) for way in ways_of(one, target))
                found.append((f"prototypes in {one.layer}: {shares} of the samples", address))
        for one in self.kept.of("clusters"):
            if one.of_class == target:
                sizes = ", ".join(map(str, np.bincount(one.arrays["label"]).tolist()))
                found.append(
                    (f"clusters in {one.layer}: {sizes} samples", self.addresses.kept("clusters", one.layer, target))
                )
        return found

    def _samples_of(self, target: int) -> list[AnyShown]:
        tiles = [self.whole(sample, target) for sample, targets in self.explained_for.items() if target in targets]
        found = (one for one in tiles if one is not None)
        return sorted(found, key=lambda one: not any(kind == "bad" for _, kind in one.lines))

    def sample_page(self, sample: int, target: int) -> str:
        """Page of a sample, explained for a class; that for its first one, where there is none for this class."""
        return Addresses.sample(sample, target if target in self.explained_for[sample][1:] else None)

    def whole(self, sample: int, target: int) -> AnyShown | None:
        """Tile of a sample with all its relevance for a class."""
        address = Addresses.sample_maps(sample, target)
        known = self.drawer.known(address)
        if not known:
            return None
        lines = [*self.predicted(sample, target, known[0]), (self.sample_names[sample], "")]
        tile = self.drawer.tile(address, 0, f"{self.sample_names[sample]}, {self.class_name(target)}")
        return tile._replace(href=self.sample_page(sample, target), lines=lines)

    def _write_suspects(self) -> None:
        shown = []
        for one in self.suspects:
            tiles = self.best(one.layer, one.concept, FEW + 1, one.target)
            if tiles:
                shown.append(
                    {
                        "here": tiles[0],
                        "others": tiles[1:],
                        "href": self.addresses.concept(one.layer, one.concept),
                        "label": self.label(one.layer, one.concept),
                        "score": f"{one.score:.3f}",
                        "class_name": self.class_of(one),
                        "class_href": self.class_address(one.target),
                        "reason": "; ".join(filter(None, [one.reason, self.shown_by_others(one)])),
                    }
                )
        trail = [("Atlas", "index.html"), ("Suspects", "")]
        page = {"trail": trail, "lead": self.drawer.about_suspects, "suspects": shown}
        self.renderer.page("suspects.html", "suspects.html", "Suspects — concept atlas", page=page)
