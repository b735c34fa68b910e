"""What runs in the peers' process: zennit-crp, captum and lxt, on the same nets and data.

`benchmarks.remote.Worker` starts it with an interpreter of an environment of their own. Nothing of our package is
imported here; ``crp`` is zennit-crp.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import zennit.composites
from torch import Tensor, nn
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.torchvision import ResNetCanonizer

from benchmarks import tiny
from benchmarks.clocks import CLOCKS, Run
from benchmarks.nets import PRESETS, Samples, Setup, convolutions

ROOT = Path(__file__).resolve().parents[1]


@lru_cache
def zennit_crp(module: str) -> Any:
    """A module of zennit-crp."""
    found = import_module(f"crp.{module}")
    if Path(str(found.__file__)).is_relative_to(ROOT):
        raise ImportError("zennit-crp is not installed in the peers' environment")
    return found


@lru_cache(maxsize=1)
def built(setup: Setup) -> tuple[nn.Module, Tensor]:
    """Net and data of a setup; the last one is kept."""
    return setup.build()


def composite(preset: str, net: str) -> Any:
    """Preset of zennit with the canonizers that are right for a net."""
    if net.startswith("resnet"):
        canonizers = [ResNetCanonizer()]
    else:
        canonizers = [] if net.startswith("densenet") else [SequentialMergeBatchNorm()]
    return getattr(zennit.composites, preset)(canonizers=canonizers, **PRESETS[preset])


def attribution(setup: Setup, preset: str) -> Run:
    """One attribution of a batch."""
    model, data = built(setup)
    explain, rules = zennit_crp("attribution").CondAttribution(model), composite(preset, setup.net)
    return lambda: explain(data.clone().requires_grad_(), [{"y": [0]}], rules)


def concepts(setup: Setup, preset: str, layer: str, n: int, batch_size: int) -> Run:
    """Several concepts of a layer, for one sample."""
    model, data = built(setup)
    explain, rules = zennit_crp("attribution").CondAttribution(model), composite(preset, setup.net)
    conditions = [{"y": [0], layer: [channel]} for channel in range(n)]

    def run() -> None:
        leaf = data[:1].clone().requires_grad_()
        deque(explain.generate(leaf, conditions, rules, batch_size=batch_size, verbose=False), maxlen=0)

    return run


def mining(setup: Setup, preset: str, layers: list[str] | None, n: int, classes: int, files: bool = False) -> Run:
    """All of a dataset, from the first sample to the collected results; or the number of files that it leaves."""
    model, data = built(setup)
    explain, rules = zennit_crp("attribution").CondAttribution(model), composite(preset, setup.net)
    channels = zennit_crp("concepts").ChannelConcept()
    dataset = Samples(n, tuple(data.shape[1:]), classes)

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            made = zennit_crp("visualization").FeatureVisualization(
                explain, dataset, dict.fromkeys(layers or convolutions(model), channels), path=folder
            )
            made.run(rules, 0, n, batch_size=setup.batch)
            return sum(path.is_file() for path in Path(folder).rglob("*")) if files else 0

    return run


def not_in_place(model: nn.Module) -> nn.Module:
    """The same model, without operations in place, which captum does not take."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            vars(module)["inplace"] = False
    return model


def captum_deeplift(setup: Setup) -> Run:
    """DeepLift against zeros."""
    model, data = built(setup)
    explain = import_module("captum.attr").DeepLift(not_in_place(model))
    return lambda: explain.attribute(data.clone().requires_grad_(), torch.zeros_like(data), target=0)


def captum_lrp(setup: Setup) -> Run:
    """LRP with alpha 1, beta 0 in convolutions, and epsilon elsewhere."""
    model, data = built(setup)
    rules = import_module("captum.attr._utils.lrp_rules")
    for module in not_in_place(model).modules():
        if isinstance(module, nn.Conv2d):
            module.rule = rules.Alpha1_Beta0_Rule()
        elif not list(module.children()):
            module.rule = rules.EpsilonRule()
    explain = import_module("captum.attr").LRP(model)
    return lambda: explain.attribute(data.clone().requires_grad_(), target=0)


