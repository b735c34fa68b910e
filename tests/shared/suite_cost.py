"""What the suite itself costs: garbage is looked for among all tests, and lines are traced again and again."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

#: So many seconds of a parametrised test's cases are traced for coverage.
TRACED_SECONDS = 0.3
_spent = Counter[str]()


def keep_out_of_garbage() -> None:
    """What there is by now, such as all that the tests of a file imported, is not looked at again."""
    gc.collect()
    gc.freeze()


@contextmanager
def kept_out_of_garbage() -> Iterator[None]:
    """What is made in this context, such as all tests, is not looked at when garbage is collected, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def untraced(off: bool = True) -> Iterator[None]:
    """No line is traced for coverage, which would take half as long again."""
    coverage = _coverage() if off else None
    if coverage is None:
        yield
        return
    coverage.stop()
    try:
        yield
    finally:
        coverage.start()


def _coverage() -> Any:
    """What traces lines, if they are traced."""
    module = sys.modules.get("coverage")
    return module.Coverage.current() if module else None


@contextmanager
def collected_untraced(session: pytest.Session) -> Iterator[None]:
    """The tests are imported untraced, with all that they import; so the package is imported before, and traced."""
    hands_out = session.config.pluginmanager.has_plugin("dsession")  # the process of xdist that itself collects nothing
    if _coverage() is not None and not hands_out:
        import crp  # (traced from its first line on)

        for module in pkgutil.walk_packages(crp.__path__, "crp."):
            if not module.name.endswith("__main__"):
                with suppress(ImportError):  # (of a library that only its own tests need)
                    importlib.import_module(module.name)
    with untraced():
        yield


@contextmanager
def traced_at_first(item: pytest.Item) -> Iterator[None]:
    """The first cases of a parametrised test are traced for coverage; with the mark ``untraced``, none is."""
    test, start = item.nodeid.partition("[")[0], time.process_time()
    with untraced(_spent[test] > TRACED_SECONDS or item.get_closest_marker("untraced") is not None):
        yield
    _spent[test] += time.process_time() - start
