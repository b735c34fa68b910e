"""Kinds of models, outputs, dtypes and surroundings that the engine must be right in."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from attribution_cases import SMALL, ask, close, every_composite, every_kind, net, rows, same, stack
from core_cases import Maps
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus
from zennit.composites import GuidedBackprop, NameMapComposite
from zennit.core import Composite
from zennit.rules import Pass
from zennit.torchvision import ResNetCanonizer

from crp.attribution import CondAttribution
from crp.attributors.scores import explaining
from crp.composites import EpsilonPlus, Gradient
from crp.concepts import ChannelConcept
from crp.engine.encoding import propagation_of
from crp.layers import LayerNotFoundError

CONDITIONS = [{"y": 1, "features.3": [0, 2]}, {"y": 3}]


# --- outputs --------------------------------------------------------------------------------------------------------

Output = namedtuple("Output", "loss, logits")


@every_kind
@pytest.mark.parametrize(
    "wrap",
    [lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y), lambda y: Output(None, y)],
    ids=["dict", "object", "namedtuple"],
)
def test_logits_are_explained(mlp, vectors, composite, wrap):
    found = Maps(net(lambda s, x: wrap(s.inner(x)), inner=mlp))(vectors, [{"y": 1, "inner.2": [3]}], composite)
    wanted = Maps(mlp)(vectors, [{"y": 1, "2": [3]}], composite)
    assert close(found.heatmap, wanted.heatmap)
    assert close(found.prediction, wanted.prediction)


def exported(images):
    """A model, and the program that it is, without its modules."""
    model = net(lambda s, x: s.b(s.a(x).relu().flatten(1)), a=nn.Conv2d(3, 4, 3), b=nn.Linear(784, 4)).eval()
    return torch.export.export(model, (images[:2],)).module(), model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("composite", [None, EpsilonPlus()])
def test_an_exported_program_is_explained_as_its_model(images, composite):
    program, model = exported(images)
    found, wanted = (CondAttribution(each)(images[:2], [{"y": [1]}], composite) for each in (program, model))
    assert close(found.heatmap, wanted.heatmap)
    assert close(found.prediction, wanted.prediction)


def test_a_composite_that_finds_no_module_is_told_of(images):
    """Zennit's find modules; a program that was exported has functions only."""
    program, _ = exported(images)
    with pytest.warns(UserWarning, match="EpsilonPlus has a rule for no layer of the model, and gives the plain"):
        found = CondAttribution(program)(images[:2], [{"y": [1]}], ZennitEpsilonPlus())
    assert close(found.heatmap, CondAttribution(program)(images[:2], [{"y": [1]}]).heatmap)


@every_kind
def test_maps_as_output(images, composite):
    """A target of a dense output is the whole map of that channel."""
    model = net(lambda s, x: s.b(s.a(x).relu()), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 3))
    found = CondAttribution(model)(images[:1], [{"y": [1]}, {"y": [0, 1]}, {"y": 0}], composite)
    assert found.prediction.shape == (3, 2, 12, 12)
    assert close(found.heatmap[0] + found.heatmap[2], found.heatmap[1])


# --- modules --------------------------------------------------------------------------------------------------------


@every_composite
def test_in_place_layers_do_not_change_what_is_recorded(vgg_bn, images, composite):
    """The activation of a convolution is not that of the in-place ReLU behind it."""
    attribution = CondAttribution(vgg_bn)
    found = attribution(images, CONDITIONS, composite, ["features.0", "features.1"])
    assert (found.activations["features.0"] < 0).any()
    for layer in vgg_bn.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    assert same(CondAttribution(vgg_bn)(images, CONDITIONS, composite, ["features.0", "features.1"]), found)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).relu()).relu())


