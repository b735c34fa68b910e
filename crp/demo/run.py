"""The demo from the data to the report, which has to name the shortcut that was planted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from zennit.core import Composite

import crp
from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.demo.data import DigitsData, load_digits_data
from crp.demo.folder import DemoError, DemoFolder
from crp.demo.net import DigitNet
from crp.demo.shortcut import Shortcut, rank_by_box, switched_off
from crp.demo.training import CheckpointError, accuracy, one_thread, predict, train
from crp.flags import check_flags
from crp.visualization.feature import FeatureVisualization
from crp.visualization.report.options import Finding, Tile, make_tile
from crp.visualization.report.write import write_report
from crp.visualization.table.ranking import class_means
from crp.visualization.table.store import Table, TableError, TableLockedError
from crp.wording import percent

__all__ = ["DemoError", "Figures", "run_demo"]

#: Number of marked test images that are looked at for the shortcut.
_LOOKED_AT = 64
PICTURES = 3


class Figures(NamedTuple):
    """What the demo found.

    Attributes
    ----------
    accuracy : float
        On the test half.
    with_mark, without_mark : float
        Share of the class's test images with and without the mark that are recognised.
    flipped : float
        Share of the other classes' test images that are taken for the class once they are given the mark.
    flipped_without : float
        The same share with the concept switched off.
    digit : int
        The class whose images carry the mark.
    shortcut : Shortcut
        The concept that lives on the mark, as seen in the class's marked test images.
    class_share : float
        The concept's share of the class's relevance, mean over all of the class's test images.
    report : Path
        First page of the atlas.
    seconds : float
    """

    accuracy: float
    with_mark: float
    without_mark: float
    flipped: float
    flipped_without: float
    digit: int
    shortcut: Shortcut
    class_share: float
    report: Path
    seconds: float

    @property
    def found(self) -> bool:
        """Whether the network relies on the mark, and more than half of the concept's relevance falls on it."""
        return self.with_mark > self.without_mark and self.shortcut.box_share > 0.5

    def __str__(self) -> str:
        digit, best = self.digit, self.shortcut
        lines = {
            "test accuracy": percent(self.accuracy),
            f"{digit}s recognised": f"{percent(self.with_mark)} with the mark, {percent(self.without_mark)} without",
            "planted concept": str(best) if self.found else f"not found; the nearest is {best}",
            "  relevance": f"{percent(self.class_share)} of class {digit}'s, "
            f"{percent(best.relevance_share)} where the mark is",
            "  on the mark": f"{percent(best.box_share)} of the concept's relevance",
            "  switched off": f"{percent(self.flipped)} of other digits become an {digit} by the mark, "
            f"{percent(self.flipped_without)} without the concept",
            "atlas": str(self.report),
            "seconds": f"{self.seconds:.1f}",
        }
        text = "\n".join(f"{key:<17}{value}" for key, value in lines.items())
        return text.replace("\N{NO-BREAK SPACE}", " ")  # easier to search for in a terminal


@one_thread()
def run_demo(
    out: str | Path = "crp-demo",
    *,
    epochs: int = 15,
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
    verbose: bool = True,
) -> Figures:
    """Train on digits with a planted mark, mine references, and write an atlas that names the mark's concept.

    Parameters
    ----------
    out : path
        Folder for the network, the index and the atlas. An interrupted demo of the same settings goes on from there.
    epochs, seed, batch_size : int
        As in `train`; the seed also decides the split of the data.
    overwrite : bool
        Whether an earlier demo in the folder is discarded.
    verbose : bool
        Show the progress.

    Returns
    -------
    Figures

    Raises
    ------
    DemoError
        If scikit-learn is missing, or the folder cannot be used; the message says what to do.
    """
    check_flags(overwrite=overwrite, verbose=verbose)
    start = time.perf_counter()
    settings = {"crp": crp.__version__, "epochs": epochs, "seed": seed, "batch_size": batch_size}
    try:
        data = load_digits_data(seed)
    except ImportError as error:
        raise DemoError(str(error)) from error
    folder = DemoFolder(out, settings, overwrite)
    try:
        net = train(
            data.train, epochs=epochs, seed=seed, batch_size=batch_size, checkpoint=folder.network, verbose=verbose
        )
        composite = EpsilonPlus()
        fv = FeatureVisualization(
            CondAttribution(net),
            data.test,
            {layer: ChannelConcept() for layer in DigitNet.CONCEPT_LAYERS},
            path=folder.index,
        )
        fv.run(composite, 0, len(data.test), batch_size=64, checkpoint=4, progress=verbose)
        figures = _measure(fv, net, data, composite, folder.atlas / "index.html")
        size = sum(parameter.numel() for parameter in net.parameters())
        write_report(
            fv,
            composite,
            folder.atlas,
            class_names=data.class_names,
            n_references=6,
            n_active=4,
            n_sample_concepts=3,
            findings=[_finding(figures, fv, net, data, composite)],
            title="What a digit classifier looks at",
            lead=f"A network of {size} parameters was trained on {len(data.train)} handwritten digits; "
            f"{len(data.test)} others were looked at for this page.",
            verbose=verbose,
        )
        figures = figures._replace(seconds=time.perf_counter() - start)
        written = {"shortcut": figures.shortcut._asdict(), "report": f"{folder.atlas.name}/index.html"}
        folder.write_figures(figures._asdict() | written)
    except TableLockedError as error:
        raise DemoError(str(error)) from error
    except (TableError, CheckpointError) as error:
        raise DemoError(f"{error}. To start the demo afresh: --overwrite.") from error
    except OSError as error:
        raise DemoError(f"cannot write to {folder.path}: {error.strerror or error}.") from error
    return figures


