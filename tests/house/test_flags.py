"""What is on or off is True or False, and no number is: anything else is refused, before work is done."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crp import rules
from crp.attribution import CondAttribution
from crp.attributors.explaining import explain, methods
from crp.composites import get, names
from crp.demo import train
from crp.flags import check_flags
from crp.image import imgify, plot_grid
from crp.metrics import translations
from crp.visualization.analysis import histogram
from crp.visualization.mining.job import MiningOptions
from crp.visualization.report.options import ReportOptions
from crp.visualization.table.question import Question

#: Modules with what users call.
PUBLIC = (
    "attribution", "attributors", "audit", "cache", "composites", "concept_graph", "concepts", "demo", "demo.run",
    "graph", "helper", "image", "maximization", "metrics", "outputs", "rules", "statistics", "visualization",
    "visualization.analysis", "visualization.maximized", "visualization.ranking", "visualization.report",
    "visualization.synthesis",
)  # fmt: skip
#: What the package calls: methods for subclasses, and records of what was found.
CALLED_BY_US = {
    "Attributor.differentiating", "Cache.load", "Cache.save", "CondAttribution.backward", "Difference.beyond",
    "Gamma.joint", "Layer.__init__", "Prototypes.__init__",
}  # fmt: skip


def flags_of(function: Callable[..., Any]) -> list[str]:
    """Parameters that are written as ``bool``, or as that or something else."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if str(p.annotation).partition(" |")[0] in ("bool", "<class 'bool'>")]


def functions_of(thing: Any) -> Iterator[Callable[..., Any]]:
    """A function; or the methods of a class, its own and inherited ones."""
    if inspect.isfunction(thing):
        yield thing
    elif inspect.isclass(thing):
        for name, method in inspect.getmembers(thing, inspect.isfunction):
            if not name.startswith("_") or name in ("__init__", "__call__"):
                yield method


def cases() -> Iterator[Any]:
    """Every flag of every public function, once."""
    seen: set[tuple[str, str]] = set()
    for module in PUBLIC:
        loaded = importlib.import_module(f"crp.{module}")
        own = [name for name, value in vars(loaded).items() if getattr(value, "__module__", "") == loaded.__name__]
        for name in getattr(loaded, "__all__", own):
            for function in functions_of(getattr(loaded, name)) if not name.startswith("_") else ():
                called = function.__qualname__
                if not function.__module__.startswith("crp.") or called in CALLED_BY_US or called.endswith(".treats"):
                    continue
                for flag in flags_of(function):
                    if (called, flag) not in seen:
                        seen.add((called, flag))
                        yield pytest.param(getattr(loaded, name), function, flag, id=f"{called}-{flag}")


CASES = list(cases())


def call(home: Any, function: Callable[..., Any], flag: str, value: object) -> Any:
    """Call with ``value`` for a flag; what else is needed means nothing, as it is not to be looked at before."""
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_KEYWORD and p.name != flag]
    given = {name: object.__new__(home) if name == "self" else object() for name in needed}
    return function(**given, **{flag: value})


def test_all_flags_are_found():
    assert len(CASES) > 60
    assert {"top_k-least", "maximize-verbose", "CondAttribution.__call__-exclude_parallel"} <= {c.id for c in CASES}


@pytest.mark.parametrize("value", ["no", 1, None], ids=repr)
@pytest.mark.parametrize(("home", "function", "flag"), CASES)
def test_what_is_neither_true_nor_false_is_refused(home, function, flag, value):
    with pytest.raises(TypeError, match=f"^{flag} must be True or False, not {value!r}"):
        call(home, function, flag, value)


OPTIONS = [
    *(pytest.param(MiningOptions.of, flag, id=f"run-{flag}") for flag in flags_of(MiningOptions)),
    *(
        pytest.param(lambda given: ReportOptions(**given), flag, id=f"report-{flag}")
        for flag in flags_of(ReportOptions)
    ),
    *(pytest.param(lambda given: Question(**given), flag, id=f"question-{flag}") for flag in flags_of(Question)),
]