class Unrolled(Twice):
    def __init__(self, twice: Twice) -> None:
        super().__init__()
        self.first, self.second, self.head = (self._copy(layer) for layer in (twice.shared, twice.shared, twice.head))

    @staticmethod
    def _copy(layer: nn.Linear) -> nn.Linear:
        copy = nn.Linear(layer.in_features, layer.out_features)
        copy.load_state_dict(layer.state_dict())
        return copy

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("composite", [None, EpsilonPlus()], ids=["gradient", "ours"])
@pytest.mark.parametrize("exclude_parallel", [True, False])
def test_layer_that_is_called_twice(vectors, composite, exclude_parallel):
    """``"shared#0"`` is its first call, ``"shared#1"`` its second; without a number the last is recorded."""
    model = Twice().eval()
    unrolled = Unrolled(model).double().eval()
    attribution, wanted_of = Maps(model.double()), Maps(unrolled)
    keywords = {"exclude_parallel": exclude_parallel}
    found = attribution(vectors, [{"y": 1, "shared#1": [2, 3], "shared#0": [0, 1, 5]}], composite, ["head"], **keywords)
    wanted = wanted_of(vectors, [{"y": 1, "second": [2, 3], "first": [0, 1, 5]}], composite, ["head"], **keywords)
    assert close(found.heatmap, wanted.heatmap)
    assert close(found.relevances["shared#0"], wanted.relevances["first"])
    assert close(found.activations["shared#1"], wanted.activations["second"])
    started = attribution(vectors, [{"shared#0": [4]}], composite, start_layer="shared#0", **keywords)
    assert close(started.heatmap, wanted_of(vectors, [{"first": [4]}], composite, start_layer="first").heatmap)
    with pytest.warns(UserWarning, match=r"'shared' is called 2 times; its last call is recorded.*shared#0") as caught:
        last = attribution(vectors, [{"y": 1}], composite, ["shared"], **keywords)
    assert caught[0].filename == __file__
    assert close(last.relevances["shared"], wanted_of(vectors, [{"y": 1}], composite, ["second"]).relevances["second"])
    for conditions, start in (([{"y": 1, "shared": [1]}], None), ([{}], "shared")):
        with pytest.raises(ValueError, match=r"'shared' is called 2 times.*shared#0, shared#1"):
            attribution(vectors, conditions, composite, start_layer=start, **keywords)
    with pytest.raises(ValueError, match="'shared' is called 2 times; there is no shared#2"):
        attribution(vectors, [{"y": 1}], composite, ["shared#2"], **keywords)


@pytest.mark.parametrize("generate", [False, True], ids=["call", "generate"])
def test_zennits_rules_warn_of_a_layer_that_is_called_twice(vectors, untouched, generate):
    """They know the input of its last call only."""
    model, conditions = Twice().double().eval(), [{"y": 1, "head": [1]}]
    attribution = Maps(model)
    message = r"layers \['shared'\] are called more than once, which zennit's rules do not support: relevance is wrong"
    with untouched(model), pytest.warns(UserWarning, match=message) as caught:
        if generate:
            for _ in attribution.generate(vectors, conditions, ZennitEpsilonPlus(), verbose=False):
                pass
        else:
            attribution(vectors, conditions, ZennitEpsilonPlus())
    assert caught[0].filename == __file__
    for composite in (None, NameMapComposite([(["shared"], Pass())]), EpsilonPlus()):
        attribution(vectors, conditions, composite)


@pytest.mark.parametrize("first_back", [True, False], ids=["one pass after the other", "both, and then back"])
def test_zennits_rules_warn_where_relevance_reaches_another_call_than_the_last(vectors, first_back):
    model = net(lambda s, x: s.head(x), head=nn.Linear(vectors.shape[1], 2))
    data = [vectors.clone().requires_grad_() for _ in range(2)]
    message = r"layers \['head'\] are called more than once"
    told = contextlib.nullcontext() if first_back else pytest.warns(UserWarning, match=message)
    with told, explaining(model, ZennitEpsilonPlus()) as output:
        scores = []
        for one in data:
            scores.append(output(one).sum())
            if first_back:
                scores.pop().backward()
        for score in scores:
            score.backward()
    assert not first_back or torch.equal(data[0].grad, data[1].grad)


def of_two(join) -> nn.Module:
    """``head(relu(join(left(x), right(x))))``, where ``net.number`` is a parameter."""
    model = net(
        lambda s, x: s.head(s.act(join(s, s.left(x), s.right(x)))),
        left=nn.Linear(6, 5), right=nn.Linear(6, 5), act=nn.ReLU(), head=nn.LazyLinear(3),
    )  # fmt: skip
    model.number = nn.Parameter(torch.ones(5, dtype=torch.float64))
    return model


@pytest.mark.promise("Model", "Zennit's rules warn where they give each branch of a sum all of the relevance")
@pytest.mark.parametrize("generate", [False, True], ids=["call", "generate"])
@pytest.mark.parametrize(
    "join",
    [
        lambda _, a, b: a + b,
        lambda _, a, b: a - b,
        lambda _, a, b: a.add_(b),
        lambda _, a, b: torch.add(a, b, alpha=2),
        lambda s, a, b: sum([a, b, s.number, 1]),
    ],
    ids=["plus", "minus", "in place", "alpha", "sum"],
)
def test_zennits_rules_warn_of_branches_that_are_added_up(vectors, untouched, join, generate):
    model = of_two(join)
    model(vectors)
    with untouched(model), pytest.warns(UserWarning, match=r"adds branches up in 1 place without a layer") as caught:
        ask(model, [{"y": 1}, {"y": 2}], data=vectors, composite=ZennitEpsilonPlus(), generate=generate)
    assert [one.filename for one in caught if "adds branches up" in str(one.message)] == [caught[0].filename]


