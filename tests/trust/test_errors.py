"""Whatever this package refuses is a `CRPError`, and an error of the kind that Python has for it."""

from __future__ import annotations

import ast
import builtins
import importlib
from collections.abc import Iterator

import pytest
from house_plan import MODULES, TREES
from trust_cases import images, net

from crp import errors
from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, get
from crp.engine.attached import put_on
from crp.errors import CRPError

#: Errors that say nothing of what was given: who writes a subclass leaves a method out (NotImplementedError), a module
#: has no such name (AttributeError), something is not installed, the file system or the memory refuses, or a command
#: ends (SystemExit, KeyboardInterrupt; click prints its own).
OF_OTHERS = (NotImplementedError, AttributeError, ImportError, OSError, MemoryError, SystemExit, KeyboardInterrupt)
#: Statements that users do not meet: caught where they are raised, or a fault of this package itself.
INSIDE = {
    "crp.attributors.noise: RuntimeError",
    "crp.concepts.ids: TypeError",
    "crp.engine.kernel_calls: NotReplayableError",
    "crp.engine.names_read: NotReplayableError",
    "crp.visualization.mining.units: NotFiniteError",
    "crp.visualization.without: _NoRowsError",
}


def raised(tree: ast.AST) -> Iterator[str]:
    """Names of the errors that a module raises, or makes to be raised by others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.Return):
            made = node.exc if isinstance(node, ast.Raise) else node.value
            for one in made.values if isinstance(made, ast.BoolOp) else [made]:
                called = one.func if isinstance(one, ast.Call) else one
                if isinstance(called, ast.Name) and called.id.endswith(("Error", "Exit", "Interrupt")):
                    yield called.id


def outside(name: str, error: str) -> bool:
    kind = getattr(importlib.import_module(name), error, None) or getattr(builtins, error)
    is_of_click = kind.__module__ in ("click.exceptions", "crp.commands.errors")
    return not (issubclass(kind, (CRPError, *OF_OTHERS)) or is_of_click or f"{name}: {error}" in INSIDE)


@pytest.mark.promise("Input", "Whatever is refused is a `crp.errors.CRPError`")
def test_every_refusal_is_of_the_family():
    """`crp.errors` has a class for each kind: a ValueError is an InputError, a RuntimeError a StateError, and so on."""
    plain = {
        f"{name}: {error}" for name, path in MODULES.items() for error in raised(TREES[path]) if outside(name, error)
    }
    assert plain == set()


def test_what_is_inside_is_there():
    there = {f"{name}: {error}" for name, path in MODULES.items() for error in raised(TREES[path])}
    assert there >= INSIDE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("InputError", ValueError),
        ("InputTypeError", TypeError),
        ("NameNotFoundError", KeyError),
        ("OutOfRangeError", IndexError),
        ("StateError", RuntimeError),
        ("UnseenError", RuntimeError),
    ],
)
def test_kinds(name, kind):
    error = getattr(errors, name)("layer 'a' is \"b\"")
    assert isinstance(error, kind) and isinstance(error, CRPError)
    assert str(error) == "layer 'a' is \"b\""


def absent_layer(model, data):
    CondAttribution(model)(data, [{"y": 1, "absent": [0]}], EpsilonPlus())


def absent_class(model, data):
    CondAttribution(model)(data, [{"y": 77}], EpsilonPlus())


def absent_channel(model, data):
    CondAttribution(model)(data, [{"y": 1, "3": [99]}], EpsilonPlus())


def absent_composite(model, data):
    get("absent")


def absent_mask(model, data):
    CondAttribution(model)(data, [{"y": 1, "3": [0]}], EpsilonPlus(), mask_map={})


def composite_twice(model, data):
    with put_on(EpsilonPlus(), model):
        CondAttribution(model)(data, [{"y": 1}], EpsilonPlus())


@pytest.mark.promise(
    "Input",
    "An error is also a ValueError, TypeError, KeyError, IndexError or RuntimeError, as zennit-crp's users expect",
)
@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (absent_layer, KeyError),
        (absent_layer, ValueError),
        (absent_class, IndexError),
        (absent_channel, IndexError),
        (absent_composite, KeyError),
        (absent_mask, KeyError),
        (composite_twice, RuntimeError),
    ],
    ids=lambda one: one.__name__,
)
def test_calls(call, kind):
    with pytest.raises(kind) as caught:
        call(net(), images())
    assert isinstance(caught.value, CRPError)
    assert str(caught.value)[0] not in "'\""


def test_every_name_is_offered():
    assert errors.__all__ == sorted(errors.__all__)
    assert {name for name in vars(errors) if name.endswith("Error")} == {*errors.__all__}
