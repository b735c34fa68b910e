"""What the arguments of `CondAttribution` mean; numbers (S4, C18, ...) are those of zennit-crp's known defects."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from attribution_cases import close, every_kind, net, parallel, plain_sums, rows, same, stack, zennit_flat
from core_cases import Maps
from torch import nn
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution, attrResult
from crp.composites import DeepLift, EpsilonPlus, EpsilonPlusFlat, Gradient
from crp.concepts import ChannelConcept
from crp.types import AttributionResults


def shared_gradient() -> nn.Module:
    """``a(x) + b(x)``: autograd hands one gradient to both."""
    model = net(lambda s, x: s.out(s.a(x) + s.b(x)), a=nn.Linear(6, 5), b=nn.Linear(6, 5), out=nn.Linear(5, 3))
    return model.eval()


# --- conditions -----------------------------------------------------------------------------------------------------


@every_kind
def test_kinds_of_ids(mlp, vectors, composite):
    """S11: ids may be int, list, tuple, array, tensor, and count from the end."""
    attribution = Maps(mlp)
    wanted = attribution(vectors[:1], [{"y": [3], "2": [7, 2]}], composite)
    for ids in (
        (7, 2),
        [-1, 2],
        np.array([7, 2]),
        torch.tensor([[7, -6]]),
        range(2, 8, 5),
        [np.int64(7), torch.tensor(2)],
    ):
        assert same(attribution(vectors[:1], [{"y": [3], "2": ids}], composite), wanted)
    for target in (3, -1, np.int32(3), torch.tensor(3), torch.tensor([-1]), (3,), np.array([3]), [torch.tensor(3)]):
        assert same(attribution(vectors[:1], [{"y": target, "2": [7, 2]}], composite), wanted)
    one = attribution(vectors[:1], [{"y": 3, "2": [5]}], composite)
    for ids in (5, -3, torch.tensor(5), np.int64(-3)):
        assert same(attribution(vectors[:1], [{"y": 3, "2": ids}], composite), one)


@every_kind
def test_several_targets_are_summed(mlp, vectors, composite):
    found = Maps(mlp)(vectors[:1], [{"y": [0, 2]}, {"y": 0}, {"y": 2}, {"y": [True, False, True, False]}], composite)
    assert close(found.heatmap[0], found.heatmap[1] + found.heatmap[2])
    assert close(found.heatmap[3], found.heatmap[0])


@every_kind
@parallel
def test_no_ids_let_nothing_through(mlp, vectors, composite, exclude_parallel):
    found = Maps(mlp)(vectors[:1], [{"y": 0, "2": []}], composite, ["0"], exclude_parallel=exclude_parallel)
    assert not found.heatmap.any()
    assert not found.relevances["0"].any()
    assert found.relevances["2"].any()


@plain_sums
@every_kind
def test_a_mask_leaves_the_parallel_branch_alone(vectors, composite):
    """S10: branches share one gradient tensor; masking it for one must not change it for the other."""
    attribution = Maps(shared_gradient())
    free = attribution(vectors[:1], [{"y": 1}], composite, ["a", "b"])
    for masked, other in (("a", "b"), ("b", "a")):
        found = attribution(vectors[:1], [{"y": 1, masked: [2]}], composite, ["a", "b"], exclude_parallel=False)
        alone = attribution(vectors[:1], [{"y": 1, masked: [2]}], composite)
        past = attribution(vectors[:1], [{"y": 1, other: range(5)}], composite)
        assert close(found.relevances[other], free.relevances[other])
        assert close(found.heatmap, alone.heatmap + past.heatmap)


@parallel
def test_mask_where_the_gradient_is_expanded(images, exclude_parallel):
    """C12: the gradient of a sum is one number, seen everywhere; a mask needs memory of its own."""
    model = net(lambda s, x: s.c(x).sum((2, 3)), c=nn.Conv2d(3, 4, 3))
    attribution = CondAttribution(model)
    parts = attribution(images[:1], [{"y": i, "c": [i]} for i in range(4)], exclude_parallel=exclude_parallel)
    whole = attribution(images[:1], [{"y": range(4)}])
    assert close(parts.heatmap.sum(0), whole.heatmap[0])
    mixed = attribution(images[:1], [{"y": 0, "c": [1]}], exclude_parallel=exclude_parallel)
    assert not mixed.heatmap.any()


@plain_sums
@every_kind
@parallel
def test_layer_that_returns_its_input(vectors, composite, exclude_parallel):
    """Dropout hands on its input, which the shortcut reads too; they are told apart."""
    model = net(lambda s, x: s.out(s.drop(h := s.a(x)) + h), a=nn.Linear(6, 5), drop=nn.Dropout(), out=nn.Linear(5, 3))
    attribution = Maps(model)
    found = attribution(vectors[:1], [{"y": 1}], composite, ["a", "drop"])
    at_drop = attribution(vectors[:1], [{"y": 1, "drop": range(5)}], composite, ["a"])
    assert close(at_drop.relevances["a"] * 2, found.relevances["a"])
    assert close(found.relevances["drop"] * 2, found.relevances["a"])
    past = attribution(vectors[:1], [{"y": 1, "drop": []}], composite, exclude_parallel=exclude_parallel)
    assert close(past.heatmap, found.heatmap / 2) if not exclude_parallel else not past.heatmap.any()


@every_kind
@parallel
def test_two_names_of_one_call(mlp, vectors, composite, exclude_parallel):
    """``"2"`` and ``"2#0"`` are one; in one condition both masks act."""
    attribution = Maps(mlp)
    conditions = [{"y": 1, "2": [3, 4]}, {"y": 1, "2#0": [4, 5]}, {"y": 1, "2": [3, 4], "2#0": [4, 5]}]
    found = attribution(vectors[:1], conditions, composite, exclude_parallel=exclude_parallel)
    plain = [{"y": 1, "2": [3, 4]}, {"y": 1, "2": [4, 5]}, {"y": 1, "2": [4]}]
    assert close(found.heatmap, attribution(vectors[:1], plain, composite).heatmap)


@pytest.mark.parametrize("composite", [None, ZennitEpsilonPlus(), EpsilonPlus()], ids=["gradient", "zennit", "ours"])
def test_first_layer_that_returns_the_data(mlp, vectors, composite):
    model = nn.Sequential(nn.Identity(), *mlp).double().eval()
    whole = Maps(mlp)(vectors[:1], [{"y": 1}], composite)
    found = Maps(model)(vectors[:1], [{"y": 1, "0": [2]}], composite)
    assert close(found.heatmap[0, 2], whole.heatmap[0, 2])
    assert not found.heatmap[0, [0, 1, 3, 4, 5]].any()
    assert close(found.relevances["0"], whole.heatmap)


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_record_layer_may_be_any_sequence(mlp, vectors):
    """C13: a tuple; a layer named twice; neither warns."""
    attribution = Maps(mlp)
    wanted = attribution(vectors, [{"y": 1}], None, ["0", "2"])
    assert set(wanted.relevances) == {"0", "2"}
    for record in (("0", "2"), ["0", "2", "0"], {"0": 1, "2": 2}):
        assert same(attribution(vectors, [{"y": 1}], None, record), wanted)


def test_result_unpacks_and_is_detached(mlp, vectors):
    """L7: nothing in a result keeps the graph."""
    data = vectors.clone().requires_grad_()
    result = Maps(mlp)(data, [{"y": 1, "2": [3]}], EpsilonPlus(), ["0"])
    heatmap, activations, relevances, prediction = result
    assert isinstance(result, AttributionResults)
    assert attrResult is AttributionResults
    assert set(activations) == set(relevances) == {"0", "2"}
    tensors = [heatmap, prediction, *activations.values(), *relevances.values()]
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in tensors)
    assert close(prediction, mlp(vectors).detach())
    assert close(activations["0"], mlp[0](vectors).detach())


@pytest.mark.parametrize("exclude_parallel", [True, False])
@pytest.mark.parametrize("start", [None, "2"])
@pytest.mark.parametrize("generate", [False, True])
def test_results_say_what_flowed_and_what_arrived(mlp, vectors, exclude_parallel, start, generate):
    conditions = [{"y": 1, "2": [3]}, {"y": 2, "2": [0, 1]}] if start is None else [{"2": [3]}, {"2": [0, 1]}]

    def ask(composite: object) -> AttributionResults:
        keywords = {"record_layer": ["0", "1"], "start_layer": start, "exclude_parallel": exclude_parallel}
        if generate:
            (found,) = Maps(mlp).generate(vectors[:3], conditions, composite, verbose=False, **keywords)
            return found
        return Maps(mlp)(vectors[:3], conditions, composite, **keywords)

    found = ask(EpsilonPlus())
    assert found.encoding == "multiplier" and set(found.multipliers) == {"0", "1", "2"}
    for name, multiplier in found.multipliers.items():
        assert close(found.activations[name] * multiplier, found.relevances[name])
    dead = found.activations["1"] == 0
    assert found.multipliers["1"][dead].any() and not found.relevances["1"][dead].any()
    plain = ask(Gradient())
    assert plain.encoding == "multiplier" and plain.multipliers.keys() == found.multipliers.keys()
    assert all(torch.equal(plain.multipliers[name], plain.relevances[name]) for name in plain.relevances)
    referred, base = ask(DeepLift(reference=0.5)), mlp[:1](torch.full((1, 6), 0.5, dtype=torch.float64)).detach()
    assert close((referred.activations["0"] - base) * referred.multipliers["0"], referred.relevances["0"])
    for composite in (None, ZennitEpsilonPlus()):
        result = ask(composite)
        assert result.encoding == "relevance" and result.multipliers is None


def test_results_are_named_tuples_of_four(mlp, vectors):
    result = Maps(mlp)(vectors, [{"y": 1}], EpsilonPlus(), ["0"])
    assert isinstance(result, tuple) and len(result) == 4
    assert result._fields == ("heatmap", "activations", "relevances", "prediction")
    assert list(result._asdict()) == list(result._fields)
    for again in (pickle.loads(pickle.dumps(result)), copy.copy(result), copy.deepcopy(result), result._replace()):
        assert type(again) is AttributionResults and same(again, result)
        assert again.encoding == "multiplier" and torch.equal(again.multipliers["0"], result.multipliers["0"])
    other = result._replace(heatmap=torch.zeros(1), encoding="relevance", multipliers=None)
    assert torch.equal(other.heatmap, torch.zeros(1)) and other.prediction is result.prediction
    assert (other.encoding, other.multipliers) == ("relevance", None)
    plain = AttributionResults(*result)
    assert (plain.encoding, plain.multipliers) == ("relevance", None) and plain._make(result).multipliers is None


def test_results_are_shown_by_their_shapes(mlp, vectors):
    result = CondAttribution(mlp)(vectors[:1], [{"y": 0}, {"y": 1}], record_layer=["2"])
    heatmap, layer, prediction = (tuple(x.shape) for x in (result.heatmap, result.relevances["2"], result.prediction))
    assert repr(result) == (
        f"AttributionResults(heatmap={heatmap}, activations={{'2': {layer}}}, relevances={{'2': {layer}}}, "
        f"prediction={prediction})"
    )
    several = result._replace(heatmap={"a": result.heatmap, "b": None}, relevances={})
    assert f"heatmap={{'a': {heatmap}, 'b': None}}" in repr(several)
    assert f"heatmap=({heatmap}, None)" in repr(result._replace(heatmap=[result.heatmap, None]))


def test_results_do_not_keep_the_graph_of_initial_relevance(mlp, vectors):
    """L7, where the caller's own tensor requires a gradient."""
    for start in (None, "2"):
        width = 4 if start is None else 8
        found = Maps(mlp)(
            vectors, [{}], None, ["0"], start_layer=start, init_rel=torch.ones(4, width, requires_grad=True)
        )
        assert not any(t.requires_grad for t in [found.heatmap, found.prediction, *found.relevances.values()])


