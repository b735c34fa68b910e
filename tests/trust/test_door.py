"""What does not fit is refused at the door: the error names the culprit and what would be right, in our own words."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from house_plan import MODULES
from torch import nn
from torch.nn.utils import prune
from trust_cases import CONDITIONS, differences, images, net, state, zennit_merged
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.attributors import Gradient
from crp.composites import EpsilonPlus, UniformEpsilon, UniformLRP0
from crp.concepts import ChannelConcept
from crp.errors import CRPError, InputError, InputTypeError, UnseenError
from crp.layers import LayerNotFoundError


def ask(data: Any = None, conditions: Any = None, model: nn.Module | None = None, **keywords: Any) -> Any:
    attribution = CondAttribution(net() if model is None else model)
    return attribution(images() if data is None else data, conditions or [{"y": 1}], EpsilonPlus(), **keywords)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([images()[0], images()[1]])


DATA = {
    "float32": (lambda: images().float(), r"layer '0' \(Conv2d\) has weights of torch.float64 and gets torch.float32"),
    "float16": (lambda: images().half(), "convert one, as by data.to"),
    "meta": (lambda: images().to("meta"), "data is on the meta device"),
    "sparse": (lambda: images().to_sparse(), "data is of layout torch.sparse_coo"),
    "unbatched": (lambda: images()[0], "takes 4 channels and gets a tensor of shape"),
    "channels": (lambda: torch.ones(2, 3, 6, 6).double(), r"layer '0' \(Conv2d\) takes 2 channels and gets"),
    "vectors": (lambda: torch.ones(2, 3).double(), r"takes \(samples, 2 channels, 2 axes of space\)"),
    "space": (lambda: torch.ones(2, 2, 9, 9).double(), r"layer '6' \(Linear\) takes 48 features"),
    "complex": (lambda: images().to(torch.complex128), "data must be a floating-point tensor"),
    "integers": (lambda: images().long(), "data must be a floating-point tensor"),
    "array": (lambda: images().numpy(), "data must be a floating-point tensor"),
    "nothing": (lambda: images()[:0], "at least one sample"),
    "samples of nothing": (lambda: images()[..., :0], r"has shape \(.*, 0\); a sample needs at least one value"),
    "nan": (lambda: images() * torch.nan, "NaN or infinite values in samples"),
}


@pytest.mark.promise(
    "Input",
    "Data that do not fit are refused by name, in our own words, and before the model runs where that can be known",
)
@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("call", [ask, lambda data: Gradient(net())(data, 1)], ids=["conditional", "attributor"])
def test_data_that_do_not_fit(case, call):
    make, message = DATA[case]
    with pytest.raises((InputError, InputTypeError), match=message):
        call(make())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, z):
        return self.left(x) + self.right(z)


ARGUMENTS = {
    "none": ((torch.ones(1, 3), None), r"layer 'right' \(Linear\) gets None in place of .* 1 is None"),
    "text": ((torch.ones(1, 3), "z"), r"layer 'right' \(Linear\) gets a str in place of a tensor"),
    "integers": ((torch.ones(1, 3), torch.ones(1, 3).long()), "has weights of torch.float32 and gets torch.int64"),
    "too few": ((torch.ones(1, 3),), r"the model takes \(x, z\), and the data do not fit that: missing a required"),
    "too many": ((torch.ones(1, 3),) * 3, "do not fit that: too many positional arguments"),
    "another": ({"x": torch.ones(1, 3), "w": torch.ones(1, 3)}, "do not fit that: missing a required argument: 'z'"),
}  # fmt: skip


@pytest.mark.promise("Input", "Inputs that do not go with the model's arguments are refused by name")
@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("composite", [EpsilonPlus, zennit_merged, lambda: None], ids=["ours", "zennit", "none"])
def test_inputs_that_do_not_fit_the_model(case, composite):
    data, message = ARGUMENTS[case]
    with pytest.raises((InputError, InputTypeError), match=message):
        CondAttribution(Two().eval())(data, [{"y": 1}], composite())


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused():
    with pytest.raises(InputTypeError, match="data is a nested tensor"):
        ask(nested())


@pytest.mark.promise("Input", "Errors of the model's own code pass as they are")
def test_errors_of_the_model_itself_pass():
    class Own(nn.Module):
        def forward(self, x):
            raise RuntimeError("an error of the user's model")

    with pytest.raises(RuntimeError, match="an error of the user's model") as raised:
        ask(model=nn.Sequential(net(), Own()).eval())
    assert not isinstance(raised.value, CRPError)


@pytest.mark.promise("Input", "Devices are checked before the model runs")
@pytest.mark.parametrize("device", [True, 3.5, "", "xyz", "cuda:99", []], ids=repr)
def test_devices_are_checked_before_the_model_runs(device):
    model = net()
    model.forward = None
    for name, call in (
        ("on_device", lambda: CondAttribution(model)(images(), [{"y": 1}], on_device=device)),
        ("device", lambda: CondAttribution(model, device)),
    ):
        with pytest.raises((InputError, InputTypeError), match=rf"{name} (must be|is)"):
            call()


MASKS = {
    "nan": (lambda g: g * torch.nan, "returns NaN or infinite values"),
    "array": (lambda g: g.numpy(), "must return a gradient of"),
    "list": (lambda g: g.tolist(), "must return a gradient of"),
    "nothing": (lambda g: None, "must return a gradient of"),
    "complex": (lambda g: g.to(torch.complex128), "must return real numbers"),
    "shape": (lambda g: g[:, :1], "must return a gradient of"),
    "meta": (lambda g: g.to("meta"), "must return real numbers on cpu"),
}


@pytest.mark.promise("Input", "A mask must return a tensor of the right shape, dtype and device, with finite values")
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("exclude_parallel", [True, False])
def test_results_of_masks(case, exclude_parallel):
    mask, message = MASKS[case]
    with pytest.raises((InputError, InputTypeError), match=message):
        ask(conditions=[{"y": 1, "3": [0]}], mask_map=lambda *_: mask, exclude_parallel=exclude_parallel)


INITIAL = {
    "complex": torch.ones(2, 3, dtype=torch.complex128),
    "complex number": 1 + 2j,
    "complex by a function": lambda output: output.to(torch.complex128),
    "nan": torch.full((2, 3), torch.nan),
    "infinite": float("inf"),
    "array": np.ones((2, 3)),
    "shape": torch.ones(4, 5),
}


@pytest.mark.promise("Input", "Initial relevance must be real and finite")
@pytest.mark.parametrize("case", INITIAL)
def test_initial_relevance_is_real_and_finite(case):
    with pytest.raises((InputError, InputTypeError), match="init_rel"):
        ask(init_rel=INITIAL[case])


@pytest.mark.promise("Input", "Weights that are not finite are named before the model runs")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "6.bias"])
def test_weights_that_are_not_finite_are_named(value, name):
    model = net()
    ask(model=model)
    wanted = ask(model=model).heatmap
    parameter = model.get_parameter(name)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] = value
    model[2].forward = None
    for _ in range(2):
        with pytest.raises(InputError, match=rf"'{name}' of the model has NaN or infinite values"):
            ask(model=model)
    del model[2].forward
    with torch.no_grad():
        parameter.copy_(before)
    assert torch.equal(ask(model=model).heatmap, wanted)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: torch.inference_mode(), r"were made in torch\.inference_mode\(\), .*copy\.deepcopy\(model\)"),
        (lambda: torch.device("meta"), "are on the meta device, where tensors have no values"),
    ],
    ids=["inference mode", "meta device"],
)
@pytest.mark.parametrize("composite", [EpsilonPlus(), None], ids=lambda c: type(c).__name__)
def test_weights_that_autograd_cannot_use_are_refused(made, message, composite):
    with made():
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(InputError, match=message):
        CondAttribution(model)(torch.ones(1, 3), [{"y": 1}], composite)
    assert all(parameter.requires_grad for parameter in model.parameters())
    if "inference" in message:
        CondAttribution(copy.deepcopy(model))(torch.ones(1, 3), [{"y": 1}], composite)


@pytest.mark.parametrize("composite", [ZennitEpsilonPlus, EpsilonPlus])
@pytest.mark.parametrize("by_hand", [False, True])
def test_zennits_merging_into_weights_that_are_computed_is_refused(composite, by_hand):
    """The next call would compute the weight again, and the model predict something else."""
    rules = composite(canonizers=[SequentialMergeBatchNorm()])
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double()
    prune.l1_unstructured(model.eval()[0], "weight", 0.5)
    predicted = model(images()).detach()
    message = r"merges batch norm into '0', whose weight is computed .*prune\.remove"
    with pytest.raises(InputError, match=message), rules.context(model) if by_hand else nullcontext():
        CondAttribution(model)(images(), [{"y": 1}], rules)
    assert torch.equal(model(images()), predicted)
    prune.remove(model[0], "weight")
    assert torch.allclose(CondAttribution(model)(images(), [{"y": 1}], rules).prediction, predicted, rtol=1e-4)


@pytest.mark.promise("Results", "A heatmap that is not finite is an error")
def test_what_torch_does_not_count_as_a_change_is_seen_in_the_result():
    model = net()
    ask(model=model)
    model[6].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"the heatmap is not finite, as '6.weight'"):
        CondAttribution(model)(images(), [{"y": 0}])
    model = net()
    model[1].running_var[0] = torch.nan
    with pytest.raises(InputError, match=r"the heatmap is not finite, as '1.running_var'"):
        ask(model=model)


@pytest.mark.promise("Results", "Numbers that become too large on the way are told of")
def test_numbers_that_become_too_large_are_told_of():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)
    with pytest.warns(UserWarning, match="numbers became too large"):
        CondAttribution(model)(torch.ones(1, 2), [{"y": 1}])


@pytest.mark.promise("Results", "Relevance that is nothing but rounding is told of")
def test_relevance_that_is_nothing_but_rounding_is_told_of():
    """Shares of a sum of 1e-7 are 5e6 and -5e6, of channels, which the heatmap adds up."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Sigmoid(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        model[2].weight.fill_(1.0)
        model[2].bias.zero_()
    data = torch.tensor([[1.0, 1.0 + 2**-23]])
    with pytest.warns(UserWarning, match="rounding alone is as much as what the model predicts"):
        CondAttribution(model)(data, [{"y": 1}], UniformLRP0())
    for composite in (UniformEpsilon(epsilon=0.1), None):  # (warnings are errors here)
        CondAttribution(model)(data, [{"y": 1}], composite)
    CondAttribution(model.double())(data.double(), [{"y": 1}], UniformLRP0())


