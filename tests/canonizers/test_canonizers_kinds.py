"""Kinds of batch norm and of layers: what can be merged is, what cannot is left with a reason and is never wrong."""

import pytest
import torch
from canonizer_cases import Merged, check, randomize, ready
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as on_all
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from crp.canonizers import for_model


@pytest.fixture
def data():
    return torch.randn(2, 4, 6, 6, dtype=torch.float64)


class BatchNormAct2d(nn.BatchNorm2d):
    """Dropout and activation in one module with batch norm, as timm has it."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """The same, frozen."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("ahead", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.BatchNorm2d(c, eps=0.1),
        nn.SyncBatchNorm,
        lambda c: FrozenBatchNorm2d(c, eps=1e-2),
        lambda c: BatchNormAct2d(c, nn.Identity()),
    ],
    ids=["plain", "epsilon", "synchronized", "frozen", "act_none"],
)
def test_kinds_that_are_merged(norm, ahead, data, untouched):
    model = nn.Sequential(norm(4), nn.Conv2d(4, 4, 3)) if ahead else nn.Sequential(nn.Conv2d(4, 4, 3), norm(4))
    ready(model)
    if ahead and isinstance(model[0], BatchNormAct2d):
        model[0].drop = nn.Identity()
    assert len(for_model(model)) == 1
    with untouched(model):
        check(model, data, {"0": "1"} if ahead else {"1": "0"})


def test_frozen_batch_norm_is_merged_in_training_mode_too(data, untouched):
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4))).train()
    with untouched(model):
        check(model, data, {"1": "0"})


def test_lazy_batch_norm_that_has_seen_data(data, untouched):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).double().eval()
    model(data)
    ready(model)
    with untouched(model):
        check(model, data, {"1": "0"})


def test_lazy_batch_norm_is_left_until_it_has_seen_data(data):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(eps=0.5)).double().eval()
    (canonizer,) = for_model(model)[0].apply(model)
    output = model(data)
    assert canonizer.left == {"1": "the model had parameters that no call had initialized"}
    canonizer.remove()
    assert torch.equal(output, model(data))
    check(model, data, {"1": "0"})


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("kind", [BatchNormAct2d, FrozenBatchNormAct2d])
def test_an_activation_inside_batch_norm_stays(kind, act, inplace, data, untouched):
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), kind(4, act(inplace=inplace)), nn.Conv2d(4, 2, 1)))
    with untouched(model):
        check(model, data, {"1": "0"})


def test_an_activation_between_batch_norm_and_the_next_layer_is_in_the_way(data, untouched):
    model = ready(nn.Sequential(BatchNormAct2d(4, nn.ReLU()), nn.Conv2d(4, 2, 1)))
    with untouched(model):
        check(model, data, {}, {"0": "its activation comes before '1'"})


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """One with a constant for epsilon, as others have it."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.eps

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


def replaced(norm):
    norm.forward = lambda x: 3 * x
    return norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "it has no running statistics"),
        (lambda: Doubled(4), "the forward of Doubled is not that of torch"),
        (lambda: FrozenBatchNorm(4), "its epsilon is not an attribute"),
        (lambda: replaced(nn.BatchNorm2d(4)), "its forward is replaced"),
    ],
    ids=["no_statistics", "subclass", "frozen_without_epsilon", "replaced"],
)
def test_kinds_that_are_left(norm, reason, data, untouched):
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), norm()))
    with untouched(model):
        check(model, data, {}, {"1": reason})


class Centred(nn.Module):
    """A module that has what frozen batch norm stores, and computes something else."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4))

    def forward(self, x):
        return x - self.running_mean[:, None, None]


def test_a_module_with_the_statistics_of_batch_norm_alone_is_none(data):
    check(ready(nn.Sequential(conv(), Centred())), data, {}, {})


class Uses(nn.Module):
    """Layers in the order in which the names are given, with all the sharing that this brings."""

    def __init__(self, order, **layers):
        super().__init__()
        self.order = order
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        for name in self.order.split():
            x = getattr(self, name)(x)
        return x


def conv(size=3):
    return nn.Conv2d(4, 4, size)


def tied(model):
    model.b.weight = model.a.weight
    return model


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (
            lambda: Uses("a m a n", a=conv(), m=nn.BatchNorm2d(4), n=nn.BatchNorm2d(4)),
            {"m": "'a', which is called 2 times", "n": "'a', which is called 2 times"},
        ),
        (lambda: Uses("a n b n", a=conv(), b=conv(), n=nn.BatchNorm2d(4)), {"n": "called 2 times"}),
        (
            lambda: tied(Uses("a m b n", a=conv(), b=conv(), m=nn.BatchNorm2d(4), n=nn.BatchNorm2d(4))),
            {"m": "weight of 'a' is also read by 'b'", "n": "weight of 'b' is also read by 'a'"},
        ),
        (lambda: Uses("a", a=conv(), n=nn.BatchNorm2d(4)), {"n": "not called"}),
    ],
    ids=["conv_twice", "norm_twice", "tied", "not_called"],
)
def test_modules_that_are_shared_are_left(model, left, data, untouched):
    net = ready(model())
    with untouched(net):
        check(net, data, {}, left)