@pytest.mark.parametrize("generate", [False, True])
def test_on_device_moves_everything(vgg_bn, images, generate):
    """L7: `generate` too moves the heatmap. (`meta` stands for another device.)"""
    attribution = CondAttribution(vgg_bn)
    if generate:
        (found,) = attribution.generate(images[:1], [{"y": 1, "features.3": [1]}], on_device="meta", verbose=False)
    else:
        found = attribution(images[:1], [{"y": 1, "features.3": [1]}], on_device="meta")
    tensors = [found.heatmap, found.prediction, *found.activations.values(), *found.relevances.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# --- the data -------------------------------------------------------------------------------------------------------


def test_data_need_not_require_a_gradient(mlp, vectors):
    """Neither does the call change them, nor leave a gradient on data that did not ask for one."""
    before = vectors.clone()
    plain = Maps(mlp)(vectors, [{"y": 0}, {"y": 1}], EpsilonPlus())
    assert vectors.grad is None
    assert not vectors.requires_grad
    assert torch.equal(vectors, before)
    asked = vectors.clone().requires_grad_()
    assert same(Maps(mlp)(asked, [{"y": 0}, {"y": 1}], EpsilonPlus()), plain)
    assert close(asked.grad, plain.heatmap.reshape(4, 2, 6).sum(1))
    inner = asked * 1
    assert same(Maps(mlp)(inner, [{"y": 0}, {"y": 1}], EpsilonPlus()), plain)


def test_data_grad_is_replaced_or_added_to(mlp, vectors):
    """S9: adding touches ``data.grad`` only, never a heatmap."""
    conditions = [{"y": 0}, {"y": 1, "2": [2]}]
    wanted = Maps(mlp)(vectors, conditions)
    data = vectors.clone().requires_grad_()
    replacing, adding = Maps(mlp), Maps(mlp, overwrite_data_grad=False)
    assert same(adding(data, conditions), wanted)
    once = data.grad.clone()
    assert close(once, wanted.heatmap.reshape(4, 2, 6).sum(1))
    with pytest.warns(UserWarning, match=r"data\.grad is filled.*overwrite_data_grad is False"):
        assert same(adding(data, conditions), wanted)
    assert close(data.grad, 2 * once)
    replacing(data, conditions)
    assert close(data.grad, once)


@every_kind
def test_model_that_changes_its_input_in_place(vectors, composite):
    model = net(lambda s, x: s.a(x.sub_(1).mul_(2)), a=nn.Linear(6, 3))
    wanted = Maps(net(lambda s, x: s.a((x - 1) * 2), a=model.a))(vectors, [{"y": 0}], composite)
    before = vectors.clone()
    assert same(Maps(model)(vectors, [{"y": 0}], composite), wanted)
    assert torch.equal(vectors, before)


# --- where relevance starts -----------------------------------------------------------------------------------------


@every_kind
def test_number_as_initial_relevance(mlp, vectors, composite):
    """S4: whole or not, of Python or numpy."""
    attribution, conditions = Maps(mlp), [{"y": 1, "2": [3, 4]}, {}]
    wanted = attribution(vectors, conditions, composite, init_rel=torch.full((8, 4), 2.0))
    for number in (2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), lambda prediction: 2):
        assert same(attribution(vectors, conditions, composite, init_rel=number), wanted)
    assert not close(wanted.heatmap[::2], attribution(vectors, conditions[:1], composite).heatmap, 1e-3)


