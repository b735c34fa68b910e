"""On a GPU at the sizes that users have: attributions, concepts, mining; time, launches, waits, copies, memory.

On a CPU the same cases run with nets so small that they test the benchmark itself.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.clocks import CLOCKS, Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Samples, Setup, convolutions, gradient
from benchmarks.sections import compiled
from benchmarks.sections.transformers import METHODS
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.visualization import FeatureVisualization
from crp.visualization.table.store import Table

TITLE = "attributions, concepts and mining as users of a GPU run them"
PRESETS = ("EpsilonPlusFlat", "EpsilonGammaBox", "EpsilonAlpha2Beta1Flat")
PRESET = PRESETS[0]
#: Clocks that need a GPU, and what stands for them on a CPU.
ON_CPU = {"cuda": "cpu", "cuda peak": "peak", "launches": "calls"}


@dataclass(frozen=True)
class Goals:
    """What is asked for of one net.

    Attributes
    ----------
    layer : str
        Whose concepts are attributed.
    presets, replayed : tuple of float or None
        Attribution ÷ gradient of each preset, batch 64, computed and replayed.
    single, single_replayed : float
        The same of batch 1, of the first preset.
    concepts : float
        Concepts ÷ gradient below on copies.
    mining, narrow : float
        Share of the gradient pass in images per second, in float32 and in bfloat16.
    """

    layer: str
    presets: tuple[float | None, ...]
    replayed: tuple[float | None, ...]
    single: float
    single_replayed: float
    concepts: float
    mining: float
    narrow: float


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes
    ----------
    nets : dict of str to Goals
    size, batch : int
        Of the images.
    n_concepts : int
    n_batches : int
        Batches of a mined dataset.
    n_of_peer : int
        Images that zennit-crp mines.
    """

    nets: Mapping[str, Goals]
    size: int
    batch: int
    n_concepts: int
    n_batches: int
    n_of_peer: int


LARGE = Scale(
    {
        "resnet50": Goals("layer4.1.conv2", (1.35, 2.0, 1.9), (1.0, 1.5, 1.5), 1.4, 0.3, 1.0, 0.45, 0.5),
        "vgg16_bn": Goals("features.40", (1.35, None, None), (1.0, None, None), 1.4, 0.3, 0.9, 0.65, 0.8),
    },
    size=224,
    batch=64,
    n_concepts=512,
    n_batches=80,
    n_of_peer=64,
)
TINY = Scale(
    {"demo": Goals("block.relu1", (None, None, None), (None, None, None), 1.4, 0.3, 1.0, 0.45, 0.5)},
    size=32,
    batch=4,
    n_concepts=8,
    n_batches=2,
    n_of_peer=4,
)


def attributions(setup: Setup, goals: Goals, clock: str, rounds: int, more: bool = False) -> Case:
    """One attribution of a batch; with ``more``, also in ``channels_last`` and bfloat16."""
    single = setup.batch == 1
    presets = PRESETS[:1] if single else PRESETS
    treatments = [each for each in compiled.TREATMENTS if each.name != "plain"] if more else []

    def make() -> dict[str, Run]:
        model, data = setup.build()
        runs = {"gradient": ours.gradient_of(model, data)}
        runs |= {preset: ours.attribution(model, data, ours.composite(preset)) for preset in presets}
        for treatment in treatments:
            changed, same = treatment.build(setup)
            runs[treatment.name] = partial(treatment.run, compiled.heatmaps(changed), same)
        return runs

    limits = (goals.single,) if single else goals.presets
    ratios = []
    for preset, limit in zip(presets, limits, strict=True):
        bound = Bound(limit) if limit is not None and clock == "cuda" else None
        ratios.append(Ratio(f"{preset} ÷ gradient", preset, "gradient", bound, "", f"zennit-crp {preset}"))
    ratios += [Ratio(f"{PRESET}, {each.name} ÷ gradient", each.name, "gradient") for each in treatments]
    if clock == "cuda":
        ratios.append(Ratio("gradient, ms", "gradient", scale=1e3))
    peers = {f"zennit-crp {p}": {"candidate": "attribution", "setup": setup, "preset": p} for p in presets}
    return Case(f"{clock}, {setup}", make, tuple(ratios), peers, clock, rounds)


