"""Where zennit-crp 0.6.0 is wrong: ours gives the right figures, and the peer really does not."""

from __future__ import annotations

import parity_defects
import pytest
from parity_compare import assert_parity, difference

pytestmark = pytest.mark.peer


def part(results, name):
    return {key.removeprefix(f"{name}/"): value for key, value in results.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", parity_defects.CASES)
def test_ours_is_right(name, peer):
    right = part(peer["parity_defects"][name], "right")
    assert right
    assert_parity(parity_defects.CASES[name].asked(), right)


@pytest.mark.parametrize("name", parity_defects.CASES)
def test_peer_is_wrong(name, peer):
    """A defect that is no more, or was never one, leaves the list."""
    asked, right = (part(peer["parity_defects"][name], which) for which in ("asked", "right"))
    assert "error" in asked or any(key not in asked or difference(asked[key], right[key]) for key in right)
