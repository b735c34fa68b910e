"""Reference mining over a dataset, against a gradient pass over the same data in the same batches."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import ForkNet, Samples, Setup, convolutions, gradient
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept, Concept, DirectionConcept
from crp.visualization.mining.job import prepare
from crp.visualization.mining.run import mine
from crp.visualization.table.ranking import class_means, class_statistics, top_k
from crp.visualization.table.store import Table

TITLE = "mining a dataset ÷ a gradient pass over it"
PEER = "zennit-crp"


class Dataset(NamedTuple):
    """What is mined.

    Attributes
    ----------
    limit : float
        What is asked for, in gradient passes.
    layers : list of str, optional
        All convolutions by default.
    """

    setup: Setup
    preset: str
    samples: int
    classes: int
    limit: float
    layers: list[str] | None = None

    def by_peer(self, **more: object) -> dict[str, object]:
        """The same, as the peers' process is asked for it."""
        known = {"setup": self.setup, "preset": self.preset, "n": self.samples, "classes": self.classes}
        return {"candidate": "mining", **known, "layers": self.layers, **more}


SMALL = Dataset(Setup("fork", 28, 32), "EpsilonPlus", 4096, 10, 1.5, list(ForkNet.LAYERS))
VGG = Dataset(Setup("vgg16_bn, 100 classes", 64, 32), "EpsilonPlusFlat", 64, 100, 1.4)
MOBILE = Dataset(
    Setup("mobilenet_v2", 160, 32),
    "EpsilonPlusFlat",
    64,
    1000,
    2.17,
    [f"features.{block}.conv.0" for block in (2, 4, 14, 17)],
)
RESNET = Dataset(Setup("resnet18", 64, 32), "EpsilonPlusFlat", 192, 1000, 1.5)


class Mining:
    """All that is measured about one net and one dataset.

    Parameters
    ----------
    asked : Dataset
    """

    def __init__(self, asked: Dataset) -> None:
        self.model, data = asked.setup.build()
        self.dataset = Samples(asked.samples, tuple(data.shape[1:]), asked.classes)
        self.layers = asked.layers or convolutions(self.model)
        self.concepts = dict.fromkeys(self.layers, ChannelConcept())
        self.attribution, self.rules = CondAttribution(self.model), ours.composite(asked.preset)
        self.fingerprints: Mapping[str, str] | None = None

    def batches(self) -> list[tuple[Tensor, list[int]]]:
        """Images and labels, batch by batch; a long dataset has the same images again and again."""
        images, parts = self.dataset.images, torch.arange(len(self.dataset)).split(32)
        return [(images[part % len(images)], self.dataset.labels[part[0] : part[-1] + 1]) for part in parts]

    def gradients(self) -> None:
        """Gradient of every sample: the unit."""
        for images, _ in self.batches():
            gradient(self.model, images)

    def attributions(self) -> None:
        """Model and rules alone: attributions with all layers recorded, of which nothing is done."""
        for images, labels in self.batches():
            conditions = [{"y": [label]} for label in labels]
            self.attribution(images, conditions, self.rules, self.layers, exclude_parallel=False)

    def mine(self, folder: str | Path) -> Table:
        """Mine everything into a folder; the fingerprints, once for a run of any length, are computed by the first."""
        table = mine(
            self.attribution,
            self.dataset,
            self.concepts,
            self.rules,
            folder,
            progress=False,
            fingerprints=self.fingerprints,
        )
        self.fingerprints = dict(table.fingerprints)
        return table

    def run(self) -> None:
        """Mine into a new folder."""
        with tempfile.TemporaryDirectory() as folder:
            self.mine(folder)

    def run_and_ask(self) -> None:
        """Mine into a new folder, and ask for references, classes of concepts and concepts of classes in all layers."""
        with tempfile.TemporaryDirectory() as folder:
            table = self.mine(folder)
            for layer in self.layers:
                top_k(table, layer)
                top_k(table, layer, "activation")
                top_k(table, layer, of_class=self.dataset.labels[0])
                class_statistics(table, layer, 0)
                class_means(table, layer)

    def files(self) -> int:
        """How many files a run leaves."""
        with tempfile.TemporaryDirectory() as folder:
            self.mine(folder)
            return sum(path.is_file() for path in Path(folder).rglob("*"))

    def fixed(self) -> None:
        """What a run costs once: fingerprints of the model, the dataset and the rest, and all checks."""
        prepare(self.attribution, self.dataset, self.concepts, self.rules, "unused")


