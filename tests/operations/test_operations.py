"""Operations without a module, and everything that models do around them: in place, nested, compiled, threaded."""

import copy
import functools
import gc
import pickle
import threading
import warnings

import pytest
import torch
from core_cases import Maps, Net, conv_net, deviation, exact, exhibit, heatmap, images, net, rules, within
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.overrides import _get_current_function_mode_stack as modes
from torch.utils.checkpoint import checkpoint

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.composites import (
    LRP,
    AttnLRP,
    Composite,
    DeepLift,
    EpsilonPlus,
    EpsilonPlusFlat,
    GuidedBackprop,
)
from crp.errors import UnseenError
from crp.rules import Epsilon, Flat, GuidedReLU, Norm, Pass, Rule, Whole, ZPlus


@pytest.fixture(autouse=True)
def no_mode_is_left():
    yield
    assert not modes()


def flag(function, *args):
    return lambda s, h: function(h, *args, inplace=True)


def gated(multiply):
    def between(s, h):
        return multiply(h, torch.sigmoid(h.mean((2, 3), keepdim=True)))

    return between


def into(s, h, change):
    h = h.clone()
    change(h)
    return h


#: What is in place, a view or called in another way, and the same in plain words.
SAME = {
    "relu_": (lambda s, h: h.relu_(), lambda s, h: h.relu()),
    "relu_inplace": (flag(F.relu), lambda s, h: h.relu()),
    "relu_positional": (lambda s, h: F.relu(h, True), lambda s, h: h.relu()),
    "relu_keyword": (lambda s, h: F.relu(input=h), lambda s, h: h.relu()),
    "relu_keywords": (lambda s, h: F.relu(inplace=True, input=h), lambda s, h: h.relu()),
    "silu_inplace": (flag(F.silu), lambda s, h: F.silu(h)),
    "silu_positional": (lambda s, h: F.silu(h, True), lambda s, h: F.silu(h)),
    "silu_keywords": (lambda s, h: F.silu(inplace=True, input=h), lambda s, h: F.silu(h)),
    "elu_positional": (lambda s, h: F.elu(h, 1.0, True), lambda s, h: F.elu(h)),
    "sigmoid_": (lambda s, h: torch.sigmoid_(h), lambda s, h: h.sigmoid()),
    "pow_": (lambda s, h: h.pow_(2), lambda s, h: h.square()),
    "iadd": (lambda s, h: h.__iadd__(F.silu(h.clone())), lambda s, h: h + F.silu(h)),
    "imul": (gated(lambda h, g: h.__imul__(g)), gated(lambda h, g: h * g)),
    "mul_": (gated(lambda h, g: h.mul_(g)), gated(lambda h, g: g * h)),
    "multiply": (gated(lambda h, g: torch.multiply(input=g, other=h)), gated(lambda h, g: g * h)),
    "sigmoid_as_gate": (lambda s, h: h * h.clone().sigmoid_(), lambda s, h: h * h.sigmoid()),
    "view": (lambda s, h: into(s, h, lambda h: F.silu(h[:, :2], inplace=True)), lambda s, h: halves(h)),
    "assign": (lambda s, h: into(s, h, lambda h: h.__setitem__((slice(None), slice(2)), F.silu(h.clone()[:, :2]))),
               lambda s, h: halves(h)),
    "chunk": (lambda s, h: torch.cat([F.silu(h.chunk(2, 1)[0]), h.chunk(2, 1)[1]], 1), lambda s, h: halves(h)),
    "split": (lambda s, h: torch.cat((F.silu(h.split([2, 2], 1)[0]), h.split(2, 1)[1]), dim=1), lambda s, h: halves(h)),
    "unbind": (lambda s, h: torch.stack([F.silu(t) for t in h.unbind(1)], dim=1), lambda s, h: F.silu(h)),
    "max": (lambda s, h: F.silu(h).max(2).values, lambda s, h: F.silu(h).amax(2)),
    "cat_list": (lambda s, h: torch.cat([h, F.silu(h)], 2), lambda s, h: torch.concat(tensors=(h, F.silu(h)), dim=2)),
    "pool_indices": (lambda s, h: F.max_pool2d(F.silu(h), 2, return_indices=True)[0],
                     lambda s, h: F.max_pool2d(F.silu(h), 2)),
}  # fmt: skip