@every_kind
@parallel
def test_initial_relevance_with_targets_for_some_rows(mlp, vectors, composite, exclude_parallel):
    """S5: each row has its own target; a row without one starts at the whole output."""
    attribution = Maps(mlp)
    conditions = [{}, {"y": [3]}, {"2": [1, 2, 3]}, {"y": 0, "2": [4, 5]}]
    found = attribution(vectors[:1], conditions, composite, init_rel=1, exclude_parallel=exclude_parallel)
    start = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.float64)
    free = [{k: v for k, v in condition.items() if k != "y"} for condition in conditions]
    wanted = attribution(vectors[:1], free, composite, init_rel=start, exclude_parallel=exclude_parallel)
    assert same(found, wanted)


@every_kind
def test_initial_relevance_broadcasts(mlp, vectors, composite):
    """C18: [rows, C], [1, C] and [C], in `generate` with any batch size."""
    attribution = Maps(mlp)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    for n in (1, 3, 4, 5):  # 4: as many conditions as outputs
        conditions = [{"2": [i, i + 1]} for i in range(n)]
        wanted = attribution(vectors[:1], conditions, composite, init_rel=weights.expand(n, 4))
        for init_rel in (weights, weights[None], weights.expand(n, 4)):
            assert same(attribution(vectors[:1], conditions, composite, init_rel=init_rel), wanted)
            for batch_size in (1, 2, 4):
                parts = attribution.generate(
                    vectors[:1], conditions, composite, init_rel=init_rel, batch_size=batch_size, verbose=False
                )
                assert same(stack(parts), wanted)