def test_parts_and_samples_tell_once_what_is_wrong_with_all_of_them(vectors):
    model = of_two(lambda _, a, b: a + b)
    model(vectors)
    attribution, rules, ragged = CondAttribution(model.train()), ZennitEpsilonPlus(), [vectors[0], vectors[:2]]
    for _ in range(2):  # (another call tells again)
        parts = attribution.generate(vectors[:2], [{"y": i} for i in range(3)], rules, batch_size=1, verbose=False)
        for run in (lambda parts=parts: list(parts), lambda: attribution(ragged, [{}], rules, init_rel=1)):
            with pytest.warns(UserWarning) as caught:
                run()
            told = [str(one.message)[:30] for one in caught]
            assert told == ["the model is in training mode ", "the model adds branches up in "]


@pytest.mark.parametrize(
    ("join", "composite", "keywords"),
    [
        (lambda _, a, b: a + b, lambda: None, {}),
        (lambda _, a, b: a + b, EpsilonPlus, {}),
        (lambda _, a, b: a + b, GuidedBackprop, {}),
        (lambda _, a, b: a + b, ZennitEpsilonPlus, {"start_layer": "left"}),
        (lambda _, a, b: a + b.detach(), ZennitEpsilonPlus, {}),
        (lambda s, a, b: (a + 1 - s.number).add_(2), ZennitEpsilonPlus, {}),
        (lambda _, a, b: torch.cat([a, b], 1), ZennitEpsilonPlus, {}),
    ],
    ids=["gradient", "ours", "guided backprop", "start below", "detached", "numbers", "cat"],
)
def test_sums_that_are_right_are_not_warned_of(vectors, join, composite, keywords):
    model = of_two(join)
    model(vectors)
    condition = {"left": [1]} if keywords else {"y": 1}
    ask(model, [condition], data=vectors, composite=composite(), **keywords)


def test_zennits_canonizer_for_residual_blocks_shares_relevance():
    model = net(lambda s, x: s.head(s.block(x).flatten(1)), block=BasicBlock(3, 3), head=nn.Linear(108, 3, bias=False))
    with torch.no_grad():
        model.head.weight.abs_()
    target = model(SMALL)[:, 1]
    composite = ZennitEpsilonPlus(canonizers=[ResNetCanonizer()])
    right = ask(model, [{"y": 1}], composite=composite)
    assert close(right.heatmap.sum((1, 2)), target, 1e-4)
    with composite.context(model):  # (which adds a module for the sum, and says nothing of its mode)
        assert same(ask(model, [{"y": 1}]), right)
    with pytest.warns(
        UserWarning, match=r"give all relevance to each branch there: there is too much. Give the compos"
    ):
        wrong = ask(model, [{"y": 1}], composite=ZennitEpsilonPlus())
    assert (wrong.heatmap.sum((1, 2)) > 1.5 * target).all()


def test_layer_that_is_not_called(vectors):
    attribution = Maps(Twice().double().eval())
    with pytest.warns(UserWarning, match="'unused' is not called in the forward pass") as caught:
        assert not attribution(vectors, [{"y": 1}], None, ["unused"]).relevances
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="'unused', named as condition, is not called"):
        attribution(vectors, [{"y": 1, "unused": [0]}])
    with pytest.raises(ValueError, match="'unused', named as start, is not called"):
        attribution(vectors, [{}], start_layer="unused")


@every_kind
def test_model_without_parameters(images, composite):
    model = net(lambda s, x: s.pool(x).flatten(1), pool=nn.AvgPool2d(8))
    attribution = CondAttribution(model)
    assert attribution.device == torch.device("cpu")
    if propagation_of(composite).encoding == "multiplier":
        with pytest.raises(ValueError, match="no rule for any layer of the model, which consists of AvgPool2d"):
            attribution(images, [{"y": 3}], composite)
        return
    found = attribution(images, [{"y": 3}], composite)
    wanted = torch.zeros(4, 16, 16, dtype=torch.float64)
    wanted[:, 8:, 8:] = model(images)[:, 3, None, None] / 64 if composite is None else images[:, 0, 8:, 8:] / 64
    assert close(found.heatmap, wanted, 1e-3)  # zennit's stabilizer


