"""What a report takes from results that are kept beside the table: prototypes, audits, clusters and the like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crp.visualization.report.addresses import Addresses
from crp.visualization.report.facts import BINS
from crp.visualization.report.graphs import _draw_histogram
from crp.visualization.table.derived import KEPT_KINDS, KeptResult, list_kept, read_kept
from crp.visualization.table.manifest import Array, TableMismatchError
from crp.visualization.table.store import Table
from crp.wording import counted, percent

#: Kinds of results with a page.
PAGED = ("prototypes", "audit", "clusters", "meanings", "interventions", "context")
#: Maximized pictures, which are on the pages of their concepts.
_MAXIMIZED = "pictures"
#: Samples of an audit that are shown, and of each prototype and cluster beside the one that shows it.
UNUSUAL, BESIDE = 24, 4
#: With more prototypes or clusters than this, each is shown by one sample alone.
_MANY = 200
#: Classes on a part of the page of prototypes.
CLASSES_A_PART = 20
#: Least difference of shares that is listed.
_LEAST_MORE = 5e-4
#: Concepts that are listed of each prototype.
_STRONGEST = 6


@dataclass(frozen=True)
class KeptResults:
    """Results that are shown, and what is said about those that are not.

    Attributes
    ----------
    results : list of KeptResult
        Of the table as it is, and of layers and classes with a page.
    notes : list of str
    """

    results: Sequence[KeptResult] = ()
    notes: Sequence[str] = ()

    def of(self, kind: str) -> list[KeptResult]:
        """Those of one kind."""
        return [one for one in self.results if one.kind == kind]

    @property
    def beside(self) -> int:
        """How many samples of each prototype and cluster are shown beside the one that shows it."""
        n = sum(len(ways_of(one, target)) for one in self.of("prototypes") for target in classes_of(one))
        n += sum(len(one.arrays["members"]) for one in self.of("clusters"))
        return BESIDE if n <= _MANY else 0

    def samples(self) -> dict[int, int]:
        """Samples that are shown, and the class for which they are explained."""
        found: dict[int, int] = {}
        for one in self.of("prototypes"):
            for target in classes_of(one):
                members = one.arrays[f"{target}/members"][:, : 1 + self.beside]
                found |= dict.fromkeys([*one.arrays[f"{target}/sample"].tolist(), *members.ravel().tolist()], target)
        for one in self.of("clusters"):
            members = one.arrays["members"][:, : 1 + self.beside]
            found |= dict.fromkeys(members.ravel().tolist(), one.of_class or 0)
        for one in self.of("audit"):
            columns = (one.arrays[name][:UNUSUAL].tolist() for name in ("sample", "nearest", "target"))
            for sample, nearest, target in zip(*columns, strict=True):
                found |= {sample: target, nearest: target}
        return {sample: target for sample, target in found.items() if sample >= 0}

    @cached_property
    def maximized(self) -> dict[tuple[str, int], tuple[Array, str]]:
        """Maximized picture of each concept that has one, (height, width, 3) in bytes, and how it was made."""
        return {
            (one.layer, concept): (picture, f"in {one.settings['steps']} steps with seed {one.settings['seed']}")
            for one in self.of(_MAXIMIZED)
            for concept, picture in zip(one.arrays["concept"].tolist(), one.arrays["picture"], strict=True)
        }

    def texts(self) -> dict[tuple[str, int], str]:
        """Text that fits each concept best."""
        found = {}
        for one in self.of("meanings"):
            if texts := one.settings["texts"]:
                best = one.arrays["similarity"].argmax(0).tolist()
                for concept, text in zip(one.arrays["concept"].tolist(), best, strict=True):
                    found[one.layer, concept] = str(texts[text])
        return found


def get_kept(table: Table, layers: Sequence[str], classes: Collection[int]) -> KeptResults:
    """Results that are kept beside a table; those of an earlier state of it are named and not shown."""
    results, notes = [], []
    for found in list_kept(table):
        if found.kind not in (*PAGED, _MAXIMIZED) or found.layer not in layers:
            continue
        if found.of_class is not None and found.of_class not in classes:
            continue
        try:
            one = read_kept(table, found.kind, found.layer, found.of_class)
        except TableMismatchError:
            notes.append(
                f"The {found.name} were made before the table changed, and are not shown; {KEPT_KINDS[found.kind]} "
                "makes them again."
            )
            continue
        results.append(_of_classes(one, classes))
    return KeptResults(results, notes)


def classes_of(kept: KeptResult) -> list[int]:
    """Classes whose prototypes a result holds."""
    return sorted({int(name.partition("/")[0]) for name in kept.arrays})


def ways_of(kept: KeptResult, target: int) -> list[dict[str, Any]]:
    """Prototypes of a class, that of most samples first, each with the mean share of its concepts.

    ``more`` are those that it uses more than the class as a whole.
    """
    arrays = {name: kept.arrays[f"{target}/{name}"] for name in ("weights", "means", "sample", "members")}
    of_class = arrays["weights"] @ arrays["means"]
    found = []
    for i in np.argsort(-arrays["weights"], kind="stable").tolist():
        mean = arrays["means"][i]
        top = np.argsort(-mean, kind="stable")[:_STRONGEST].tolist()
        more = np.argsort(of_class - mean, kind="stable")[:_STRONGEST].tolist()
        members = [m for m in arrays["members"][i].tolist() if m >= 0 and m != arrays["sample"][i]]
        found.append(
            {
                "number": i,
                "weight": float(arrays["weights"][i]),
                "sample": int(arrays["sample"][i]),
                "members": members,
                "concepts": [(c, float(mean[c])) for c in top if mean[c] > 0],
                "more": [(c, float(mean[c] - of_class[c])) for c in more if mean[c] - of_class[c] > _LEAST_MORE],
            }
        )
    return found


def pairs_of(ids: Any, values: Any) -> list[tuple[int, float]]:
    """Concepts and values of a row, without the places that hold none."""
    return [(int(c), float(v)) for c, v in zip(ids, values, strict=True) if c >= 0]


def about_concepts(
    kept: KeptResults, addresses: Addresses, class_name: Callable[[int], str]
) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """What results say of single concepts: a sentence, and the address of its page."""
    found: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
    for one in kept.of("prototypes"):
        for place, target in enumerate(classes_of(one)):
            href = addresses.kept("prototypes", one.layer, part=place // CLASSES_A_PART)
            for way in ways_of(one, target):
                for concept, share in way["concepts"]:
                    text = f"{percent(share)} of prototype {way['number']} of {class_name(target)}"
                    found[one.layer, concept].append((text, href))
    for one in kept.of("clusters"):
        href = addresses.kept("clusters", one.layer, one.of_class)
        for i, (ids, values) in enumerate(zip(one.arrays["strongest"], one.arrays["difference"], strict=True)):
            for concept, more in pairs_of(ids, values):
                found[one.layer, concept].append(
                    (f"{more:+.3f} in cluster {i} of {class_name(one.of_class or 0)}", href)
                )
    texts = kept.texts()
    for one in kept.of("meanings"):
        href = addresses.kept("meanings", one.layer)
        for concept, clear in zip(one.arrays["concept"].tolist(), one.arrays["clarity"].tolist(), strict=True):
            fits = f"; reads as “{texts[one.layer, concept]}”" if (one.layer, concept) in texts else ""
            found[one.layer, concept].append((f"clarity {clear:.2f}{fits}", href))
    for one in kept.of("interventions"):
        href, n = addresses.kept("interventions", one.layer), len(one.arrays["sample"])
        columns = (one.arrays["concept"], one.arrays["relevance"].mean(0), one.arrays["change"].mean(0))
        for concept, relevance, change in zip(*(column.tolist() for column in columns), strict=True):
            text = (
                f"output {change:+.3g} when it is {changed_how(one)}, relevance {relevance:+.3g} "
                f"(mean of {counted(n, 'sample')})"
            )
            found[one.layer, concept].append((text, href))
    for one in kept.of("context"):
        href, n = addresses.kept("context", one.layer), len(one.arrays["sample"])
        for concept, score in zip(one.arrays["concept"].tolist(), mean_scores(one).tolist(), strict=True):
            if score >= 0:
                text = f"{percent(score)} of its relevance is outside of the object (mean of {counted(n, 'sample')})"
                found[one.layer, concept].append((text, href))
    return dict(found)


def mean_scores(one: KeptResult) -> Array:
    """Mean context score of each concept over the samples where it has one; -1 where it has none."""
    score = one.arrays["score"]
    n = (score >= 0).sum(0)
    return np.where(n > 0, np.maximum(score, 0.0).sum(0) / np.maximum(n, 1), -1.0)


def _histogram_of_shares(shares: Array) -> dict[str, Any]:
    """Histogram of shares from 0 to 1; those below 0 stand for none."""
    return _draw_histogram(np.histogram(shares[shares >= 0], BINS, (0.0, 1.0))[0], "0", "1")


def context_histograms(kept: KeptResults, layer: str, concept: int) -> list[tuple[dict[str, Any], str, bool]]:
    """Histogram of a concept's context scores over samples, with its title, where they are kept."""
    found = []
    for one in kept.of("context"):
        for place in np.flatnonzero(one.arrays["concept"] == concept).tolist() if one.layer == layer else ():
            found.append((_histogram_of_shares(one.arrays["score"][:, place]), "Outside of the object", True))
    return found


def changed_how(one: KeptResult) -> str:
    """What was done to the concepts, in words."""
    scale = one.settings["scale"]
    if one.settings.get("patched"):
        return "patched from other samples" + ("" if scale == 1 else f" and multiplied by {scale:g}")
    return "switched off" if scale == 0 else f"multiplied by {scale:g}"


def _of_classes(one: KeptResult, classes: Collection[int]) -> KeptResult:
    """The same result with the classes that have a page alone."""
    if one.kind == "prototypes":
        arrays = {name: a for name, a in one.arrays.items() if int(name.partition("/")[0]) in classes}
    elif one.kind == "audit":
        inside = np.isin(one.arrays["target"], list(classes))
        arrays = {name: array[inside] for name, array in one.arrays.items()}
    else:
        return one
    return one._replace(arrays=arrays)
