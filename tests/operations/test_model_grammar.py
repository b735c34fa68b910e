"""Random small models under every LRP preset: relevance as by the slow reference, or one of our errors."""

from __future__ import annotations

import contextlib
import itertools
import linecache
import os
import traceback
from pathlib import Path

import pytest
import torch
from core_cases import Maps
from grammar_programs import programs, single
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_grammar import OPERATIONS, GrammarNet, Program, merged
from model_state import state_of
from slow_reference import Method, SlowReference
from slow_rules import Doubtful, Refused, Rule
from torch import Tensor

import crp
import crp.composites as composites
from crp.attribution import CondAttribution
from crp.composites import Composite
from crp.composites.registry import classes
from crp.types import AbsorbedRelevance

EXAMPLES = int(os.environ.get("CRP_GRAMMAR_EXAMPLES", "300"))
PACKAGE = Path(crp.__file__).parent

EPSILON, ZPLUS, GAMMA, FLAT = Rule("epsilon"), Rule("zplus"), Rule("gamma"), Rule("flat")
ALPHA_BETA = Rule("alpha_beta")
BOX = Rule("zbox", low=-3.0, high=2.5)


def both(rule: Rule) -> dict[str, Rule]:
    return {"convolution": rule, "dense": rule}


#: Preset, its keywords, and what it is to do.
PRESETS: dict[str, tuple[type[Composite], dict[str, object], Method]] = {
    "epsilon_plus": (composites.EpsilonPlus, {}, Method(ZPLUS, EPSILON)),
    "epsilon_plus_coarse": (
        composites.EpsilonPlus, {"epsilon": 0.1, "stabilizer": 0.05, "gates": "split"},
        Method(Rule("zplus", 0.05), Rule("epsilon", 0.1), gates="split"),
    ),
    "epsilon_plus_empty": (
        composites.EpsilonPlus, {"empty": "epsilon", "zero_params": "bias"},
        Method(Rule("zplus", empty="epsilon"), EPSILON, zero_bias=True),
    ),
    "epsilon_plus_flat": (composites.EpsilonPlusFlat, {}, Method(ZPLUS, EPSILON, both(FLAT))),
    "alpha2_beta1": (composites.EpsilonAlpha2Beta1, {}, Method(ALPHA_BETA, EPSILON)),
    "alpha2_beta1_flat": (
        composites.EpsilonAlpha2Beta1Flat, {"empty": "epsilon", "stabilizer": 0.01},
        Method(Rule("alpha_beta", 0.01, empty="epsilon"), EPSILON, both(Rule("flat", 0.01))),
    ),
    "epsilon_gamma_box": (
        composites.EpsilonGammaBox, {"low": -3.0, "high": 2.5}, Method(GAMMA, EPSILON, {"convolution": BOX})
    ),
    "epsilon_gamma": (
        composites.EpsilonGamma, {"gamma": 0.5, "stabilizer": 0.02}, Method(Rule("gamma", 0.02, gamma=0.5), EPSILON)
    ),
    "lrp_cmp": (composites.LRPCMP, {}, Method(GAMMA, EPSILON, both(FLAT), ZPLUS, 0.5)),
    "lrp_cmp_box": (
        composites.LRPCMP, {"first": "box", "low": -3.0, "high": 2.5, "split": 0.4, "alpha": 2.0, "beta": 1.0},
        Method(GAMMA, EPSILON, both(BOX), ALPHA_BETA, 0.4),
    ),
    "lrp_0": (composites.UniformLRP0, {}, Method(Rule("epsilon", 0.0), Rule("epsilon", 0.0))),
    "epsilon": (composites.UniformEpsilon, {"epsilon": 0.1}, Method(Rule("epsilon", 0.1), Rule("epsilon", 0.1))),
    "epsilon_relative": (
        composites.UniformEpsilon, {"epsilon": 0.2, "norm_scale": True, "zero_params": "bias"},
        Method(Rule("epsilon", 0.2, is_relative=True), Rule("epsilon", 0.2, is_relative=True), zero_bias=True),
    ),
    "gamma": (
        composites.UniformGamma, {"gates": "split", "attention": "split"},
        Method(GAMMA, GAMMA, gates="split", attention="split"),
    ),
    "attn_lrp": (
        composites.AttnLRP, {"epsilon": 0.1},
        Method(Rule("epsilon", 0.1), Rule("epsilon", 0.1), gates="split", attention="split"),
    ),
    "cp_lrp": (composites.CPLRP, {}, Method(Rule("epsilon", 0.0), Rule("epsilon", 0.0))),
    "relp": (composites.RelP, {}, Method(Rule("epsilon", 0.0), Rule("epsilon", 0.0), gates="split")),
    "gamma_zero_bias": (
        composites.UniformGamma, {"gamma": 1.0, "zero_params": "bias"},
        Method(Rule("gamma", gamma=1.0), Rule("gamma", gamma=1.0), zero_bias=True),
    ),
    "zplus": (composites.UniformZPlus, {}, Method(ZPLUS, ZPLUS)),
    "alpha_beta": (
        composites.UniformAlphaBeta, {"alpha": 1.5, "beta": 0.5},
        Method(Rule("alpha_beta", alpha=1.5, beta=0.5), Rule("alpha_beta", alpha=1.5, beta=0.5)),
    ),
    "deep_taylor": (
        composites.DeepTaylor, {},
        Method(Rule("zplus", 0.0), Rule("zplus", 0.0), both(Rule("wsquare", 0.0)), zero_bias=True, attention=None),
    ),
    "deep_taylor_box": (
        composites.DeepTaylor, {"low": -3.0, "high": 2.5, "maxpool": "avg"},
        Method(Rule("zplus", 0.0), Rule("zplus", 0.0), both(Rule("zbox", 0.0, low=-3.0, high=2.5)), zero_bias=True,
               sums_pools=True, attention=None),
    ),
}  # fmt: skip