def test_buffers_alone_give_the_device():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False)).eval()
    assert CondAttribution(model).device == torch.device("cpu")
    assert CondAttribution(model, device="meta").device == torch.device("meta")
    assert repr(CondAttribution(model)) == "CondAttribution(Sequential, device='cpu')"


def test_wrappers_are_taken_off(vgg_bn, images):
    """Layers of a compiled or parallel model keep their names."""
    wanted = CondAttribution(vgg_bn)(images, CONDITIONS, EpsilonPlus())
    compiled = torch.compile(vgg_bn, backend="eager")
    for wrapped in (compiled, nn.DataParallel(vgg_bn), nn.DataParallel(compiled)):
        attribution = CondAttribution(wrapped)
        assert attribution.model is vgg_bn
        assert same(attribution(images, CONDITIONS, EpsilonPlus()), wanted)


@every_kind
def test_model_compiled_in_place(mlp, vectors, composite):
    """Hooks, canonizers and rules act on the modules as they are written."""
    model = nn.Sequential(mlp[0], nn.BatchNorm1d(8), *mlp[1:]).double().eval()
    wanted = Maps(model)(vectors, [{"y": 1, "3": [1, 2]}], composite, ["0"])
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert same(Maps(model)(vectors, [{"y": 1, "3": [1, 2]}], composite, ["0"]), wanted)
    assert model._compiled_call_impl is compiled


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_and_traced_models_are_refused(mlp, vectors):
    for frozen in (torch.jit.trace(mlp, vectors), torch.jit.script(mlp)):
        with pytest.raises(TypeError, match=r"scripted or traced.*Pass the Python model"):
            CondAttribution(frozen)
    for wrong in (mlp.forward, None, Twice):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not"):
            CondAttribution(wrong)


# --- numbers --------------------------------------------------------------------------------------------------------


@every_composite
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_low_precision(vgg_bn, images, composite, dtype, tolerance):
    for i in (6, 10):  # a maximum of rounded numbers is not unique
        vgg_bn.features[i] = nn.AvgPool2d(2).eval()
    data = images[:1].to(dtype)
    found = CondAttribution(vgg_bn.to(dtype))(data, CONDITIONS, composite, ["features.0"])
    wanted = CondAttribution(vgg_bn.double())(data.double(), CONDITIONS, composite, ["features.0"])
    for one, other in (
        (found.heatmap, wanted.heatmap),
        *zip(found.relevances.values(), wanted.relevances.values(), strict=True),
    ):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()


class Tokens(nn.Module):
    """Weighted sums of tokens that batch norm has made."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.weight = nn.Parameter(torch.randn(20, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return (self.norm(2 * x).flatten(2).transpose(1, 2) * self.weight).sum(1)


@pytest.mark.parametrize("composite", [None, Gradient(), GuidedBackprop(), Composite()])
def test_gradients_of_batch_norm_of_one_picture(composite):
    """By torch's kernel of a CPU, they are wrong where they arrive as those of tokens do."""
    model = Tokens().double().eval()
    with torch.no_grad():
        model.norm.running_var.copy_(torch.tensor([0.5, 1.0, 1.5]))
        model.norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (zennit's have no rule for a layer of it)
        found = CondAttribution(model)(x, [{"y": 2}], composite, init_rel=1.0).heatmap
    scale = 2 * model.norm.weight[2] / (model.norm.running_var[2] + model.norm.eps).sqrt()
    assert close(found, (scale * model.weight[:, 2]).detach().reshape(1, 4, 5))


@every_kind
def test_channels_last(vgg_bn, images, composite):
    wanted = CondAttribution(vgg_bn)(images, CONDITIONS, composite, ["features.0"])
    model = vgg_bn.to(memory_format=torch.channels_last)
    data = images.to(memory_format=torch.channels_last)
    found = CondAttribution(model)(data, CONDITIONS, composite, ["features.0"])
    assert same(found, wanted)
    spots = [{"y": 1, "features.3": {2: [0, 17]}}]
    neurons = CondAttribution(model)(data, spots, composite, mask_map=ChannelConcept.mask_rf)
    model = model.to(memory_format=torch.contiguous_format)
    assert same(neurons, CondAttribution(model)(images, spots, composite, mask_map=ChannelConcept.mask_rf))


@every_composite
@pytest.mark.parametrize("exclude_parallel", [True, False], ids=["exclusive", "masks_only"])
def test_automatic_precision(mlp, vectors, composite, exclude_parallel):
    data, model, conditions = vectors.float(), mlp.float(), [{"y": 1, "2": [0, 3, 4]}, {"y": 2}]
    wanted = Maps(model)(data, conditions, composite, ["0"], exclude_parallel=exclude_parallel)
    with torch.autocast("cpu", torch.bfloat16):
        found = Maps(model)(data, conditions, composite, ["0"], exclude_parallel=exclude_parallel)
    assert found.heatmap.dtype == torch.float32
    assert found.relevances["0"].dtype == torch.bfloat16
    assert (found.heatmap - wanted.heatmap).norm() <= 0.05 * wanted.heatmap.norm()


# --- surroundings ---------------------------------------------------------------------------------------------------


@every_kind
def test_gradients_switched_off_outside(vgg_bn, images, composite):
    wanted = CondAttribution(vgg_bn)(images, CONDITIONS, composite)
    with torch.no_grad():
        assert same(CondAttribution(vgg_bn)(images, CONDITIONS, composite), wanted)
        assert not torch.is_grad_enabled()
        parts = CondAttribution(vgg_bn).generate(images[:1], CONDITIONS, composite, batch_size=1, verbose=False)
        assert same(stack(parts), rows(wanted, [0, 1]))
        frozen = images.clone()
    with torch.inference_mode():
        made_here = images.clone()
    for data in (frozen, made_here):
        assert same(CondAttribution(vgg_bn)(data, CONDITIONS, composite), wanted)


def test_inference_mode_is_an_error(vgg_bn, images):
    attribution = CondAttribution(vgg_bn)
    message = r"torch\.inference_mode\(\) forbids; use torch\.no_grad\(\)"
    waiting = attribution.generate(images, CONDITIONS, verbose=False)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=message):
            attribution(images, CONDITIONS)
        with pytest.raises(RuntimeError, match=message):
            next(waiting)