def replays(setup: Setup, preset: str, limit: float | None, clock: str) -> Case:
    """One attribution of a batch that is replayed; alone, since a recording keeps its memory."""
    also_last = preset == PRESET
    last = Ratio(f"{preset}, replayed, channels last ÷ gradient", "channels last", "gradient")

    def make() -> dict[str, Run]:
        model, data = setup.build()
        unit = ours.gradient_of(model, data)
        runs = {"gradient": unit, "replayed": ours.replayed(model, data, ours.composite(preset))}
        if also_last:
            changed, same = compiled.TREATMENTS[1].build(setup)
            runs["channels last"] = ours.replayed(changed, same, ours.composite(preset))
        return runs

    return Case(
        name=f"{clock}, {setup}",
        make=make,
        ratios=(
            Ratio(f"{preset}, replayed ÷ gradient", "replayed", "gradient", None if limit is None else Bound(limit)),
            *([last] if also_last else []),
        ),
        clock=clock,
        rounds=5,
    )


def deviating(setup: Setup) -> Case:
    """Deviation of heatmaps in ``channels_last`` and bfloat16 from those in float64."""
    return replace(compiled.deviating(setup), thorough=False)


def concepts(setup: Setup, layer: str, limit: float, n: int, batch_size: int, clock: str = "cuda") -> Case:
    """Many concepts of a layer, against the gradient below and the peer."""
    below, peer = "gradient below on copies", f"zennit-crp generate(batch_size={batch_size})"

    def make() -> dict[str, Run]:
        model, data = setup.build()
        part = ours.gradient_below(model, data, layer, batch_size)
        return {
            below: lambda: [part() for _ in range(n // batch_size)],
            "ours": ours.concepts(model, data, ours.composite(PRESET), layer, n, batch_size),
        }

    return Case(
        name=f"{setup.net} {setup.size}×{setup.size}, {n} concepts of {layer}, parts of {batch_size}",
        make=make,
        ratios=(
            Ratio(f"time ÷ {below}", "ours", below, Bound(limit), "", peer),
            Ratio("ours, ms", "ours", peer=peer, scale=1e3),
        ),
        peers={
            peer: {"candidate": "concepts", "setup": setup, "preset": PRESET}
            | {"layer": layer, "n": n, "batch_size": batch_size}
        },
        clock=clock,
        rounds=3,
    )


def texts(setup: Setup, clock: str) -> Case:
    """AttnLRP and CP-LRP of a long text in bfloat16, by torch's fused attention; replayed, too, if time is measured."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        model, data = model.to(torch.bfloat16), data.to(torch.bfloat16)
        runs = {"gradient": ours.gradient_of(model, data)}
        for name, (kind, _, _) in METHODS.items():
            runs[name] = ours.attribution(model, data, kind())
            if clock in ("cuda", "cpu"):
                runs[f"{name}, replayed"] = ours.replayed(model, data, kind())
        return runs

    of_peak = clock not in ("cuda", "cpu")
    names = [n for name in METHODS for n in ([name] if of_peak else [name, f"{name}, replayed"])]
    ratios = [Ratio(f"{'memory of ' * of_peak}{name} ÷ gradient", name, "gradient") for name in names]
    if clock == "cuda":
        ratios.append(Ratio("gradient, ms", "gradient", scale=1e3))
    return Case(f"{setup}, bfloat16", make, tuple(ratios), clock=clock, rounds=1 if of_peak else 5)


def waiting(setup: Setup) -> Case:
    """Backward passes in which a synchronization raises an error: 1 where the host waits."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        return {"ours": ours.backward(model, data, ours.composite(PRESET))}

    return Case(
        name=str(setup),
        make=make,
        ratios=(Ratio("backward passes in which the host waits", "ours", bound=Bound(0.0)),),
        clock="synchronizations",
        rounds=1,
    )


def normalized(images: Tensor) -> Tensor:
    """What users prepare images by; of noise, it leaves everything as it is."""
    return (images - 0.0) / 1.0


class Mining:
    """A dataset that is mined as users do it: images prepared by a function, all convolutions, results on disk.

    Parameters
    ----------
    setup : Setup
    n : int
        Images, of as many classes as the net has.
    """

    def __init__(self, setup: Setup, n: int) -> None:
        self.model, self.data = setup.build()
        self.n, self.batch, self.device = n, setup.batch, setup.device
        with torch.no_grad():
            classes = self.model(self.data[:1]).shape[1]
        self.dataset = Samples(n, tuple(self.data.shape[1:]), classes)
        self.concepts = dict.fromkeys(convolutions(self.model), ChannelConcept())
        self.attribution, self.rules = CondAttribution(self.model), ours.composite(PRESET)
        self.folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self.folder)  # (which takes time, too)
        self.run(self.batch)  # kernels are chosen in the first batch

    def mined_into(self, folder: str | Path, n: int | None = None) -> FeatureVisualization:
        """Mine the first ``n`` images into a folder."""
        found = FeatureVisualization(self.attribution, self.dataset, self.concepts, normalized, path=folder)
        self.run_again(found, n)
        return found

    def run_again(self, found: FeatureVisualization, n: int | None = None) -> None:
        """Mine what is not in the table yet, and collect the results."""
        found.run(self.rules, 0, n or self.n, self.batch, progress=False)

    def run(self, n: int | None = None) -> FeatureVisualization:
        """Mine the first ``n`` images, by default all, into a new folder."""
        return self.mined_into(tempfile.mkdtemp(dir=self.folder), n)

    def run_narrow(self) -> None:
        """The same in bfloat16."""
        with torch.autocast(self.device, torch.bfloat16):
            self.run()

    def gradients(self) -> None:
        """As many gradients; their data is on the device already."""
        for _ in range(self.n // self.batch):
            gradient(self.model, self.data)

    def bytes_of_an_entry(self) -> float:
        """Bytes on disk for each row and concept."""
        table = Table.open(self.run().path)
        size = sum(path.stat().st_size for path in table.path.rglob("*") if path.is_file())
        return size / (self.n * sum(table.n_concepts(layer) for layer in self.concepts))


def mining(setup: Setup, goals: Goals, n: int) -> Case:
    """Images per second, as a share of those of a gradient pass."""

    def make() -> dict[str, Run]:
        made = Mining(setup, n)
        return {"gradients": made.gradients, "float32": made.run, "bfloat16": made.run_narrow}

    ms = {name: Ratio(f"mining, {name}, ms an image", name, scale=1e3 / n) for name in ("float32", "bfloat16")}
    return Case(
        name=f"{setup}, {n} images, all convolutions",
        make=make,
        ratios=(
            Ratio("images per second, mining ÷ gradient pass", "gradients", "float32", Bound(goals.mining, True)),
            Ratio("the same in bfloat16", "gradients", "bfloat16", Bound(goals.narrow, True)),
            replace(ms["float32"], bound=Bound(1.0) if setup.net == "vgg16_bn" else None),
            ms["bfloat16"],
        ),
        clock="wall",
        rounds=2,
    )


def mining_of_peer(setup: Setup, n: int) -> Case:
    """A few images, which is what zennit-crp mines in a reasonable time."""
    peer = "zennit-crp"
    return Case(
        name=f"{setup}, {n} images, all convolutions",
        make=lambda: {"ours": Mining(setup, n).run},
        ratios=(Ratio("mining, ms an image", "ours", peer=peer, scale=1e3 / n),),
        peers={
            peer: {"candidate": "mining", "setup": setup, "preset": PRESET} | {"layers": None, "n": n, "classes": 10}
        },
        clock="wall",
        rounds=1,
        warmup=0,
    )


def host_time(setup: Setup, n: int) -> Case:
    """What a run costs besides its batches: checks, and `collect_results`."""

    def make() -> dict[str, Run]:
        made = Mining(setup, n)
        return {"again": partial(made.run_again, made.run())}

    metric = "a run of a finished table, all classes, ms"
    return Case(
        f"{setup}, {n} images", make, (Ratio(metric, "again", bound=Bound(100.0), scale=1e3),), clock="wall", rounds=3
    )


def mining_counts(setup: Setup) -> list[Case]:
    """Waits, copies and launches of a batch, where all that a run does once is done; and bytes on disk."""
    few, many = 8, 16
    bounds = {"waits": Bound(2.0), "copies to host": Bound(1.0), "copies to device": Bound(1.0), "launches": None}

    @cache
    def mined_before() -> Mining:
        made = Mining(setup, many * setup.batch)
        made.run(few * setup.batch)
        return made

    def counted(clock: str) -> Callable[[], dict[str, Run]]:
        def make() -> dict[str, Run]:
            made = mined_before()

            def of_a_batch() -> float:
                counts = [CLOCKS[clock](partial(made.run, n * setup.batch)) for n in (few, many)]
                return (counts[1] - counts[0]) / (many - few)

            return {"ours": of_a_batch}

        return make

    cases = [
        Case(
            name=f"{setup}, all convolutions",
            make=counted(clock),
            ratios=(Ratio(f"mining, {clock} a batch", "ours", bound=bound),),
            clock="value",
            rounds=1,
            warmup=0,
        )
        for clock, bound in bounds.items()
    ]
    size = Ratio("bytes on disk for each concept and row", "ours")
    make = lambda: {"ours": Mining(setup, 2 * setup.batch).bytes_of_an_entry}  # noqa: E731
    return [*cases, Case(str(setup), make, (size,), clock="value", rounds=1, warmup=0)]


def cases(device: str = "cuda") -> list[Case]:
    """Cases of a GPU, or the tiny ones of a CPU, where nothing waits and nothing is copied."""
    on_gpu = device == "cuda"
    scale = LARGE if on_gpu else TINY
    clock = (lambda name: name) if on_gpu else ON_CPU.__getitem__
    of_nets = []
    for net, goals in scale.nets.items():
        setup = Setup(net, scale.size, scale.batch, device)
        single, few = setup._replace(batch=1), scale.n_batches * scale.batch
        counts = mining_counts(setup)
        of_nets.append(
            [
                attributions(setup, goals, clock("cuda"), 7, more=True),
                *(replays(setup, *goal, clock("cuda")) for goal in zip(PRESETS, goals.replayed, strict=True)),
                mining(setup, goals, few),
                attributions(single, goals, clock("cuda"), 9),
                replays(single, PRESET, goals.single_replayed, clock("cuda")),
                concepts(setup, goals.layer, goals.concepts, scale.n_concepts, scale.batch, clock("cuda")),
                attributions(setup, goals, clock("launches"), 1),
                attributions(setup, goals, clock("cuda peak"), 1),
                deviating(setup._replace(batch=4)),
                host_time(setup, 5 * scale.batch),
                *([waiting(setup), *counts] if on_gpu else counts[-1:]),
                mining_of_peer(setup, scale.n_of_peer),
            ]
        )
    long = Setup("gpt2 12×768, long", 4096, 1, device) if on_gpu else Setup("gpt2 4×256", 16, 1)
    # (what matters most comes first, of all nets, should time run out)
    found = [texts(long, clock("cuda")), texts(long, clock("cuda peak"))]
    found += [case for alike in zip(*of_nets, strict=True) for case in alike]
    return found if on_gpu else [without_goals(case) for case in found]


def without_goals(case: Case) -> Case:
    """The same case, of which nothing is asked."""
    return replace(case, ratios=tuple(replace(ratio, bound=None) for ratio in case.ratios))
