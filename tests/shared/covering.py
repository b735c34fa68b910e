"""A selection of the cases of a parametrised test in which every value of every parameter occurs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest


def select(cases: Sequence[Mapping[str, int]], times: int) -> list[int]:
    """Positions of cases so that every value of every parameter occurs so many times, or in all its cases.

    In an order that is mixed, so that a value meets various values of the other parameters, but always the same.

    Parameters
    ----------
    cases : sequence of mappings
        A number for the value that each parameter has in a case.
    times : int

    Returns
    -------
    list of int
        In ascending order.
    """
    occurs, chosen = Counter[tuple[str, int]](), list[int]()
    for position in random.Random(0).sample(range(len(cases)), len(cases)):
        values = cases[position].items()
        if any(occurs[value] < times for value in values):
            occurs.update(values)
            chosen.append(position)
    return sorted(chosen)


def identities(parameters: Mapping[str, object]) -> dict[str, int]:
    """Values as numbers; those of one list are the same objects in every case."""
    return {name: id(value) for name, value in parameters.items()}


def mark_the_rest_slow(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what `select` leaves out of the tests with the mark ``covering``."""
    families: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering") and hasattr(item, "callspec"):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for family in families.values():
        marker = family[0].get_closest_marker("covering")
        assert marker is not None
        kept = set(select([identities(item.callspec.params) for item in family], *marker.args))
        for position, item in enumerate(family):
            if position not in kept:
                item.add_marker(pytest.mark.slow)