def lxt_patched(family: str, rules: str) -> ModuleType:
    """Module that defines a family's models, under lxt's patches: ``attnLRP`` or ``cp_LRP``."""
    module = tiny.modeling(family)
    if family != tiny.VIT:
        module = importlib.reload(module)  # (without other patches)
        shared = module.ALL_ATTENTION_FUNCTIONS  # (of all families: the patch for CP-LRP stays in it)
        for name in list(shared):
            with contextlib.suppress(KeyError):
                del shared[name]
    patches = importlib.reload(import_module(f"lxt.efficient.models.{'vit_torch' if family == tiny.VIT else family}"))
    import_module("lxt.efficient").monkey_patch(module, getattr(patches, rules))
    return module


def lxt(setup: Setup, rules: str) -> Run:
    """Input times gradient under lxt's patches."""
    import_module("transformers").GPT2Model = lxt_patched("gpt2", rules).GPT2Model
    model, data = setup.build()

    def run() -> Tensor:
        leaf = data.clone().requires_grad_()
        torch.autograd.backward(model(leaf)[:, 0].sum())
        assert leaf.grad is not None
        return (leaf * leaf.grad).sum(-1)

    return run


def lxt_difference(family: str, rules: str, relevance: Sequence[float]) -> Run:
    """How far lxt is from relevance of a tiny model's input ÷ the largest of it."""
    lxt_patched(family, rules)
    model, data = tiny.build(family)

    def run() -> float:
        leaf = data.clone().requires_grad_()
        torch.autograd.backward(model(leaf)[:, 1].sum())
        assert leaf.grad is not None
        ours = torch.tensor(relevance, dtype=torch.float64)
        return float(((leaf * leaf.grad).flatten() - ours).abs().max() / ours.abs().max())

    return run


CANDIDATES: dict[str, Callable[..., Run]] = {
    "attribution": attribution,
    "concepts": concepts,
    "mining": mining,
    "captum deeplift": captum_deeplift,
    "captum lrp": captum_lrp,
    "lxt": lxt,
    "lxt difference": lxt_difference,
}


def versions(*names: str) -> dict[str, str]:
    """Versions of packages, without those that are not installed: an environment need not have all peers."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Session:
    """Answers requests.

    Parameters
    ----------
    candidates : dict of str to callable
        Functions that make a candidate of keywords.
    """

    def __init__(self, candidates: Mapping[str, Callable[..., Run]] = CANDIDATES) -> None:
        self._candidates = candidates
        self._made: dict[str, Run] = {}

    def answer(self, request: Mapping[str, Any]) -> Any:
        """Value that answers a request: ``{"do": "run" | "forget" | "versions", ...}``."""
        if request["do"] == "versions":
            return versions("zennit-crp", "zennit", "captum", "lxt", "transformers", "torch")
        if request["do"] == "forget":
            self._made.clear()
            built.cache_clear()
            torch.cuda.empty_cache()  # (the card's memory is for the others, too)
            return None
        repeat = request["candidate"].get("repeat", 1)
        run = self._candidate(request["candidate"])
        clock = CLOCKS[request["clock"]]
        return clock(run) if repeat == 1 else clock(lambda: [run() for _ in range(repeat)]) / repeat

    def _candidate(self, request: Mapping[str, Any]) -> Run:
        key = json.dumps(request, sort_keys=True)
        if key not in self._made:
            keywords = {name: value for name, value in request.items() if name not in ("candidate", "repeat")}
            if "setup" in keywords:
                keywords["setup"] = Setup(*keywords["setup"])
            self._made[key] = self._candidates[request["candidate"]](**keywords)
        return self._made[key]


def serve(session: Session | None = None) -> None:
    """Answer requests, one line each, until there are no more."""
    torch.set_num_threads(1)
    session = session or Session()
    # What peers print must not come between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers, contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            try:
                answer = {"value": session.answer(json.loads(line))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
