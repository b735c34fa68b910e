"""The section on transformers: what rules keep, and what a peer is asked."""

from __future__ import annotations

import json

import pytest

from benchmarks import tiny
from benchmarks.harness import Case, measure
from benchmarks.nets import Setup
from benchmarks.sections import SECTIONS
from crp.attribution import CondAttribution
from crp.composites import CPLRP


def test_language_models_keep_what_a_gradient_keeps_at_most():
    """A short text, in full; without checkpoints, rules add nothing to the graph, and share the norms' statistics."""
    section, setup = SECTIONS["transformers"], Setup("gpt2 4×256", 8, 1)
    assert setup.build()[1].shape == (1, 8, 256)
    assert str(setup) == "gpt2 4×256 8 tokens batch 1"
    rows = {row.metric: row.measured for row in measure(section.saved(setup))}
    for name in ("AttnLRP", "CP-LRP"):
        assert 0 < rows[f"kept by {name} ÷ gradient"].median <= 1.0
    case = section.time(setup, "AttnLRP", 1)
    repeated, computed = measure(Case(case.name, case.make, case.ratios, case.peers, clock="flops", rounds=1))
    assert repeated.note == "needs --peers" and not computed.note
    assert repeated.measured.median == computed.measured.median == 1.0


@pytest.mark.parametrize("family", [*tiny.FAMILIES, tiny.VIT])
def test_a_peer_is_handed_our_relevance_of_a_tiny_model(family):
    """Numbers that JSON holds, made when the case is measured: here those of CP-LRP, whose sum tells them."""

    class Asked:
        def cost(self, request, clock):
            self.request = json.loads(json.dumps(request))
            return 1e-9

        def forget(self):
            pass

    peers = Asked()
    case = SECTIONS["transformers"].agreement(family, "CP-LRP")
    (row,) = measure(case, peers)
    assert row.met and row.note == "" and measure(case)[0].note == "needs --peers"
    model, data = tiny.build(family)
    kept = CondAttribution(model).absorbed(data, [{"y": 1}], CPLRP())
    relevance = peers.request.pop("relevance")
    assert len(relevance) == data.numel() and abs(sum(relevance) - float(kept.input)) <= 1e-9
    assert peers.request == {"candidate": "lxt difference", "family": family, "rules": "cp_LRP", "repeat": 1}
