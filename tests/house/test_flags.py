"""Whatever is on or off: a word in place of True or False is refused wherever it is given, before work is done."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from crp.flags import check_flags
from crp.image import imgify
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