@every_kind
def test_initial_relevance_of_each_row_in_parts(mlp, vectors, composite):
    """A tensor with all rows is cut; one with the rows of a part serves every part."""
    attribution, conditions = Maps(mlp), [{"2": [i, i + 1]} for i in range(5)]
    start = torch.randn(5, 4, dtype=torch.float64)
    wanted = attribution(vectors[:1], conditions, composite, init_rel=start)
    parts = attribution.generate(vectors[:1], conditions, composite, init_rel=start, batch_size=2, verbose=False)
    assert same(stack(parts), wanted)
    repeated = attribution(vectors[:1], conditions, composite, init_rel=start[[0, 1, 0, 1, 0]])
    parts = attribution.generate(vectors[:1], conditions, composite, init_rel=start[:2], batch_size=2, verbose=False)
    assert same(stack(parts), repeated)


@every_kind
def test_function_as_initial_relevance_needs_no_target(mlp, vectors, composite):
    """C2: in `generate` as well."""
    attribution, conditions = Maps(mlp), [{"2": [i]} for i in range(3)]
    wanted = attribution(vectors[:1], conditions, composite, init_rel=mlp(vectors[:1]).detach().softmax(-1))
    function = lambda prediction: prediction.softmax(-1)  # noqa: E731
    assert same(attribution(vectors[:1], conditions, composite, init_rel=function), wanted)
    parts = attribution.generate(vectors[:1], conditions, composite, init_rel=function, batch_size=2, verbose=False)
    assert same(stack(parts), wanted)