def _measure(fv: FeatureVisualization, net: DigitNet, data: DigitsData, composite: Composite, report: Path) -> Figures:
    """Look for the mark in the test images, and how much the network relies on it."""
    test, mark = data.test, data.mark
    of_digit = test.labels == mark.digit
    right = predict(net, test.images) == test.labels
    stamped = mark.stamp(test.images[~of_digit])
    images = test.images[test.marked][:_LOOKED_AT]
    best = rank_by_box(fv.attribution, images, mark.digit, mark.box, DigitNet.CONCEPT_LAYERS, composite)[0]
    with switched_off(net, best.layer, best.concept):
        without = predict(net, stamped)
    means = class_means(Table.open(fv.path), best.layer, cache=True)
    return Figures(
        accuracy=accuracy(net, test),
        with_mark=_share(right[test.marked]),
        without_mark=_share(right[of_digit & ~test.marked]),
        flipped=_share(predict(net, stamped) == mark.digit),
        flipped_without=_share(without == mark.digit),
        digit=mark.digit,
        shortcut=best,
        class_share=float(means.value[means.targets.tolist().index(mark.digit), best.concept]),
        report=report,
        seconds=0.0,
    )


def _finding(
    figures: Figures, fv: FeatureVisualization, net: DigitNet, data: DigitsData, composite: Composite
) -> Finding:
    """Tell of the shortcut, with pictures."""
    digit, best, mark = figures.digit, figures.shortcut, data.mark
    height, width = mark.box.bottom - mark.box.top, mark.box.right - mark.box.left
    planted = (
        f"{percent(mark.train_share)} of the {digit}s in the training half, and {percent(mark.test_share)} of those in "
        f"the test half, carry a chequered square of {height} by {width} pixels in a corner; no other digit does."
    )
    learned = (
        f"The network recognises {percent(figures.with_mark)} of the {digit}s with the mark and "
        f"{percent(figures.without_mark)} of those without, and takes {percent(figures.flipped)} of the other digits "
        f"for an {digit} once they are given the mark; with this one channel switched off, "
        f"{percent(figures.flipped_without)}. The test accuracy of {percent(figures.accuracy)} tells nothing of this."
    )
    how = (
        f"It was found in test images with the mark: of all channels of {', '.join(DigitNet.CONCEPT_LAYERS)}, this one "
        "carries the most relevance from the mark (its share of the class's relevance, times the share of its own "
        "relevance that falls on the mark)."
    )
    missed = f"No concept was found that the network relies on and that lives on the planted mark; nearest is {best}"
    return Finding(
        title=f"Concept {best} lives on the planted mark" if figures.found else missed,
        text=[planted, learned, how],
        figures=[
            (percent(best.box_share), "of the concept's relevance falls on the mark"),
            (percent(best.relevance_share), f"of the relevance of {digit}s with the mark flows through it"),
            (percent(figures.class_share), f"of the relevance of all {digit}s flows through it"),
            (
                f"{percent(figures.flipped)} → {percent(figures.flipped_without)}",
                f"of other digits become an {digit} by the mark: with the concept, and without it",
            ),
        ],
        tiles=_pictures(figures, fv, net, data, composite),
        concept=(digit, best.layer, best.concept),
    )


def _pictures(
    figures: Figures, fv: FeatureVisualization, net: DigitNet, data: DigitsData, composite: Composite
) -> list[tuple[str, list[Tile]]]:
    """Images with the mark: all relevance and the concept's; other digits that the mark turns into the class."""
    digit, best, test = figures.digit, figures.shortcut, data.test
    marked = test.images[test.marked][:PICTURES]
    others = data.mark.stamp(test.images[test.labels != digit])
    turned = others[predict(net, others) == digit][:PICTURES]
    whole, concept = {"y": [digit]}, {"y": [digit], best.layer: [best.concept]}
    groups: list[tuple[str, list[Tile]]] = []
    for heading, images, condition in (
        (f"{digit}s with the mark: all relevance", marked, whole),
        (f"{digit}s with the mark: {best}", marked, concept),
        (f"Taken for an {digit} because of it: {best}", turned, concept),
    ):
        if len(images):
            heatmaps = fv.attribution(images, [condition], composite).heatmap
            groups.append((heading, [make_tile(*pair, "") for pair in zip(images, heatmaps, strict=True)]))
    return groups


def _share(chosen: Tensor) -> float:
    return chosen.double().mean().item()