@pytest.mark.promise("Input", "Parts of `generate` do not depend on what the caller changes between them")
def test_parts_do_not_depend_on_what_the_caller_changes_between():
    model, data, ids = net(), images(), [0]
    targets, init = torch.tensor([1]), torch.ones(1, 3).double()
    conditions = [{"y": targets, "3": ids}, {"y": 2}, {"y": 0, "3": ids}, {"y": targets}]
    records, masks = ["0"], {"3": ChannelConcept.mask}
    given = (data, conditions, EpsilonPlus(), records, masks)
    wanted = [part.heatmap for part in CondAttribution(model).generate(
        *copy.deepcopy(given[:2]), EpsilonPlus(), ["0"], dict(masks), init_rel=init.clone(), batch_size=3, verbose=False
    )]  # fmt: skip
    parts = CondAttribution(model).generate(*given, init_rel=init, batch_size=3, verbose=False)
    found = [next(parts).heatmap]
    data.zero_()
    ids[0], targets[0] = 2, 0
    init.zero_()
    conditions[1]["y"] = 1
    records.append("nothing")
    masks.clear()
    found += [part.heatmap for part in parts]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


CHANGES = {
    "in place": (lambda m: m[3].weight.mul_(2), "'3.weight'"),
    "through data": (lambda m: m[3].weight.data[1].mul_(2), "'3.weight'"),
    "through an array": (lambda m: m[0].bias.detach().numpy().__imul__(2), "'0.bias'"),
    "a buffer through data": (lambda m: m[1].running_var.data.add_(1), "'1.running_var'"),
    "other memory": (lambda m: setattr(m[3].weight, "data", m[3].weight.data * 2), "'3.weight'"),
    "loaded": (lambda m: m.load_state_dict(net(1).state_dict()), "'0.weight', '0.bias'"),
    "another parameter": (lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight * 2)), "'3.weight'"),
    "another layer": (lambda m: m.__setitem__(3, nn.Conv2d(4, 3, 3).double().eval()), "'3.weight', '3.bias'"),
    "a buffer": (lambda m: m[1].running_mean.add_(1), "'1.running_mean'"),
    "a layer without weights": (lambda m: m.__setitem__(2, nn.Tanh().eval()), "'2'"),
    "one layer more": (lambda m: m.append(nn.Linear(3, 3).double().eval()), "'7', '7.weight', '7.bias'"),
}