@every_kind
def test_model_in_training_mode(vgg_bn, images, untouched, composite):
    """L12: explained in evaluation mode, with a warning; flags and batch-norm statistics as before."""
    wanted = CondAttribution(vgg_bn)(images, CONDITIONS, composite)
    vgg_bn.train()
    vgg_bn.features[1].eval()
    attribution = CondAttribution(vgg_bn)
    with untouched(vgg_bn):
        with pytest.warns(UserWarning, match=r"mode \(Sequential, features, features.0 and 15 more mod") as caught:
            found = attribution(images, CONDITIONS, composite)
        assert caught[0].filename == __file__
        assert same(found, wanted)
        with pytest.warns(UserWarning, match="training mode"):
            parts = list(attribution.generate(images[:1], CONDITIONS, composite, batch_size=1, verbose=False))
        assert same(stack(parts), rows(wanted, [0, 1]))


def run_in_threads(*functions) -> None:
    """Run functions at once; raise what they raise."""
    errors: list[BaseException] = []

    def guarded(function) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@every_kind
def test_two_threads_on_one_model(mlp, vectors, untouched, composite):
    attribution = Maps(mlp)
    asked = [[{"y": i, "2": [i, i + 1]} for i in range(3)], [{"y": 3 - i} for i in range(3)]]
    wanted = [attribution(vectors, conditions, composite, ["0"]) for conditions in asked]

    def work(number: int) -> None:
        other = Maps(mlp)
        for turn in range(25):
            assert same(other(vectors, asked[number], composite, ["0"]), wanted[number])
            if turn % 5 == 0:
                parts = other.generate(vectors, asked[number], composite, ["0"], batch_size=4, verbose=False)
                assert same(stack(parts), wanted[number])

    with untouched(mlp), warnings.catch_warnings():
        run_in_threads(lambda: work(0), lambda: work(1))


@every_kind
def test_two_threads_with_one_composite(mlp, vectors, composite):
    models = [net(lambda s, x: s.inner(x), inner=mlp), net(lambda s, x: s.inner(-2 * x), inner=mlp)]
    wanted = [Maps(model)(vectors, [{"y": 1}], composite) for model in models]

    def work(number: int) -> None:
        for _ in range(40):
            assert same(Maps(models[number])(vectors, [{"y": 1}], composite), wanted[number])

    run_in_threads(lambda: work(0), lambda: work(1))


def test_layers_that_canonizers_do_not_know_are_refused(mlp, vectors):
    with pytest.raises(LayerNotFoundError, match=r"'_orig_mod\.2' not found in model; there are '0'"):
        Maps(torch.compile(mlp, backend="eager"))(vectors, [{"y": 1, "_orig_mod.2": [1]}])
