"""The default run leaves no value of any parameter out."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from covering import select


def cases_of(*sizes: int) -> list[dict[str, int]]:
    return [dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))]


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("sizes", [(5,), (3, 7), (24, 13, 3), (50, 17)], ids=str)
def test_every_value_occurs_so_many_times(sizes, times):
    cases = cases_of(*sizes)
    chosen = [cases[position] for position in select(cases, times)]
    present, occurs = (Counter(value for case in some for value in case.items()) for some in (cases, chosen))
    assert all(occurs[value] >= min(times, present[value]) for value in present)
    assert len(chosen) <= times * sum(sizes)
    assert chosen == [cases[position] for position in select(cases, times)]


def test_what_occurs_seldom_is_kept():
    cases = [{"a": 0, "b": n} for n in range(9)] + [{"a": 1, "b": 0}]
    assert 9 in select(cases, 1)