COMPUTED = r"not merged into '0', whose weight or bias is computed .*prune\.remove"


def pruned(layer, name):
    prune.random_unstructured(layer, name, amount=0.5)
    return layer


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        old_weight_norm,
        lambda layer: pruned(layer, "weight"),
        lambda layer: pruned(layer, "bias"),
    ],
    ids=["weight_norm", "spectral_norm", "old_weight_norm", "pruned", "pruned_bias"],
)
@pytest.mark.parametrize("known", [False, True], ids=["first", "after_a_plan"])
def test_computed_parameters_are_left_with_a_warning(wrap, known, data, untouched):
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    if known:
        check(model, data, {"1": "0"})
    wrap(model[0])
    model(data)
    with untouched(model), pytest.warns(UserWarning, match=COMPUTED):
        check(model, data, {}, {"1": "a parameter of '0' is computed, not stored"})


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False).eval()])
def test_no_warning_where_a_stored_weight_would_not_help(norm, data):
    model = nn.Sequential(parametrizations.weight_norm(conv()).eval(), norm).double()
    with Merged(model, data) as run:
        assert "1" in run.canonizer.left


def test_parameters_of_batch_norm_that_are_computed_are_merged_as_they_are(data):
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    check(model, data, {"1": "0"})
    with torch.no_grad():
        model[1].parametrizations.weight.original.add_(1)
    check(model, data, {"1": "0"})


