"""Where zennit-crp 0.6.0 is wrong: ours gives the right figures, and the peer really does not."""

from __future__ import annotations

import parity_defects
import parity_mining_defects
import pytest
from parity_compare import assert_parity, difference

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:the table in .* covers")]

MODULES = (parity_defects, parity_mining_defects)
DEFECTS = {name: (module.__name__, defect) for module in MODULES for name, defect in module.CASES.items()}


def part(results, name):
    return {key.removeprefix(f"{name}/"): value for key, value in results.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", DEFECTS)
def test_ours_is_right(name, peer):
    module, defect = DEFECTS[name]
    right = part(peer[module][name], "right")
    assert right
    assert_parity(defect.asked(), right)


@pytest.mark.parametrize("name", DEFECTS)
def test_peer_is_wrong(name, peer):
    """A defect that is no more, or was never one, leaves the list."""
    results = peer[DEFECTS[name][0]][name]
    asked, right = part(results, "asked"), part(results, "right")
    assert "error" in asked or any(key not in asked or difference(asked[key], right[key]) for key in right)
