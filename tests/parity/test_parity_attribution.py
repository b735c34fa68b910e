"""`CondAttribution`, `AttributionGraph` and `ChannelConcept` against zennit-crp 0.6.0, run live."""

from __future__ import annotations

import parity_cases
import parity_generation
import pytest
from attribution_cases import plain_sums
from parity_compare import assert_parity

pytestmark = [pytest.mark.peer, plain_sums]


@pytest.mark.parametrize("name", parity_cases.CASES)
def test_call(name, peer):
    case = parity_cases.CASES[name]
    assert_parity(case.compute(), peer["parity_cases"][name], case.wrong)


@pytest.mark.parametrize("name", parity_generation.CASES)
def test_generation_and_graph(name, peer):
    case = parity_generation.CASES[name]
    assert_parity(case.compute(), peer["parity_generation"][name], case.wrong)