class Padding(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 2, 0, 1)), self.weight, self.bias)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight / (self.weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return self._conv_forward(x, weight, self.bias)


class Rectified(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Scaled(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


class WithoutBias(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, None)


def test_a_layer_with_its_own_forward_is_merged_where_that_follows_its_parameters(data, untouched):
    model = ready(nn.Sequential(Padding(4, 4, 3), nn.BatchNorm2d(4)))
    with untouched(model):
        check(model, data, {"1": "0"})
    ahead = ready(nn.Sequential(nn.BatchNorm2d(4), Padding(4, 4, 3)))
    with untouched(ahead):
        check(ahead, data, {}, {"0": "the forward of Padding '1' is not that of torch"})


@pytest.mark.parametrize("kind", [Standardized, Rectified, Scaled, WithoutBias])
def test_a_layer_with_its_own_forward_is_left_where_it_does_not_follow_its_parameters(kind, data, untouched):
    model = ready(nn.Sequential(kind(4, 4, 3), nn.BatchNorm2d(4)))
    with untouched(model):
        check(model, data, {}, {"1": f"the output of {kind.__name__} '0' does not follow its weight and bias"})


@pytest.mark.parametrize("known", [False, True], ids=["first", "after_a_plan"])
def test_a_layer_whose_forward_is_replaced_is_left_where_that_does_not_follow_its_parameters(known, data, untouched):
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    if known:
        check(model, data, {"1": "0"})
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    with untouched(model):
        check(model, data, {}, {"1": "the output of Conv2d '0' does not follow"})


def test_a_container_that_does_otherwise_in_training_is_traced_again(data):
    class Noisy(Uses):
        def forward(self, x):
            x = self.a(x)
            return self.n(x.relu() if self.training else x)

    model = ready(Noisy("", a=conv(), n=nn.BatchNorm2d(4)))
    check(model, data, {"n": "a"})
    model.training = True
    check(model, data, {}, {"n": "input comes from relu"})


HOOKS = {
    "output": lambda first, _: first.register_forward_hook(lambda _m, _i, out: 2 * out),
    "output_in_place": lambda first, _: first.register_forward_hook(lambda _m, _i, out: out.mul_(2)),
    "input": lambda _, second: second.register_forward_pre_hook(lambda _m, args: (2 * args[0],)),
    "output of all": lambda first, _: on_all.register_module_forward_hook(
        lambda module, _i, out: 2 * out if module is first else None
    ),
    "output of all in place": lambda first, _: on_all.register_module_forward_hook(
        lambda module, _i, out: out.mul_(2) if module is first else None
    ),
    "input of all": lambda _, second: on_all.register_module_forward_pre_hook(
        lambda module, args: (2 * args[0],) if module is second else None
    ),
}


@pytest.mark.parametrize("known", [False, True], ids=["first", "after_a_plan"])
@pytest.mark.parametrize("ahead", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("where", list(HOOKS))
def test_a_hook_that_changes_values_between_the_two_is_noticed(where, ahead, known, data, untouched):
    layers = (nn.BatchNorm2d(4), conv()) if ahead else (conv(), nn.BatchNorm2d(4))
    model, name = ready(nn.Sequential(*layers)), "0" if ahead else "1"
    merged = {"0": "1"} if ahead else {"1": "0"}
    if known:
        check(model, data, merged)
    handle = HOOKS[where](*model)
    reason = "mul" if where == "input of all" else "a hook changes what goes between it and"
    try:
        with untouched(model):
            check(model, data, {}, {name: reason})
    finally:
        handle.remove()
    check(model, data, merged)


def test_hooks_that_look_are_no_obstacle(data):
    seen = []
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    handles = [on_all.register_module_forward_hook(lambda _m, _i, out: seen.append(out))]
    handles += [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in model]
    try:
        check(model, data, {"1": "0"})
    finally:
        handles[0].remove()
    assert seen


def test_a_change_of_type_is_left(data):
    model = ready(nn.Sequential(conv(), FrozenBatchNorm2d(4)))
    model[0].float()
    check(model, data.float(), {}, {"1": "it makes torch.float64 of torch.float32"})


# --- batch norm that is no module -----------------------------------------------------------------------------------


class Called(nn.Module):
    """Batch norm by its function: the statistics are of this module, or of a batch norm that is never called."""

    def __init__(self, between=lambda x: x, holder=False):
        super().__init__()
        self.conv, self.between, self.norm = conv(), between, randomize(nn.BatchNorm2d(4))
        if not holder:
            norm, self.norm = self.norm, nn.Module()
            self.norm.weight, self.norm.bias = norm.weight, norm.bias
            for name, buffer in norm.named_buffers():
                self.norm.register_buffer(name, buffer)

    def forward(self, x):
        norm = self.norm
        x = self.between(self.conv(x))
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def exported(data):
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    return torch.export.export(model, (data,)).module()


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda _: Called(), "norm.weight"), (lambda _: Called(holder=True), "norm.weight"), (exported, "1.weight")],
    ids=["statistics", "never called", "torch.export"],
)
@pytest.mark.parametrize("known", [False, True], ids=["first", "after_a_plan"])
def test_batch_norm_that_is_called_as_a_function_is_left_with_a_warning(make, name, known, data, untouched):
    model, message = make(data).double(), rf"where it is a function, and no module: batch_norm \({name}\)\."
    for _ in range(1 + known):
        with untouched(model), pytest.warns(UserWarning, match=message), Merged(model, data) as run:
            assert run.canonizer.left[f"batch_norm ({name})"] == "it is a function, and no module"
            assert not run.canonizer.merged


class Moved(nn.Module):
    """Batch norm of tokens, whose features are along the last axis."""

    def __init__(self, move, back):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4), randomize(nn.BatchNorm1d(4))
        self.move, self.back = move, back

    def forward(self, x):
        h = self.linear(x)
        return self.back(self.norm(self.move(h)), h)


MOVES = {
    "flatten": (lambda h: h.flatten(0, 1), lambda y, h: y.reshape_as(h)),
    "module": (nn.Flatten(0, 1), lambda y, h: y.reshape_as(h)),
    "as another": (lambda h: h.reshape_as(h.new_zeros(6, 4)), lambda y, h: y.reshape_as(h)),
    "transpose": (lambda h: h.transpose(1, 2), lambda y, h: y.mT),
    "several": (lambda h: h.unsqueeze(0).permute(0, 1, 3, 2).squeeze(0).contiguous(), lambda y, h: y.mT),
}


@pytest.mark.parametrize("name", MOVES)
def test_batch_norm_behind_moved_entries_is_left_with_a_warning(name, untouched):
    model, tokens = ready(Moved(*MOVES[name])).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    message = r"where entries are moved in between, as by flatten: 'norm'\. But for LRP-0 and ε, relevance"
    with untouched(model), pytest.warns(UserWarning, match=message), Merged(model, tokens) as run:
        assert not run.canonizer.merged
    model.norm.train()  # (where it is not affine, so that it could not be merged either)
    with Merged(model, tokens) as run:
        assert not run.canonizer.merged


@pytest.mark.parametrize("between", [torch.relu, lambda x: torch.cat([x, x])], ids=["relu", "cat"])
def test_no_warning_where_a_module_could_not_be_merged_either(between, data):
    with Merged(Called(between).double().eval(), data) as run:
        assert not run.canonizer.merged