def test_every_lrp_preset_is_among_them():
    covered = {kind for kind, _, _ in PRESETS.values()}
    wanted = {kind for kind in classes().values() if issubclass(kind, composites.LRP | composites.DeepTaylor)}
    assert wanted <= covered


def wanted(program: Program, method: Method, data: Tensor, target: int, merges: bool) -> list[Tensor]:
    """Relevance by the reference, in each way that is right; nothing if the program is to be refused."""
    try:
        reference = SlowReference(program, method, data, merges)
        ways = powerset(reference.uncertain) if method.first else [()]
        return [SlowReference(program, method, data, merges, way).relevance(target) for way in ways]
    except Refused:
        return []


def powerset(steps: list[int]) -> list[tuple[int, ...]]:
    return [way for n in range(len(steps) + 1) for way in itertools.combinations(steps, n)]


def is_ours(error: Exception) -> bool:
    """Whether an error was raised on purpose, inside the package."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return Path(frame.filename).is_relative_to(PACKAGE) and line.startswith("raise ") and len(str(error)) > 20


def scale_of(*tensors: Tensor) -> float:
    return max(float(t.abs().max()) for t in tensors)


def changes(before: dict[str, object], model: torch.nn.Module) -> list[object]:
    after = state_of(model)
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def accounted(model: torch.nn.Module, data: Tensor, target: int, composite: Composite) -> AbsorbedRelevance | None:
    """What was kept; None where a layer mixes the samples."""
    try:
        return CondAttribution(model).absorbed(data.clone(), [{"y": target}], composite)
    except ValueError as error:
        assert "told apart by sample" in str(error)
        return None


def check(program: Program, preset: str, target: int) -> None:
    """Assert that relevance is that of the reference and the account closes, or that both refuse.

    Raises
    ------
    Doubtful
        If what is right hangs on ties or rounding.
    """
    kind, keywords, method = PRESETS[preset]
    norms = {k for k, step in enumerate(program.steps) if step.name == "batch_norm"}
    merges = norms <= set(merged(program).values())
    model, data = GrammarNet(program).eval(), program.data()
    prediction = model(data.clone()).detach()
    target %= prediction.shape[1]
    if not prediction.isfinite().all():
        raise Doubtful("infinite")
    here = f"{preset}, target {target}\n{program}"
    references = wanted(program, method, data, target, merges)
    before, composite = state_of(model), kind("auto" if merges else None, **keywords)
    try:
        found = Maps(model)(data.clone(), [{"y": target}], composite)
        account = accounted(model, data, target, composite)
    except Exception as error:
        assert changes(before, model) == [], here
        if not is_ours(error):
            raise AssertionError(f"{error!r}\n{here}") from error
        assert references == [], f"refused by {error!r}\n{here}"
        return
    assert changes(before, model) == [], here
    assert references != [], f"not refused\n{here}"
    if scale_of(prediction) < 1e-14:
        raise Doubtful("nothing but rounding")
    assert (found.prediction - prediction).abs().max() <= 1e-12 * scale_of(prediction), here
    if scale_of(references[0]) < 1e-9:
        raise Doubtful("nothing but rounding")
    gap = min(scale_of(found.heatmap - reference) / scale_of(reference) for reference in references)
    if gap > 1e-9:  # (where rounding alone moves the reference so much, no one is right)
        nudged = wanted(program, method, data * (1 + 1e-13 * torch.randn_like(data)), target, merges)
        if gap < 100 * scale_of(nudged[0] - references[0]) / scale_of(references[0]):
            raise Doubtful("rounding")
        for zeros in ("up", "down", "both"):
            other = SlowReference(program, method, data, merges, zeros=zeros).relevance(target)
            if scale_of(other - references[0]) > 1e-9:
                raise Doubtful("the multiplier of an input of 0")
    assert gap <= 1e-9, f"off by {gap:.1e}\n{here}"
    if account is None:
        return
    kept = [share for shares in account.layers.values() for share in shares.values()]
    assert account.rest.abs().max() <= 1e-8 * scale_of(account.initial, found.heatmap, *kept), f"{account}\n{here}"


SPELLINGS = [
    (name, spelling) for name, step in OPERATIONS.items() for spelling in ("plain", *step.spellings, *step.modules)
]


@pytest.mark.filterwarnings("ignore:ZBox.*are not between:UserWarning")  # (of the largest entries of an input)
@pytest.mark.parametrize(("name", "spelling"), SPELLINGS, ids=[f"{name}-{spelling}" for name, spelling in SPELLINGS])
def test_every_spelling(name, spelling):
    """Each once at the input and once behind an affine operation, under three presets."""
    for at_input in (True, False):
        fitting = (single(name, spelling, seed, at_input) for seed in range(400))
        for program in filter(None, fitting):
            with contextlib.suppress(Doubtful):
                for preset in ("epsilon_plus_flat", "alpha_beta", "deep_taylor_box"):
                    check(program, preset, 0)
                break
        else:
            pytest.fail("no program")


#: Presets that differ from the others in attention and gates only.
TRANSFORMERS = ("attn_lrp", "cp_lrp", "relp")
OTHERS = [name for name in PRESETS if name not in TRANSFORMERS]


@pytest.mark.untraced
@pytest.mark.filterwarnings("ignore:ZBox. .* are not between low and high")  # (of few numbers, many may be outside)
@pytest.mark.timeout(0)  # (it takes as long as the examples that are asked for)
@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(programs(), st.lists(st.sampled_from(OTHERS), min_size=2, max_size=2, unique=True), st.integers(0, 5))
def test_relevance_of_any_small_model(program, presets, target):
    for preset in presets:
        with contextlib.suppress(Doubtful):
            check(program, preset, target)


@pytest.mark.untraced
@settings(
    max_examples=EXAMPLES // 5, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(programs(), st.sampled_from(TRANSFORMERS), st.integers(0, 5))
def test_presets_for_transformers_on_any_small_model(program, preset, target):
    with contextlib.suppress(Doubtful):
        check(program, preset, target)