@pytest.mark.promise("Input", "Weights and layers that change between parts of `generate` are refused")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("composite", [EpsilonPlus, zennit_merged, lambda: None], ids=["ours", "zennit", "none"])
@pytest.mark.parametrize("n_samples", [1, 2])
def test_what_changes_of_the_model_between_parts_is_noticed(change, composite, n_samples):
    """Parts of one call would be of two models. Afterwards a new call is right."""
    model, (apply, names) = net(), CHANGES[change]
    data, conditions = images()[:n_samples], [*CONDITIONS, {"y": 0}]
    attribution = CondAttribution(model)
    parts = attribution.generate(data, conditions, composite(), batch_size=2, verbose=False)
    wanted = attribution(data, conditions, composite()).heatmap
    assert torch.allclose(next(parts).heatmap, wanted[:2])
    with torch.no_grad():
        apply(model)
    with pytest.raises(InputError, match=f"{names}.* of the model changed between parts"):
        next(parts)
    whole = attribution(data, conditions, composite()).heatmap
    parts = attribution.generate(data, conditions, composite(), batch_size=3, verbose=False)
    assert torch.allclose(torch.cat([part.heatmap for part in parts]), whole)
    assert not torch.allclose(whole, wanted)


#: Rooms in which whoever calls is told of a mistake by errors of the family.
OF_THE_FAMILY = ("attribution", "attributors", "checks", "concept_graph", "concepts", "engine", "metrics")


