"""What a composite says of itself, in one place for ours, for zennit's and for none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus
from zennit.core import Composite as ZennitComposite

from crp.attribution import CondAttribution
from crp.composites import DeepLift, EpsilonPlus, ExcitationBackprop, Gradient
from crp.engine.encoding import Propagation, is_product, propagation_of, starts_at_one
from crp.errors import InputError


@pytest.mark.parametrize("composite", [None, ZennitEpsilonPlus()], ids=["none", "zennit"])
def test_what_says_nothing_has_the_defaults(composite):
    asked = propagation_of(composite)
    assert (asked.encoding, asked.readout, asked.initial, asked.isolates) == ("relevance", "relevance", "output", False)
    assert asked.members_for(torch.ones(1)) == [] and asked.accounting() is None
    assert asked.expect([0], 1) is None
    assert not is_product(asked) and not starts_at_one(asked)
    assert not vars(propagation_of(composite))


def test_composites_of_ours_answer_themselves():
    for composite in (EpsilonPlus(), Gradient(), DeepLift()):
        assert propagation_of(composite) is composite
    for composite, product, one in ((EpsilonPlus(), True, True), (Gradient(), False, True)):
        assert (is_product(composite), starts_at_one(composite)) == (product, one)
    assert is_product(ExcitationBackprop()) and not starts_at_one(ExcitationBackprop())
    assert ExcitationBackprop().initial == "one" and Gradient().readout == "multiplier"
    assert EpsilonPlus().accounting() is not None


@pytest.mark.parametrize("name", ["encoding", "readout", "initial"])
def test_a_word_that_there_is_not_is_refused(name):
    """Relevance would be read in one way here, and in another one there."""
    with pytest.raises(InputError, match=f"Mine.{name} is 'relevances'; it must be '"):
        type("Mine", (EpsilonPlus,), {name: "relevances"})
    mine = type("Mine", (ZennitComposite,), {name: "relevances"})
    with pytest.raises(InputError, match=f"Mine.{name} is 'relevances'; it must be '"):
        CondAttribution(nn.Linear(2, 2))(torch.ones(1, 2), [{"y": 0}], mine())


def test_a_composite_of_zennit_may_say_some_of_it():
    class Multiplying(ZennitComposite):
        encoding = "multiplier"

    asked = propagation_of(Multiplying())
    assert isinstance(asked, Propagation)
    assert (asked.encoding, asked.readout) == ("multiplier", "relevance")
    assert asked.members_for(torch.ones(1)) == []
