"""A composite that a user's own hand has put on the model: it is used, and two are an error."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import zennit.composites
from attribution_cases import close, same, stack
from torch import nn
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon as ZennitEpsilon
from zennit.rules import ZPlus as ZennitZPlus

import crp
from crp.attribution import CondAttribution
from crp.attributors import Gradient, GuidedGradCAM, IntegratedGradients, MeaningfulPerturbation, Occlusion, SmoothGrad
from crp.composites import DeepLift, EpsilonPlus, EpsilonPlusFlat, ExcitationBackprop, GradientTimesInput
from crp.composites import Gradient as GradientComposite
from crp.engine import attached as guard
from crp.engine.attached import placed
from crp.rules import ZPlus

CONDITIONS = [{"y": 1}, {"y": 2, "features.3": [0, 2]}]
OURS = {
    "plus": EpsilonPlus,
    "plus_flat": EpsilonPlusFlat,
    "gradient": GradientComposite,
    "gradient_x_input": GradientTimesInput,
    "excitation": ExcitationBackprop,
    "deeplift": DeepLift,
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("given", [False, True], ids=["none", "the same"])
def test_composite_on_the_model_is_used(vgg_bn, images, untouched, name, given):
    attribution = CondAttribution(vgg_bn)
    wanted = attribution(images, CONDITIONS, OURS[name](), ["features.0"])
    composite = OURS[name]()
    argument = composite if given else None
    with untouched(vgg_bn), composite.context(vgg_bn):
        found = attribution(images, CONDITIONS, argument, ["features.0"])
        assert composite.handles
        parts = attribution.generate(images, CONDITIONS, argument, ["features.0"], batch_size=3, verbose=False)
        assert same(stack(parts), found)
        again = attribution(images, CONDITIONS, argument, ["features.0"])
    assert same(found, wanted) and same(again, wanted)
    assert found.encoding == wanted.encoding == "multiplier"
    assert found.multipliers.keys() == wanted.multipliers.keys() == {"features.0", "features.3"}


def test_account_of_a_composite_on_the_model(vgg_bn, images):
    attribution = CondAttribution(vgg_bn)
    wanted = attribution.absorbed(images, CONDITIONS[:1], EpsilonPlus())
    with EpsilonPlus().context(vgg_bn):
        found = attribution.absorbed(images, CONDITIONS[:1], None)
    assert close(found.input, wanted.input) and close(found.total, wanted.total)


def test_parts_outlast_the_context(vgg_bn, images):
    """A generator that goes on when the context is left puts the composite on the model itself."""
    attribution = CondAttribution(vgg_bn)
    wanted = attribution(images, CONDITIONS, EpsilonPlus())
    with EpsilonPlus().context(vgg_bn):
        parts = attribution.generate(images, CONDITIONS, None, batch_size=2, verbose=False)
        first = next(parts)
    assert same(stack([first, *parts]), wanted)


@pytest.mark.parametrize("canonized", [False, True])
def test_composite_of_zennit_on_the_model(vgg_bn, images, canonized):
    """It propagates relevance itself, as what has no composite does."""
    canonizers = [SequentialMergeBatchNorm()] if canonized else []

    def make() -> Any:
        return zennit.composites.EpsilonPlus(canonizers=canonizers)

    attribution = CondAttribution(vgg_bn)
    wanted = attribution(images, CONDITIONS, make(), ["features.0"])
    for argument in (None, composite := make()):
        with composite.context(vgg_bn):
            for _ in range(2):
                found = attribution(images, CONDITIONS, argument, ["features.0"])
                assert same(found, wanted)
                assert found.encoding == "relevance" and found.multipliers is None


def test_a_single_rule_of_zennit_by_hand(vgg_bn, images):
    """Beside a composite of zennit that has none for its layer, as in zennit."""
    names = [name for name, module in vgg_bn.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    others = [(names[1:], ZennitEpsilon())]
    attribution = CondAttribution(vgg_bn)
    wanted = attribution(images, CONDITIONS, NameMapComposite([([names[0]], ZennitZPlus()), *others]))
    handles = ZennitZPlus().register(vgg_bn.get_submodule(names[0]))
    try:
        assert same(attribution(images, CONDITIONS, NameMapComposite(others)), wanted)
        with pytest.raises(RuntimeError, match=r"the rule ZPlus is on .* already, and EpsilonPlus would"):
            attribution(images, CONDITIONS, EpsilonPlus())
    finally:
        handles.remove()


def zennit_with_ours() -> NameMapComposite:
    return NameMapComposite([(["features.0"], ZPlus())])


PAIRS = {
    "ours on ours": (EpsilonPlus, EpsilonPlusFlat, "EpsilonPlusFlat is on .* already, and EpsilonPlus would come"),
    "ours on zennit's": (EpsilonPlus, zennit.composites.EpsilonPlus, "the rule .* is on a layer of the model already"),
    "zennit's on ours": (zennit.composites.EpsilonGammaBox, EpsilonPlus, "EpsilonPlus is on the model already"),
    "ours on zennit's with a rule of ours": (EpsilonPlus, zennit_with_ours, "the rule ZPlus is on a layer"),
    "zennit's on zennit's with a rule of ours": (zennit.composites.EpsilonPlus, zennit_with_ours, "has 2 rules, "),
    "zennit's on zennit's": (zennit.composites.EpsilonPlus, zennit.composites.EpsilonPlusFlat, "has 2 rules, "),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("generate", [False, True])
def test_two_are_an_error(vgg_bn, images, untouched, case, generate):
    given, on_model, message = PAIRS[case]
    low_high = {"low": -torch.ones_like(images[:1]), "high": torch.ones_like(images[:1])}
    given = given(**low_high) if "Box" in given.__name__ else given()
    attribution = CondAttribution(vgg_bn)
    with untouched(vgg_bn), on_model().context(vgg_bn), pytest.raises(RuntimeError, match=message):
        if generate:
            list(attribution.generate(images, CONDITIONS, given, verbose=False))
        else:
            attribution(images, CONDITIONS, given)


def test_composite_on_a_part_or_on_a_whole_is_an_error(vgg_bn, images):
    message = "EpsilonPlus is on a part of the model, or on a module that the model is a part of"
    for model, other in ((vgg_bn, vgg_bn.features), (vgg_bn.features, vgg_bn)):
        with EpsilonPlus().context(other):
            for composite in (None, EpsilonPlus()):
                with pytest.raises(RuntimeError, match=message):
                    CondAttribution(model)(images, [{"y": 1}], composite)
    with EpsilonPlus().context(nn.Sequential(nn.Linear(2, 2))):
        CondAttribution(vgg_bn)(images, [{"y": 1}], EpsilonPlus())


def test_references_of_a_list_are_not_averaged_by_hand(vgg_bn, images):
    with (
        DeepLift(reference=[torch.zeros_like, torch.ones_like]).context(vgg_bn),
        pytest.raises(ValueError, match="this DeepLift has 2 references"),
    ):
        CondAttribution(vgg_bn)(images, [{"y": 1}])


def test_nothing_is_remembered_of_composites_that_are_gone(vgg_bn, images):
    composite = EpsilonPlus()
    with composite.context(vgg_bn):
        assert guard.composite_on(vgg_bn) is composite
    assert guard.composite_on(vgg_bn) is None
    composite.register(vgg_bn)
    composite.remove()
    del composite
    gc.collect()
    assert not placed() and not guard._of_calls

    class Breaks(SequentialMergeBatchNorm):
        def apply(self, root_module: nn.Module) -> list[Any]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        EpsilonPlus([Breaks()]).register(vgg_bn)
    with pytest.raises(ZeroDivisionError):
        CondAttribution(vgg_bn)(images, CONDITIONS, EpsilonPlus([Breaks()]))
    assert not placed() and not guard._of_calls


def test_hooks_that_another_thread_puts_on_while_they_are_looked_at(vgg_bn):
    """One that is asked whose it is stands for the other thread."""
    layer = vgg_bn.features[0]

    class Hook:
        def __call__(self, *given: Any) -> None:
            pass

        @property
        def __self__(self) -> None:
            layer.register_forward_hook(lambda *given: None)

    for hook in (Hook(), lambda *given: None):
        layer.register_forward_hook(hook)
    assert guard._rules_on(layer) == [] and len(layer._forward_hooks) == 3


def test_threads_do_not_take_a_call_of_another_for_a_hand(vgg_bn, images):
    """While a call in one thread has its composite on the model, one without a composite waits, and is plain."""
    inside, go = threading.Event(), threading.Event()

    class Waits(CondAttribution):
        def relevance_init(self, *given: Any) -> Any:
            inside.set()
            assert go.wait(20)
            return super().relevance_init(*given)

    found: dict[str, Any] = {}

    def ask(name: str, attribution: CondAttribution, composite: Any) -> None:
        try:
            found[name] = attribution(images, [{"y": 1}], composite)
        except Exception as error:
            found[name] = error

    for shared in (EpsilonPlus(), zennit.composites.EpsilonPlus()):
        inside.clear()
        go.clear()
        threads = [threading.Thread(target=ask, args=("waits", Waits(vgg_bn), shared))]
        threads[0].start()
        assert inside.wait(20)
        asked = {"none": None, "other": EpsilonPlusFlat(), "the same": shared}
        for name, composite in asked.items():
            threads.append(threading.Thread(target=ask, args=(name, CondAttribution(vgg_bn), composite)))
            threads[-1].start()
            threads[-1].join(0.1)  # (it has looked at the model, and waits)
        go.set()
        for thread in threads:
            thread.join(20)
        for name, composite in {"waits": shared, **asked}.items():
            assert isinstance(found[name], tuple), found[name]
            assert same(found[name], CondAttribution(vgg_bn)(images, [{"y": 1}], composite)), name


# --- other methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [EpsilonPlus, zennit.composites.EpsilonPlus], ids=["ours", "zennit"])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: Gradient(m)(x, 1),
        lambda m, x: IntegratedGradients(m, steps=2)(x, 1),
        lambda m, x: SmoothGrad(m, n=2)(x, 1),
        lambda m, x: MeaningfulPerturbation(m, steps=1, mask_size=4, sigma=1)(x, 1),
        lambda m, x: crp.explain("intgrad", m, x, 1, steps=2),
    ],
    ids=["gradient", "intgrad", "smoothgrad", "perturbation", "explain"],
)
def test_methods_with_a_gradient_of_their_own_refuse(vgg_bn, images, make, call):
    with make().context(vgg_bn), pytest.raises(RuntimeError, match=r"is on the model, and .* would use what"):
        call(vgg_bn, images)


def test_methods_whose_composite_is_on_the_model(vgg_bn, images):
    for make in (EpsilonPlus, zennit.composites.EpsilonPlus):
        wanted = Gradient(vgg_bn, make())(images, 1)[1]
        composite = make()
        with composite.context(vgg_bn):
            for _ in range(2):
                assert close(Gradient(vgg_bn, composite)(images, 1)[1], wanted)
        with Gradient(vgg_bn, make()) as attributor:
            for _ in range(2):
                assert close(attributor(images, 1)[1], wanted)
    wanted = Occlusion(vgg_bn, window_shape=4, step=4)(images, 1)[1]
    with Occlusion(vgg_bn, EpsilonPlus(), window_shape=4, step=4) as attributor:
        assert close(attributor(images, 1)[1], wanted)
    with GuidedGradCAM(vgg_bn, layer="features.3") as attributor, pytest.raises(RuntimeError, match="is on the model"):
        attributor(images, 1)