@pytest.mark.parametrize("name", OF_THE_FAMILY)
def test_mistakes_are_told_by_errors_of_the_family(name):
    """Each ValueError and TypeError that these rooms raise is also a `CRPError`."""
    plain = re.compile(r"raise (ValueError|TypeError)\(")
    of_room = {module: path for module, path in MODULES.items() if module.split(".")[1:2] == [name]}
    assert of_room
    assert [module for module, path in of_room.items() if plain.search(path.read_text(encoding="utf-8"))] == []


def test_errors_are_of_one_family():
    assert issubclass(InputError, ValueError) and issubclass(InputTypeError, TypeError)
    assert issubclass(LayerNotFoundError, KeyError) and issubclass(UnseenError, RuntimeError)
    assert all(issubclass(kind, CRPError) for kind in (InputError, InputTypeError, LayerNotFoundError, UnseenError))
    model = net()
    before = state(model)
    for call in (
        lambda: ask(model=model, conditions=[{"y": 1, "nope": [0]}]),
        lambda: ask(model=model, record_layer=["nope"]),
        lambda: ask(model=model, conditions=[{"y": []}]),
        lambda: ask(model=model, conditions=[3]),
    ):
        with pytest.raises(CRPError):
            call()
    assert differences(before, state(model)) == []
    assert len(ask(model=model, conditions=CONDITIONS).heatmap) == 6