def case(goal: str, asked: Dataset, rounds: int) -> Case:
    """One net and one dataset: the whole run, and the share in it of model and rules."""

    def make() -> dict[str, Run]:
        mining = Mining(asked)
        return {
            "gradients": mining.gradients,
            "mine": mining.run,
            "attributions": mining.attributions,
            "fixed": mining.fixed,
        }

    share = Bound(0.9, at_least=True) if asked.classes == 1000 else None
    return Case(
        name=f"{asked.setup.net} {asked.setup.size}×{asked.setup.size}, {asked.samples} samples",
        make=make,
        ratios=(
            Ratio("mining ÷ gradients", "mine", "gradients", Bound(asked.limit), goal, PEER),
            Ratio("gradients, ms a sample", "gradients", scale=1e3 / asked.samples),
            Ratio("share of model and rules in mining", "attributions", "mine", share, goal if share else ""),
            Ratio("fingerprints and checks, once a run, ms", "fixed", scale=1e3),
        ),
        peers={PEER: asked.by_peer()},
        rounds=rounds,
        thorough=asked is not SMALL,
    )


def layouts() -> Case:
    """MobileNetV2 at 160 pixels, with the channels last in memory as by default, and in the usual layout."""

    def make() -> dict[str, Run]:
        chosen, usual = Mining(MOBILE), Mining(MOBILE)
        usual.attribution.channels_last = False
        return {"gradients": chosen.gradients, "channels last": chosen.run, "usual layout": usual.run}

    return Case(
        f"{MOBILE.setup.net} {MOBILE.setup.size}×{MOBILE.setup.size}, {MOBILE.samples} samples, 1776 concepts",
        make,
        (
            Ratio("mining ÷ gradients", "channels last", "gradients", Bound(MOBILE.limit), "mining"),
            Ratio("mining ÷ gradients, in the usual layout", "usual layout", "gradients"),
        ),
        rounds=3,
        thorough=True,
    )


def directions() -> Case:
    """64 directions of a layer, with the rest, against its 64 channels; two kinds of net."""
    nets = {"resnet18": (RESNET._replace(samples=96), "layer1.1.conv2"), "vgg16_bn": (VGG, "features.3")}

    def made(asked: Dataset, layer: str, concept: Concept) -> Run:
        mining = Mining(asked._replace(layers=[layer]))
        mining.concepts = {layer: concept}
        return mining.run

    def make() -> dict[str, Run]:
        basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
        kinds = {"channels": ChannelConcept(), "directions": DirectionConcept(basis)}
        pairs = product(nets.items(), kinds.items())
        return {f"{net}, {kind}": made(*asked, concept) for (net, asked), (kind, concept) in pairs}

    title = "mining 64 directions ÷ 64 channels, {}"
    ratios = [Ratio(title.format(net), f"{net}, directions", f"{net}, channels", Bound(1.3), "mining") for net in nets]
    return Case("one layer, 64×64, 96 and 64 samples", make, tuple(ratios), rounds=5)


def classes() -> list[Case]:
    """The same samples with labels of 10 and of 1000 classes."""
    datasets = {f"{n} classes": RESNET._replace(samples=96, classes=n) for n in (10, 1000)}
    few, many = datasets
    name = "resnet18 64×64, 96 samples"

    def runs() -> dict[str, Run]:
        return {name: Mining(asked).run_and_ask for name, asked in datasets.items()}

    def files() -> dict[str, Run]:
        return {name: Mining(asked).files for name, asked in datasets.items()}

    asking = Ratio("mining and queries, 1000 classes ÷ 10 classes", many, few, Bound(1.2), "mining")
    ratios = (
        Ratio("files, 1000 classes ÷ 10 classes", many, few, Bound(1.0), "mining"),
        Ratio("files, 1000 classes", many, peer=PEER),
    )
    left = {PEER: datasets[many].by_peer(files=True)}
    return [
        Case(name, runs, (asking,), rounds=4),
        Case(name, files, ratios, left, clock="value", rounds=1, warmup=0),
    ]


def cases() -> list[Case]:
    """Four nets, directions, and what the number of classes costs."""
    nets = [case("mining", SMALL, 5), case("mining", VGG, 3), case("mining", RESNET, 3), layouts()]
    return [*nets, directions(), *classes()]
