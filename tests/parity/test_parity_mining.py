"""Top tables, class statistics and reference samples against zennit-crp 0.6.0, run live."""

from __future__ import annotations

import numpy as np
import parity_mining
import pytest
from parity_compare import assert_parity

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("name", parity_mining.CASES)
def test_mining(name, peer):
    case = parity_mining.CASES[name]
    assert_parity(case.compute(), peer["parity_mining"][name], case.wrong)


def test_data_has_no_ties(peer):
    """Else the peer's order would be arbitrary and prove nothing."""
    tables = {name: table for name, table in peer["parity_mining"]["mining"].items() if name.endswith("/rel")}
    assert {len(table) for table in tables.values()} >= {40, 9}
    for name, table in tables.items():
        assert (np.diff(table, axis=0) < 0).all(), name
