"""``python -m benchmarks.walks [CHECKOUT ...]``: the files of ``crp`` that a condition, a sample and a rule meet.

A file is met if one of its functions is executed between the two ends of a walk. The walks use public calls only, so
that other checkouts of this repository can be walked, too; each is imported in a process of its own.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
#: Runs a program with ``crp`` from another checkout, and this module from here.
BOOT = (
    "import sys; sys.path.insert(0, {0!r}); import crp; sys.path[0] = {1!r}; from benchmarks import walks; walks.dump()"
)


@contextmanager
def met_files() -> Iterator[set[str]]:
    """Files of ``crp`` whose functions are executed inside the context, relative to the package."""
    import crp

    package = Path(inspect.getfile(crp)).parent
    names: set[str] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        # Modules and class bodies are executed by an import, which is no step of a walk; functions are optimized.
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            names.add(frame.f_code.co_filename)

    files: set[str] = set()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        paths = (Path(name) for name in names)
        files |= {path.relative_to(package).as_posix() for path in paths if path.is_relative_to(package)}


def small_net() -> Any:
    """Two convolutions and a dense layer, with random weights."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    parts = {"conv1": nn.Conv2d(3, 4, 3), "relu1": nn.ReLU(), "conv2": nn.Conv2d(4, 4, 3), "relu2": nn.ReLU()}
    model = nn.Sequential()
    for name, part in {**parts, "flatten": nn.Flatten(), "fc": nn.Linear(64, 3)}.items():
        model.add_module(name, part)
    return model.eval()


def walk_of_a_condition() -> set[str]:
    """From the call of `CondAttribution` to ``result.relevances``, by a composite of zennit."""
    import torch
    from zennit.composites import EpsilonPlus

    from crp.attribution import CondAttribution

    attribution, data, composite = CondAttribution(small_net()), torch.rand(1, 3, 8, 8), EpsilonPlus()
    with met_files() as files:
        result = attribution(data.requires_grad_(), [{"y": [1], "conv2": [1]}], composite, record_layer=["conv1"])
        assert result.relevances["conv1"].any()
    return files


def walk_of_a_sample() -> set[str]:
    """From `FeatureVisualization.run` to a reference picture, by a composite of zennit."""
    import torch
    from zennit.composites import EpsilonPlus

    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.image import vis_opaque_img
    from crp.visualization import FeatureVisualization

    torch.manual_seed(0)
    data = [(torch.rand(3, 8, 8), number % 3) for number in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        attribution = CondAttribution(small_net())
        visualization = FeatureVisualization(attribution, data, {"conv2": ChannelConcept()}, path=folder)
        with met_files() as files:
            visualization.run(EpsilonPlus(), 0, len(data), batch_size=2)
            pictures = visualization.get_max_reference(
                [1], "conv2", "relevance", (0, 2), composite=EpsilonPlus(), plot_fn=vis_opaque_img
            )
            assert len(pictures[1]) == 2
    return files


def walk_of_a_rule() -> set[str]:
    """From `EpsilonPlus` of our composites (z⁺ for convolutions) to the gradient of a convolutional net."""
    import torch

    from crp.composites import EpsilonPlus

    model, data = small_net(), torch.rand(1, 3, 8, 8, requires_grad=True)
    with met_files() as files:
        composite = EpsilonPlus()
        with composite.context(model) as changed:
            (gradient,) = torch.autograd.grad(changed(data)[:, 1].sum(), data)
        assert gradient.any()
    return files


WALKS: dict[str, Callable[[], set[str]]] = {
    "condition": walk_of_a_condition,
    "sample": walk_of_a_sample,
    "rule": walk_of_a_rule,
}


def dump() -> None:
    """Write the walks of the imported package to the standard output, as JSON."""
    click.echo(json.dumps({name: sorted(walk()) for name, walk in WALKS.items()}))


def walks_of(checkout: Path) -> dict[str, list[str]]:
    """Files that each walk meets in a checkout of this repository."""
    command = [sys.executable, "-c", BOOT.format(str(checkout.resolve()), str(ROOT))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    walks: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return walks


@click.command(help=__doc__)
@click.argument("checkouts", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(checkouts: tuple[Path, ...]) -> None:
    """Print the files of each walk, for this checkout by default."""
    for checkout in checkouts or (ROOT,):
        click.echo(str(checkout))
        for name, files in walks_of(checkout).items():
            click.echo(f"  {name}: {len(files)} files\n    " + "\n    ".join(files))


if __name__ == "__main__":
    main()
