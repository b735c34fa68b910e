"""What is on a model: listed, refused in twos, taken off after a crash; and small laws of what is asked of a model."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import zennit.composites
from torch import nn
from trust_cases import CONDITIONS, differences, images, net, state, zennit_merged

import crp
from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, EpsilonPlusFlat
from crp.engine.attached import put_on
from crp.helper import get_output_shapes
from crp.rules import ZPlus


@pytest.mark.promise("Model", "`crp.attached(model)` lists what is on a model, and `crp.clear(model)` takes it off")
@pytest.mark.parametrize("make", [EpsilonPlusFlat, zennit_merged], ids=["ours", "zennit"])
def test_what_is_on_a_model_is_listed_and_cleared(make):
    model, data = net(), images()
    before = state(model)
    assert crp.attached(model) == [] == crp.clear(model)
    with put_on(composite := make(), model):
        on = crp.attached(model)
        assert on[0] == (type(composite).__name__, "", threading.get_ident())
        assert {one.layer for one in on} >= ({""} if make is EpsilonPlusFlat else {"0", "6"})
        assert crp.clear(model) == on
        assert crp.attached(model) == []
        assert differences(before["model"], state(model)["model"]) == []
    assert differences(before, state(model)) == []
    CondAttribution(model)(data, CONDITIONS, make())


@pytest.mark.promise("Model", "`crp.clear` also takes off a composite that was put on by hand and forgotten")
def test_a_composite_that_was_forgotten_on_a_model_is_cleared():
    model = net()
    model.requires_grad_(True)
    before = state(model)
    EpsilonPlus().register(model)
    ZPlus().register(net_other := net())
    assert next(one.what for one in crp.attached(model)) == "EpsilonPlus"
    assert crp.clear(model) and crp.clear(net_other)
    assert differences(before, state(model)) == []
    assert crp.attached(net_other) == [] == crp.clear(model)


@pytest.mark.promise("Model", "`crp.clear` leaves a user's own hooks where they are")
def test_a_users_own_hook_stays():
    model = net()
    model[0].register_forward_hook(lambda *_: None)
    with EpsilonPlus().context(model):
        crp.clear(model)
    assert len(model[0]._forward_hooks) == 1 and crp.attached(model) == []


def test_a_model_that_another_thread_works_on_is_not_cleared():
    model, inside, go = net(), threading.Event(), threading.Event()

    def hold() -> None:
        with put_on(EpsilonPlus(), model):
            inside.set()
            go.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(20)
    with pytest.raises(RuntimeError, match="another thread is at work on the model"):
        crp.clear(model)
    go.set()
    thread.join()
    assert crp.attached(model) == []


# --- one inside of another ------------------------------------------------------------------------------------------

MAKERS = {"ours": EpsilonPlus, "zennit's": zennit.composites.EpsilonPlus, "none": lambda: None}


@pytest.mark.promise("Model", "A call inside of another one on the same layers is refused")
@pytest.mark.parametrize("inner", MAKERS)
@pytest.mark.parametrize("outer", ["ours", "zennit's"])
def test_a_call_inside_of_another_is_refused(outer, inner):
    model, data = net(), images()
    before = state(model)

    class Asks(CondAttribution):
        def relevance_init(self, *given):
            CondAttribution(self.model)(data, [{"y": 0}], MAKERS[inner]())
            return super().relevance_init(*given)

    with pytest.raises(RuntimeError, match=r"is under way on the model|is on a layer of the model already"):
        Asks(model)(data, [{"y": 1}], MAKERS[outer]())
    assert differences(before, state(model)) == []

    class AsksOfACopy(CondAttribution):
        def relevance_init(self, *given):
            CondAttribution(other)(data, [{"y": 0}], MAKERS[inner]())
            return super().relevance_init(*given)

    other = copy.deepcopy(model)
    AsksOfACopy(model)(data, [{"y": 1}], MAKERS[outer]())


@pytest.mark.promise("Model", "Composites are not put on top of each other")
@pytest.mark.parametrize("outer", ["ours", "zennit's"])
def test_composites_by_hand_are_not_put_on_top_of_each_other(outer):
    model, data = net(), images()
    before = state(model)
    with MAKERS[outer]().context(model):
        for other in (EpsilonPlusFlat(), EpsilonPlus()):
            with pytest.raises(RuntimeError, match=r"already, and .* would come on top of it"):
                other.register(model)
            with pytest.raises(RuntimeError, match=r"already, and .* would come on top of it"):
                other.register(nn.Sequential(model))
    assert differences(before, state(model)) == []
    with EpsilonPlus().context(model):
        composite = zennit.composites.EpsilonPlus()
        with composite.context(model), pytest.raises(RuntimeError, match="is on a layer of the model already"):
            model(data.clone().requires_grad_())


# --- what was silent ------------------------------------------------------------------------------------------------


@pytest.mark.promise("Model", "Shapes are asked in evaluation mode: statistics of batch norm do not change")
def test_shapes_are_asked_in_evaluation_mode():
    model = net().train()
    before = state(model)
    assert get_output_shapes(model, images(1), ["3"])["3"] == (3, 4, 4)
    assert differences(before, state(model)) == []


@pytest.mark.promise("Results", "A layer has the same relevance under both of its names, `x` and `x#0`")
@pytest.mark.parametrize(
    "keywords", [{}, {"start_layer": "4"}, {"exclude_parallel": False}], ids=["plain", "start", "past"]
)
@pytest.mark.parametrize("condition", [{"4": [0]}, {"4#0": [0, 1]}, {"4": [0], "4#0": [0, 1]}, {}], ids=str)
def test_both_names_of_a_layer_have_the_same_relevance(keywords, condition):
    attribution, data = CondAttribution(net()), images()
    names = ["4", "4#0", "3", "3#0"]
    if "start_layer" in keywords:
        found = attribution(data, [condition or {"3": [1]}], EpsilonPlus(), names, **keywords)
    else:
        found = attribution(data, [{"y": 1, **condition}], EpsilonPlus(), names, **keywords)
    alone = {
        name: attribution(
            data, [condition if "start_layer" in keywords and condition else {"3": [1]}] if "start_layer" in keywords
            else [{"y": 1, **condition}], EpsilonPlus(), [name], **keywords
        ).relevances[name]
        for name in names
    }  # fmt: skip
    for name in ("3", "4"):
        assert found.relevances[name].abs().sum() > 0
        assert torch.equal(found.relevances[name], found.relevances[f"{name}#0"])
        assert torch.equal(found.relevances[name], alone[name])