@pytest.mark.parametrize(("make", "flag"), OPTIONS)
def test_options_that_are_neither_true_nor_false_are_refused(make, flag):
    with pytest.raises(TypeError, match=f"^{flag} must be True or False, not 'no'"):
        make({flag: "no"})


def test_a_grid_is_true_false_or_rows_and_columns():
    picture = np.zeros((4, 2, 2))
    assert imgify(picture, grid=(1, 4)).size != imgify(picture, grid=True).size
    with pytest.raises(TypeError, match="grid must be True or False, not 'no'"):
        imgify(picture, grid="no")


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_], ids=repr)
def test_true_and_false_are_taken_also_those_of_numpy(value):
    check_flags(flag=value)


# --- and no number is True ------------------------------------------------------------------------------------------

MUST_BE_A_NUMBER = r" (must be|is) a .*[,;] not True$"
RULES = [getattr(rules, name) for name in rules.__all__]
#: Rules and composites, and what one must be given.
MADE: dict[Any, dict[str, Any]] = {one: {} for one in RULES if inspect.isclass(one) and issubclass(one, rules.Rule)}
MADE |= {type(get(name)): {} for name in names() if name != "epsilon_gamma_box"}
MADE[rules.ZBox] = MADE[type(get("epsilon_gamma_box", low=0, high=1))] = {"low": 0.0, "high": 1.0}


def numbers_of(make: Callable[..., Any]) -> list[str]:
    """Parameters that are a number, or a number or something else, but may not be left out by None."""
    words = {name: set(re.findall(r"\w+", str(p.annotation))) for name, p in inspect.signature(make).parameters.items()}
    numbers = {"int", "float", "Stabilize", "Bound", "Reference"}
    return [name for name, found in words.items() if found & numbers and "None" not in found]


@pytest.mark.parametrize(
    ("make", "needed", "name"),
    [
        pytest.param(make, needed, name, id=f"{make.__name__}-{name}")
        for make, needed in MADE.items()
        for name in numbers_of(make)
    ],
)
def test_no_number_of_a_rule_or_a_composite_is_true(make, needed, name):
    with pytest.raises((TypeError, ValueError), match=f"{name}{MUST_BE_A_NUMBER}"):
        make(**{**needed, name: True})


@pytest.mark.parametrize(
    ("method", "option"),
    [
        pytest.param(method, option, id=f"{method.name}-{option}")
        for method in methods()
        for option, default in method.options.items()
        if isinstance(default, int | float) and not isinstance(default, bool)
    ],
)
def test_no_number_of_a_method_is_true(method, option):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double().eval()
    needed = {name: {"layer": "0", "low": 0.0, "high": 1.0}[name] for name, v in method.options.items() if v is ...}
    with pytest.raises((TypeError, ValueError), match=f"{option}{MUST_BE_A_NUMBER}"):
        explain(method.name, net, torch.zeros(1, 1, 4, 4).double(), 0, **{**needed, option: True})


def test_relevance_does_not_start_with_true():
    attribution = CondAttribution(nn.Linear(2, 2).eval())
    for start in (True, lambda _: True):
        with pytest.raises(TypeError, match=r"^init_rel (must be|is) a .*\bbool\b"):
            attribution(torch.ones(1, 2), [{"y": 0}], init_rel=start)


@pytest.mark.parametrize(
    ("call_it", "message"),
    [
        (lambda: train(object(), epochs=True), "epochs must be a whole number"),
        (lambda: train(object(), batch_size=True), "batch_size must be a whole number"),
        (lambda: translations(torch.zeros(2, 2), [True]), "offsets must be whole numbers"),
        (lambda: translations(torch.zeros(2, 2), [1], axis=True), "a sample must be a tensor with the axis True"),
        (lambda: plot_grid({0: [np.zeros((2, 2))]}, True), "'cmap_dim' must be 0, 1 or None, got True"),
        (lambda: histogram(object(), object(), 0, True), "bins must be a whole number of at least 1, not True"),
    ],
    ids=["epochs", "batch size", "offsets", "axis", "cmap_dim", "bins"],
)
def test_no_count_is_true(call_it, message):
    with pytest.raises(ValueError, match=message):
        call_it()
