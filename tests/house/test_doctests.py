"""The examples in the docstrings run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import crp

MODULES = [m.name for m in pkgutil.walk_packages(crp.__path__, "crp.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    examples = [t for n in MODULES for t in doctest.DocTestFinder().find(importlib.import_module(n)) if t.examples]
    assert {"crp.attribution.CondAttribution", "crp.rules.base"} <= {t.name for t in examples}