def halves(h):
    return torch.cat([F.silu(h[:, :2]), h[:, 2:]], 1)


@pytest.mark.parametrize("composite", [exact(), DeepLift(reference=0.3)], ids=["lrp", "deeplift"])
@pytest.mark.parametrize("name", SAME)
def test_way_of_calling_does_not_matter(name, composite):
    found, wanted = (conv_net(between) for between in SAME[name])
    torch.testing.assert_close(found(images()), wanted(images()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outside DeepLIFT|DeepLift has no rule for (max|amax)")
        assert deviation(heatmap(found, composite), heatmap(wanted, composite)) < 1e-12
    if not isinstance(composite, DeepLift):
        total = heatmap(found, composite).flatten(1).sum(1)
        torch.testing.assert_close(total, found(images())[:, 0].detach(), rtol=1e-9, atol=1e-12)


class View(nn.Module):
    """Its output shares memory with its input."""

    def forward(self, x):
        return x.flatten(2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize(
    "composite",
    [GuidedBackprop(), LRP(layer_map=[(nn.Conv2d, ZPlus()), (nn.Linear, Epsilon()), (nn.ReLU, Norm())]), DeepLift()],
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Sigmoid(), nn.ELU(inplace=True), View()])
def test_what_a_rule_gave_may_be_overwritten(composite, act):
    """Without rules torch refuses the first two, as the gradient needs what is overwritten."""
    if isinstance(composite, GuidedBackprop) and not isinstance(act, nn.ReLU):
        composite = GuidedBackprop(layer_map=[((torch.sigmoid, F.elu, torch.flatten), GuidedReLU())])
    elif isinstance(composite, LRP):
        composite = LRP(layer_map=[(nn.Conv2d, ZPlus()), (nn.Linear, Epsilon()), (type(act), Norm())])

    def model(change):
        made = conv_net(lambda s, h: change(s.act(h)), act=act)
        made.fc.weight.data.abs_()
        return made

    found, wanted = model(lambda h: h.add_(1).mul_(-1)), model(lambda h: (h + 1) * -1)
    result = heatmap(wanted, composite)
    assert result.isfinite().all()
    if result.any():
        assert deviation(heatmap(found, composite), result) < 1e-12


def test_reference_is_what_it_was_when_it_was_used():

    def overwriting(s, h):
        rectified, smooth = F.relu(h), F.silu(h.clone())
        kept = rectified + smooth
        h.add_(3)
        smooth.mul_(0)
        return kept + h - 3

    found, wanted = conv_net(overwriting), conv_net(lambda s, h: F.relu(h) + F.silu(h) + h)
    composite = DeepLift(reference=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outside DeepLIFT|DeepLift has no rule for (max|amax)")
        assert deviation(heatmap(found, composite), heatmap(wanted, composite)) < 1e-12


def test_product_with_a_negative_number_has_another_sign():
    model = net(lambda s, x: s.fc(s.b(s.a(x).relu() * -1).relu().mean((2, 3))),
                a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3), fc=nn.Linear(4, 3))  # fmt: skip
    wanted = net(lambda s, x: s.fc(s.b(s.a(x).relu().neg()).relu().mean((2, 3))),
                 a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3), fc=nn.Linear(4, 3))  # fmt: skip
    assert deviation(heatmap(model, exact()), heatmap(wanted, exact())) < 1e-12


# --- what reaches the input ------------------------------------------------------------------------------------------


def test_affine_layer_without_a_rule_is_no_preprocessing():
    """Its node in autograd is called Addmm, which begins as that of an addition does."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double().eval()
    data = torch.randn(2, 6, dtype=torch.float64)
    found = heatmap(model, Composite(None, layer_map=[("0", None), ("1", Flat(0.0))]), data)
    hidden = model[0](data).detach()
    m = (model[1](hidden)[:, :1] / 6 / hidden).detach()  # flat: the same relevance for all
    torch.testing.assert_close(found, data * (m @ model[0].weight.detach()))


@pytest.mark.parametrize("act", [lambda x: x.relu_(), lambda x: F.silu(x, inplace=True)])
def test_activation_of_the_input_in_place_is_no_preprocessing(act):
    plain = net(lambda s, x: s.fc(s.conv(act(x.clone())).mean((2, 3))), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 3))
    overwriting = net(lambda s, x: s.fc(s.conv(act(x)).mean((2, 3))), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 3))
    assert deviation(heatmap(overwriting, EpsilonPlusFlat()), heatmap(plain, EpsilonPlusFlat())) < 1e-12


@pytest.mark.parametrize("change", [lambda x: x.sub_(1).mul_(2), lambda x: (x - 1) * 2, lambda x: (x - 1).div_(0.5)])
def test_normalisation_inside_a_model_is_preprocessing(change):
    model = net(lambda s, x: s.fc(s.conv(change(x)).mean((2, 3))), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 3))
    bare = net(lambda s, x: s.fc(s.conv(x).mean((2, 3))), conv=model.conv, fc=model.fc)
    wanted = heatmap(bare, EpsilonPlusFlat(), (images() - 1) * 2)
    assert deviation(heatmap(model, EpsilonPlusFlat()), wanted) < 1e-12


def two_inputs(pick):
    return net(lambda s, *a, **k: s.fc(F.silu(s.conv(sum(pick(*a, **k)))).mean((2, 3))),
               conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 3))  # fmt: skip


@pytest.mark.parametrize(
    ("pick", "call"),
    [
        (lambda a, b: (a, b), lambda m, a, b: m(a, b)),
        (lambda a, b: (a, b), lambda m, a, b: m(a, b=b)),
        (lambda a, b: (a, b), lambda m, a, b: m(b=b, a=a)),
        (lambda a: a, lambda m, a, b: m([a, b])),
        (lambda a: a.values(), lambda m, a, b: m({"a": a, "b": b})),
        (lambda a, b, n: (a, b.repeat(n, 1, 1, 1)), lambda m, a, b: m(a, b, n=torch.tensor(1))),
        (lambda a, b, **k: (a, b) if k["on"] is None else (), lambda m, a, b: m(a, b, on=None)),
    ],
)
@pytest.mark.parametrize("composite", [Composite(None), exact()])
def test_inputs_of_every_form_get_their_relevance(pick, call, composite):
    model, a, b = two_inputs(pick), images(), images() * 2 + 1
    a.requires_grad_(), b.requires_grad_()
    with composite.context(model):
        found = torch.autograd.grad(call(model, a, b)[:, 0].sum(), [a, b])
    one = net(lambda s, x: s.fc(F.silu(s.conv(x)).mean((2, 3))), conv=model.conv, fc=model.fc)
    whole = within(one, composite, (a + b).detach().requires_grad_())[0]
    for relevance, part in zip(found, (a, b), strict=True):  # the sum shares in proportion
        assert deviation(relevance, (whole * part / (a + b)).detach()) < 1e-9


def test_integer_inputs_and_embeddings():
    model = net(lambda s, x: s.fc(F.silu(s.emb(x).mean(1))), emb=nn.Embedding(5, 4), fc=nn.Linear(4, 3))
    index = torch.tensor([[0, 1], [2, 3]])
    with exact().context(model):
        assert not model(index).requires_grad
        data = model.emb(index).detach().requires_grad_()
    head = net(lambda s, x: s.fc(F.silu(x.mean(1))), fc=model.fc)
    total = within(head, exact(), data)[0].flatten(1).sum(1)
    torch.testing.assert_close(total, head(data)[:, 0].detach(), rtol=1e-9, atol=1e-12)


def test_same_prediction_without_gradient():
    model = exhibit()
    wanted = model(images(2, 8)).detach()
    for name in ("epsilon_plus_flat", "guided_backprop", "excitation_backprop"):
        with composites.get(name).context(model), torch.no_grad():
            torch.testing.assert_close(model(images(2, 8).requires_grad_()), wanted, rtol=1e-12, atol=1e-13)


def test_parts_of_a_forward_pass_without_gradient():
    def between(s, h):
        with torch.no_grad():
            mask = F.silu(h).sigmoid()
        return F.silu(h) * mask

    model = conv_net(between)
    total = heatmap(model, exact()).flatten(1).sum(1)
    torch.testing.assert_close(total, model(images())[:, 0].detach(), rtol=1e-9, atol=1e-12)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_layers_that_are_called_by_keyword():
    plain = conv_net(lambda s, h: s.act(h), act=nn.SiLU(inplace=True))
    named = net(lambda s, x: s.fc(input=s.act(input=s.conv(input=x)).mean((2, 3))),
                conv=plain.conv, act=plain.act, fc=plain.fc)  # fmt: skip
    for composite in (exact(), LRP(layer_map=[(nn.SiLU, Pass()), (nn.Conv2d, ZPlus()), (nn.Linear, Epsilon())])):
        assert deviation(heatmap(named, composite), heatmap(plain, composite)) < 1e-12


def test_operations_of_several_results_are_refused_by_name():
    layer, function = nn.MaxPool2d(2, return_indices=True), "max_pool2d_with_indices"
    model = net(lambda s, x: s.fc(s.some(s.conv(x)[:, 0])[0].flatten(1).mean(1, keepdim=True).repeat(1, 4)),
                conv=nn.Conv2d(3, 4, 3, padding=1), some=layer, fc=nn.Linear(4, 3))  # fmt: skip
    message = rf"Norm treats operations of one result; {function}\(\) in 'some' returns a tuple"
    with pytest.raises(TypeError, match=message):
        heatmap(model, LRP(layer_map=[("some", Norm()), ((nn.Conv2d, nn.Linear), Epsilon())]))


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, n=2):
        h = self.conv(F.silu(x))
        return self(h, n - 1) if n else h.mean((2, 3))


@pytest.mark.parametrize("composite", [Composite(None), exact(), EpsilonPlusFlat()])
def test_model_that_calls_itself(composite):
    model = Recursive().double().eval()
    unrolled = net(lambda s, x: functools.reduce(lambda h, _: s.conv(F.silu(h)), range(3), x).mean((2, 3)),
                   conv=model.conv)  # fmt: skip
    assert deviation(heatmap(model, composite), heatmap(unrolled, composite)) < 1e-12


def test_one_composite_per_model_and_one_model_per_composite(untouched):
    first, second, composite = exhibit(), exhibit(), EpsilonPlus()
    data = images(2, 8).requires_grad_()
    (wanted,) = within(first, EpsilonPlus(), data)
    with untouched(first), untouched(second), composite.context(first):
        with pytest.raises(RuntimeError, match="this EpsilonPlus is on a model already"), composite.context(second):
            pass
        (relevance,) = torch.autograd.grad(first(data)[:, 0].sum(), data)
        assert torch.equal(relevance, wanted)  # it is still on the first
    with (
        untouched(first),
        EpsilonPlus().context(first),
        pytest.raises(RuntimeError, match="EpsilonPlus is on the model already, and Gradient would come on top of it"),
        composites.Gradient().context(first.stem),
    ):
        pass
    assert deviation(heatmap(second, composite, data), heatmap(first, composite, data)) == 0


def test_modules_that_are_swapped_between_calls():
    model, composite = exhibit(), EpsilonPlus()
    heatmap(model, composite, images(2, 8))
    model.mix = nn.Conv2d(6, 6, 1).double().eval()
    again = copy.deepcopy(model)
    assert deviation(heatmap(model, composite, images(2, 8)), heatmap(again, EpsilonPlus(), images(2, 8))) == 0


@pytest.mark.parametrize("name", ["epsilon_plus_flat", "guided_backprop", "deeplift"])
def test_copies_and_pickles_of_a_composite_in_use(name):
    model, composite = exhibit(), composites.get(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outside DeepLIFT|GuidedBackprop has no rule")
        wanted = heatmap(model, composite, images(2, 8))
        with composite.context(model):
            copies = [copy.deepcopy(composite), copy.copy(composite), pickle.loads(pickle.dumps(composite))]
        for again in copies:
            assert not again.handles
            assert torch.equal(heatmap(model, again, images(2, 8)), wanted)


def test_composite_of_open_ended_keywords_is_built_again():
    class Mine(EpsilonPlus):
        def __init__(self, extra=1, **keywords):
            super().__init__(**keywords)

    composite = Mine(2, epsilon=0.1)
    assert copy.deepcopy(composite).keywords == composite.keywords == {"extra": 2, "epsilon": 0.1}
    assert repr(composite) == "Mine(extra=2, epsilon=0.1)"


# --- undone ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("composite", [EpsilonPlusFlat(), GuidedBackprop(), DeepLift()])
def test_failing_model_leaves_nothing(composite, error, untouched):
    broken = []

    def between(s, h):
        if broken:
            raise error("broken")
        return F.relu(h)

    model = conv_net(between)
    wanted = heatmap(model, composite)
    broken.append(True)
    with untouched(model), pytest.raises(error):
        heatmap(model, composite)
    assert not modes()
    with composite.context(model):
        with pytest.raises(error):
            model(images().requires_grad_())
        if error is KeyError:
            assert not modes()
    assert not modes()
    broken.clear()
    assert torch.equal(heatmap(model, composite), wanted)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("rule", [Epsilon(), Whole(Epsilon()), None], ids=str)
def test_a_failing_layer_leaves_the_modes_of_the_caller(rule, error, untouched):
    class Broken(nn.Linear):
        def forward(self, input):
            assert len(modes()) == 1 + (not isinstance(rule, Whole))  # (one operation is not looked into)
            super().forward(input)
            raise error("broken")

    class Callers(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), Broken(32, 2)).double().eval()
    with Callers() as mode:
        with untouched(model), pytest.raises(error):
            CondAttribution(model)(images(1), [{"y": 0}], EpsilonPlus(layer_map=[("2", rule)]))
        assert modes() == [mode]
    assert not modes()


def test_generator_that_is_dropped_half_way(untouched):
    model = exhibit()
    with untouched(model):
        parts = CondAttribution(model).generate(
            images(1, 8), [{"y": i} for i in range(4)], EpsilonPlusFlat(), batch_size=1, verbose=False
        )
        next(parts)
        assert not modes()
        del parts
        gc.collect()
        assert not modes()


def test_parameters_are_constants_inside_the_context(untouched):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            return x * (self.gain * 2).expand(x.shape)  # no gate, whatever its shape

    model, data = conv_net(lambda s, h: s.scale(h), scale=Scaled()), images().requires_grad_()
    composite = LRP(layer_map=[((nn.Conv2d, nn.Linear), Epsilon(0.0, "bias"))], gates="split")
    with untouched(model):
        (found,) = within(model, composite, data)
    torch.testing.assert_close(found.flatten(1).sum(1), model(data)[:, 0].detach(), rtol=1e-9, atol=1e-12)
    assert [o.rule for o in composite.report(model, data).operations if o.function == "mul"] == [
        "Gate(mode='split', attention='constant')"
    ]


# --- around a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_model", [True, False])
def test_threads(same_model):
    models = [exhibit()] * 2 if same_model else [exhibit(), exhibit()]
    composite, names = EpsilonPlusFlat(), ["epsilon_plus", "epsilon_plus_flat"]
    wanted = [heatmap(models[0], composites.get(name), images(2, 8)) for name in names]
    shared = heatmap(models[0], composite, images(2, 8))
    wrong = []

    def work(number):
        for _ in range(6):
            own = composites.get(names[number])
            if not torch.equal(heatmap(models[number], own, images(2, 8)), wanted[number]):
                wrong.append(number)
            if not torch.equal(heatmap(models[number], composite, images(2, 8)), shared):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def stem_and_head(part):
    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3), "fc": nn.Linear(4, 3)}
    return net(lambda s, x: s.fc(part(s, s.a(x)).mean((2, 3))), **layers)


def checkpointed(part, use_reentrant=False):
    return lambda s, h: checkpoint(functools.partial(part, s), h, use_reentrant=use_reentrant)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch 2.4 at itself
@pytest.mark.parametrize(
    "part",
    [
        lambda s, h: s.b(h.relu()),
        lambda s, h: F.silu(h),
        lambda s, h: F.silu(s.b(h)) + torch.sigmoid(h.mean((2, 3), keepdim=True)),
        lambda s, h: s.b(h.clone().relu_()).mul_(2),
    ],
    ids=["layers", "activation", "branches", "in_place"],
)
@pytest.mark.parametrize("composite", [exact(), EpsilonPlusFlat(), DeepLift(reference=0.3)], ids=repr)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(composite, part, use_reentrant):
    with_checkpoint, without = (
        heatmap(stem_and_head(checkpointed(part, use_reentrant)), composite),
        heatmap(stem_and_head(part), composite),
    )
    assert deviation(with_checkpoint, without) < 1e-12


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.parametrize("by", ["attribution", "context"])
def test_wrapped_and_compiled_models(wrap, by):
    model = exhibit()
    wanted = heatmap(model, EpsilonPlusFlat(), images(2, 8))
    wrapped = wrap(model)
    if wrapped is model:
        model.compile(backend="eager")
    wrapped(images(2, 8))
    if by == "attribution":
        found = heatmap(wrapped, EpsilonPlusFlat(), images(2, 8))
    else:
        (found,) = within(wrapped, EpsilonPlusFlat(), images(2, 8).requires_grad_())
    assert deviation(found, wanted) < 1e-12
    torch.testing.assert_close(wrapped(images(2, 8)), exhibit()(images(2, 8)))


def test_symbolically_traced_model():
    model = exhibit()
    traced = torch.fx.symbolic_trace(model).eval()
    for composite in (EpsilonPlusFlat(), exact()):
        found = heatmap(traced, composite, images(2, 8))
        assert deviation(found, heatmap(model, composite, images(2, 8))) < 1e-12


class Swish(torch.autograd.Function):
    """As models write it to save memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class SwishModule(nn.Module):
    def forward(self, x):
        return Swish.apply(x)


def test_custom_functions_are_refused_by_name_unless_their_module_is_one_operation(untouched):
    model = conv_net(lambda s, h: s.act(h), act=Reversed())
    with (
        untouched(model),
        pytest.raises(UnseenError, match=r"flatten\(\) reads a tensor .* made by ReversedSwishBackward"),
    ):
        heatmap(model, EpsilonPlus())
    with pytest.raises(UnseenError, match=r"flatten\(\) reads a tensor .* was made by SwishBackward"):
        heatmap(conv_net(lambda s, h: Swish.apply(h)), EpsilonPlus())
    composite = exact([(SwishModule, Whole(Pass()))])
    wanted = heatmap(conv_net(lambda s, h: F.silu(h)), exact())
    assert deviation(heatmap(conv_net(lambda s, h: s.act(h), act=SwishModule()), composite), wanted) < 1e-12


class ReversedSwish(Swish):
    """Not elementwise."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x.flip(1))


class Reversed(nn.Module):
    def forward(self, x):
        return ReversedSwish.apply(x)


@pytest.mark.parametrize("kind", [exact, EpsilonPlus, AttnLRP, DeepLift])
def test_a_custom_function_with_the_values_of_an_activation_is_one(kind):
    custom, plain = conv_net(lambda s, h: s.act(h), act=SwishModule()), conv_net(lambda s, h: F.silu(h))
    assert deviation(heatmap(custom, kind()), heatmap(plain, kind())) < 1e-12


def test_custom_functions_of_modules_without_a_rule_have_their_own_gradient():
    swish, silu = conv_net(lambda s, h: s.act(h), act=SwishModule()), conv_net(lambda s, h: F.silu(h))
    relevance = heatmap(swish, EpsilonPlus(layer_map=[("act", None)]))
    assert deviation(relevance, heatmap(silu, EpsilonPlus(layer_map=[(F.silu, None)]))) < 1e-12


# --- warnings --------------------------------------------------------------------------------------------------------


def test_warnings_point_at_the_caller():
    model, data = conv_net(lambda s, h: torch.atan2(h, h * 2)), images()

    class Explaining(nn.Module):
        """Torch calls this, which calls us."""

        def forward(self, x):
            return heatmap_here(x)

    def heatmap_here(x):
        return CondAttribution(model)(x, [{"y": 0}], EpsilonPlus())

    def in_context():
        with EpsilonPlus().context(model):
            model(data.clone().requires_grad_())

    for call, line in ((lambda: heatmap_here(data), 1), (lambda: Explaining()(data), 1), (in_context, 2)):
        owner = heatmap_here if line == 1 else in_context
        with pytest.warns(UserWarning, match="no rule for atan2") as caught:
            call()
        assert caught[0].filename == __file__
        assert caught[0].lineno == owner.__code__.co_firstlineno + line


def test_nothing_is_warned_of_twice_or_where_a_rule_is_none():
    model = conv_net(lambda s, h: torch.atan2(h, h * 2))
    with pytest.warns(UserWarning) as caught:
        heatmap(model, EpsilonPlus())
    assert len(caught) == 1
    heatmap(model, EpsilonPlus(layer_map=[(torch.atan2, None)]))


def test_a_function_that_is_several_is_one_where_it_is_named():
    model = conv_net(lambda s, h: torch.lerp(h, h * 2, h.sigmoid()))
    maps = [(torch.lerp, None)], []
    named, others = ([name for _, name, _ in rules(model, EpsilonPlus(layer_map=one))] for one in maps)
    assert "lerp" in named and "lerp" not in others and others.count("add") == 1


def test_targets_of_every_class_are_rows_of_one_pass():
    attribution, model = Maps(exhibit()), exhibit()
    rows = attribution(images(1, 8), [{"y": i} for i in range(4)], EpsilonPlusFlat()).heatmap
    alone = [heatmap(model, EpsilonPlusFlat(), images(1, 8), i) for i in range(4)]
    assert deviation(rows, torch.cat(alone)) < 1e-12
    assert isinstance(conv_net(lambda s, h: h), Net)


class Twice(Rule):
    """It runs the operation twice."""

    def surrogate(self, layer, a):
        return (layer(a) + layer(a)) / 2


@pytest.mark.parametrize("call", [lambda block, x: block(x), lambda block, x: block(input=x)], ids=["place", "name"])
@pytest.mark.parametrize("rule", [Norm(0.0), Twice(0.0)], ids=lambda rule: type(rule).__name__)
def test_one_operation_may_overwrite_its_input_and_return_another_tensor(untouched, rule, call):
    class Net(nn.Sequential):
        def forward(self, x):
            return self[1](call(self[0], x * 1))

    model = Net(nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.AvgPool1d(2)), nn.Linear(2, 1)).double().eval()
    data = torch.tensor([[[-1.0, 2.0, 3.0, -4.0]]], dtype=torch.float64, requires_grad=True)
    with untouched(model), Composite(None, layer_map=[("0", Whole(rule))]).context(model):
        (found,) = torch.autograd.grad(model(data).sum(), data)
    weights = model[1].weight.detach()[None].repeat_interleave(2, 2)
    wanted = weights * torch.tensor([-0.5, 2.0, 3.0, -2.0]) / 2
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_modes_of_the_caller_act_in_rules():
    """Such as a default device, which decides where a rule's constants are."""

    class Constants(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made.append(func.__name__)
            return func(*args, **(kwargs or {}))

    class Shifted(Rule):
        def surrogate(self, layer, a):
            return layer(a) + torch.zeros(())

    made = []
    with Constants():
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 2)).double().eval()
        CondAttribution(model)(images(1), [{"y": 0}], Composite(layer_map=[(nn.Conv2d, Shifted())]))
    assert "zeros" in made