@every_kind
@parallel
def test_start_layer_in_parts(mlp, vectors, composite, exclude_parallel):
    """S6: targets play no part from a start layer, in `generate` as in `__call__`."""
    attribution, conditions = Maps(mlp), [{"y": [1], "2": [i]} for i in range(5)]
    free = attribution(vectors[:1], [{"2": [i]} for i in range(5)], composite, ["0"], start_layer="2")
    keywords = {"record_layer": ["0"], "start_layer": "2", "exclude_parallel": exclude_parallel}
    with pytest.warns(UserWarning, match="'y' has no effect.*start_layer '2'") as caught:
        assert same(attribution(vectors[:1], conditions, composite, **keywords), free)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="'y' has no effect"):
        parts = stack(attribution.generate(vectors[:1], conditions, composite, batch_size=2, verbose=False, **keywords))
    assert same(parts, free)
    assert close(free.prediction, rows(free, [0] * 5).activations["2"])
    assert parts.heatmap.any()


@every_kind
def test_layers_above_the_start_have_no_relevance(mlp, vectors, composite):
    found = Maps(mlp)(vectors, [{}], composite, ["4", "0"], start_layer="2")
    assert not found.relevances["4"].any()
    assert found.activations["4"].any()
    assert found.relevances["0"].any()


def test_batch_sizes_and_progress(mlp, vectors, capsys):
    attribution, conditions = Maps(mlp), [{"y": i} for i in range(4)]
    parts = list(attribution.generate(vectors[:1], conditions, batch_size=3))
    assert [len(part.heatmap) for part in parts] == [3, 1]
    assert "2/2" in capsys.readouterr().err
    list(attribution.generate(vectors[:1], conditions, batch_size=np.int64(3), verbose=False))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("composite", "passes"), [(None, 1), (EpsilonPlusFlat(), 1), (zennit_flat(), 3)])
def test_number_of_forward_passes(vectors, composite, passes):
    """Composites in multiplier encoding and the plain gradient run the model once for all parts."""
    model = net(lambda s, x: s.b(s.a(x).relu()), a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    conditions = [{"y": 0, "a": [i]} for i in range(5)]
    sizes = []
    model.a.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    list(Maps(model).generate(vectors[:1], conditions, composite, batch_size=2, verbose=False))
    assert model.calls == passes
    assert set(sizes) == {1}, "each sample is needed once"


def test_calls_do_not_warn(vgg_bn, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution = CondAttribution(vgg_bn)
        attribution(images, [{"y": 1, "features.3": [0]}], EpsilonPlusFlat(), ["features.7"], ChannelConcept().mask)
