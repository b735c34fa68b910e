"""Models with several inputs: which are explained, which are passed on, and in which form results come."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attribution_cases import SMALL, close, every_kind, parallel, same, stack
from attributor_cases import Call
from core_cases import Maps
from torch import Tensor, nn
from torch.nn import functional as F

import crp
from crp.attribution import AttributionGraph, CondAttribution
from crp.attributors import GradCAM, Gradient, IntegratedGradients, Occlusion, ShapleySampling, SmoothGrad
from crp.composites import DeepLift, EpsilonPlus, GradientTimesInput, UniformEpsilon
from crp.concepts import ChannelConcept
from crp.engine.inputs import Inputs

IMAGE = SMALL
TABLE = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([3, 1])


class Meeting(nn.Module):
    """Logits of a picture, a row of a table, and an id: (n, 3, 6, 6), (n, 5), (n,) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(5, 4)
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(12, 6)
        self.out = nn.Linear(6, 3)
        self.double().eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, image: Tensor, table: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
        h = torch.cat([F.relu(self.conv(image)).mean((2, 3)), F.relu(self.fc(table)) * scale, self.embed(ids)], 1)
        return self.out(F.relu(self.mix(h)))


class Joined(nn.Module):
    """The same as a model of a single input: picture and table side by side, ids as they are."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.net, self.ids = Meeting(), ids
        self.eval()

    def forward(self, joined: Tensor) -> Tensor:
        image, table = joined.split([108, 5], 1)
        rows = len(joined) // len(self.ids)
        return self.net(image.reshape(-1, 3, 6, 6), table, self.ids.repeat_interleave(rows))


CONDITIONS: list[dict[str, Any]] = [
    {"y": 1},
    {"y": [0, 2], "mix": [0, 3, 4]},
    {"y": 2, "mix": [1, 2], "conv": [0, 2]},
]


def within(conditions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{n if n == "y" else f"net.{n}": ids for n, ids in condition.items()} for condition in conditions]


# --- values -----------------------------------------------------------------------------------------------------------


@every_kind
@parallel
@pytest.mark.parametrize("start", [None, "mix"])
@pytest.mark.parametrize("init", [None, 2.0])
def test_several_inputs_are_one_input_side_by_side(composite, exclude_parallel, start, init):
    """One sample at a time, so that the ids of the model with one input are those of the sample."""
    keywords: dict[str, Any] = {"exclude_parallel": exclude_parallel, "init_rel": init}
    conditions = [{n: c for n, c in condition.items() if not (start and n == "y")} for condition in CONDITIONS]
    if not exclude_parallel or start:
        conditions = conditions[:2]
    found = Maps(Meeting())(
        (IMAGE, TABLE, IDS), conditions * 2, composite, ["conv"], start_layer=start, **keywords
    )  # fmt: skip
    image, table, ids = found.heatmap
    assert ids is None and image.shape[1:] == IMAGE.shape[1:] and table.shape[1:] == TABLE.shape[1:]
    n = len(conditions) * 2
    for sample in range(2):
        joined = torch.cat([IMAGE[[sample]].flatten(1), TABLE[[sample]]], 1)
        inner = None if start is None else f"net.{start}"
        wanted = Maps(Joined(IDS[[sample]]))(
            joined, within(conditions) * 2, composite, ["net.conv"], start_layer=inner, **keywords
        )
        rows = slice(sample * n, (sample + 1) * n)
        assert close(torch.cat([image[rows].flatten(1), table[rows]], 1), wanted.heatmap)
        assert close(found.relevances["conv"][rows], wanted.relevances["net.conv"])
        assert close(found.prediction[rows], wanted.prediction)


@every_kind
@parallel
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_parts_are_the_whole(composite, exclude_parallel, batch_size):
    attribution, data = CondAttribution(Meeting()), {"image": IMAGE, "ids": IDS, "table": TABLE}
    whole = attribution(data, CONDITIONS, composite, ["fc"], exclude_parallel=exclude_parallel)
    parts = list(
        attribution.generate(
            data, CONDITIONS, composite, ["fc"], exclude_parallel=exclude_parallel, batch_size=batch_size, verbose=False
        )
    )
    assert list(whole.heatmap) == ["image", "ids", "table"]
    assert whole.heatmap["ids"] is None and whole.heatmap["image"].shape == (6, 6, 6)
    for name in ("image", "table"):
        assert close(torch.cat([part.heatmap[name] for part in parts]), whole.heatmap[name])
    one_heatmap = [part._replace(heatmap=part.heatmap["image"]) for part in parts]
    assert same(stack(one_heatmap), whole._replace(heatmap=whole.heatmap["image"]))


@every_kind
def test_dict_and_tuple_agree_and_constants_are_passed_on(composite):
    attribution = CondAttribution(Meeting())
    by_place = attribution((IMAGE, TABLE, IDS, 0.5), CONDITIONS, composite)
    by_name = attribution({"scale": 0.5, "ids": IDS, "image": IMAGE, "table": TABLE}, CONDITIONS, composite)
    plain = attribution((IMAGE, TABLE, IDS), CONDITIONS, composite)
    assert by_place.heatmap[2:] == (None, None)
    assert close(by_name.heatmap["image"], by_place.heatmap[0])
    assert close(by_name.heatmap["table"], by_place.heatmap[1])
    assert not torch.allclose(plain.heatmap[0], by_place.heatmap[0])


@every_kind
@pytest.mark.parametrize("name", ["image", "table"])
def test_inputs_that_are_not_explained_do_not_change_the_others(composite, name):
    """One input is explained: its map is the result, and that of all together."""
    attribution, data = CondAttribution(Meeting()), {"image": IMAGE, "table": TABLE, "ids": IDS}
    whole = attribution(data, CONDITIONS[:2], composite).heatmap
    for explain in (name, [name]):
        found = attribution(data, CONDITIONS[:2], composite, explain=explain).heatmap
        assert isinstance(found, Tensor)
        assert close(found, whole[name])
    place = list(data).index(name)
    for position in (place, place - 3):
        found = attribution(tuple(data.values()), CONDITIONS[:2], composite, explain=position)
        assert close(found.heatmap, whole[name])


def test_gradient_is_that_of_autograd():
    model = Meeting()
    leaves = [IMAGE.clone().requires_grad_(), TABLE.clone().requires_grad_()]
    wanted = torch.autograd.grad(model(*leaves, IDS)[:, 1].sum(), leaves)
    found = Gradient(model)((IMAGE, TABLE, IDS), 1)[1]
    assert close(found[0], wanted[0]) and close(found[1], wanted[1]) and found[2] is None


def test_an_input_of_one_number_for_each_sample():
    """Its relevance is its heatmap."""
    model = Call(lambda image, age: F.relu(image.mean((2, 3)) * 2 + age[:, None]))
    age = torch.tensor([0.3, 2.0], dtype=torch.float64)
    image, found = CondAttribution(model)((IMAGE, age), [{"y": 0}], GradientTimesInput()).heatmap
    assert image.shape == (2, 6, 6)
    on = model(IMAGE, age)[:, 0] > 0
    assert torch.equal(found, torch.where(on, age, 0))


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
@pytest.mark.parametrize("conditions", [[{"y": 1}], CONDITIONS], ids=["plain", "conditions"])
def test_account_is_over_all_inputs(epsilon, conditions):
    """Of picture and table; nothing is lost but what the embedding of the ids contributes, and masks take away."""

    class Without(Meeting):
        def forward(self, image: Tensor, table: Tensor, ids: Tensor) -> Tensor:
            return super().forward(image, table, ids * 0 + 5)

    model = Without()
    with torch.no_grad():
        model.embed.weight[5] = 0
    attribution = Maps(model)
    data = (IMAGE, TABLE, IDS)
    for composite in (UniformEpsilon(epsilon=epsilon), EpsilonPlus(epsilon=epsilon)):
        kept = attribution.absorbed(data, conditions, composite)
        found = attribution(data, conditions, composite)
        assert close(kept.input, found.heatmap[0].flatten(1).sum(1) + found.heatmap[1].sum(1))
        if len(conditions) == 1:
            assert close(kept.input + kept.total, kept.initial, 1e-9)
            assert set(kept.layers) >= {"conv", "fc", "mix", "out"}
        one = attribution.absorbed(data, conditions, composite, explain=0)
        assert close(one.input, found.heatmap[0].flatten(1).sum(1))


def test_gradients_of_the_data_are_filled():
    model = Meeting()
    image, table = IMAGE.clone().requires_grad_(), TABLE.clone().requires_grad_()
    found = Maps(model)((image, table, IDS), CONDITIONS[:2] + CONDITIONS[:1], EpsilonPlus()).heatmap
    assert close(image.grad, torch.stack([found[0][:3].sum(0), found[0][3:].sum(0)]))
    assert close(table.grad, torch.stack([found[1][:3].sum(0), found[1][3:].sum(0)]))
    table.grad = None
    Maps(model)((image, table, IDS), CONDITIONS[:1], EpsilonPlus(), explain=0)
    assert table.grad is None


@every_kind
def test_modifier_runs_once_for_each_input(composite):
    seen: list[tuple[int, ...]] = []

    class Seen(CondAttribution):
        def heatmap_modifier(self, data: Tensor, on_device: object = None) -> Tensor:
            seen.append(tuple(data.shape))
            assert data.grad.shape == data.shape
            return data.grad.flatten(1).sum(1)

    found = Seen(Meeting())((IMAGE, TABLE, IDS), CONDITIONS, composite)
    assert seen == [(6, 3, 6, 6), (6, 5)]
    assert [part.shape for part in found.heatmap[:2]] == [(6,), (6,)]


def test_broadcast_of_a_subclass():
    class Pairs(Maps):
        def broadcast(self, data: Any, conditions: Any) -> Any:
            repeated = tuple(torch.cat([tensor] * len(conditions)) for tensor in data)
            return repeated, [condition for condition in conditions for _ in range(len(data[0]))]

    found = Pairs(Meeting())((IMAGE, TABLE, IDS), CONDITIONS[:2], EpsilonPlus()).heatmap
    plain = Maps(Meeting())((IMAGE, TABLE, IDS), CONDITIONS[:2], EpsilonPlus()).heatmap
    pairs = tuple(tensor[[0, 1, 0, 1]] for tensor in (IMAGE, TABLE, IDS))
    paired = Maps(Meeting())(pairs, [CONDITIONS[i] for i in (0, 0, 1, 1)], EpsilonPlus()).heatmap
    assert close(found[0], paired[0]) and close(found[1], paired[1])
    assert close(plain[0], paired[0][[0, 3]])
    data, conditions = CondAttribution(Meeting()).broadcast({"a": IMAGE, "b": IDS, "c": None}, CONDITIONS)
    assert torch.equal(data["a"], IMAGE[[0] * 3 + [1] * 3]) and torch.equal(data["b"], IDS[[0] * 3 + [1] * 3])
    assert data["c"] is None and conditions == CONDITIONS * 2


def test_an_input_changed_in_place_stays_the_users():
    def double(image: Tensor, table: Tensor) -> Tensor:
        image.mul_(2)
        table.add_(1)
        return image.mean((2, 3)) + table[:, :3]

    image, table = IMAGE.clone(), TABLE.clone()
    CondAttribution(Call(double))((image, table), [{"y": 0}], explain=0)
    assert torch.equal(image, IMAGE) and torch.equal(table, TABLE)


def test_values_of_inputs_that_are_passed_on_are_free():
    """An attention mask of zeros and minus infinity."""
    mask = torch.tensor([[0.0, -torch.inf, 0.0]] * 2, dtype=torch.float64)
    model = Call(lambda image, mask: image.mean((2, 3)) * mask.softmax(1))
    with pytest.raises(ValueError, match=r"input 1 has NaN or .* samples \[0, 1\]; an input that is only passed on"):
        CondAttribution(model)((IMAGE, mask), [{"y": 0}])
    found = CondAttribution(model)((IMAGE, mask), [{"y": 0}], explain=0).heatmap
    assert found.shape == (2, 6, 6) and found.abs().sum() > 0


@every_kind
@parallel
def test_a_layer_that_reads_only_what_is_passed_on_is_named(composite, exclude_parallel):
    with pytest.warns(UserWarning, match=r"layer 'embed' reads inputs that are passed on only \(0, 1 are explained\)"):
        found = CondAttribution(Meeting())(
            (IMAGE, TABLE, IDS), [{"y": 1}], composite, ["embed"], exclude_parallel=exclude_parallel
        )
    assert not found.relevances["embed"].any()


# --- other methods --------------------------------------------------------------------------------------------------


def test_deeplift_sums_to_the_difference():
    model = Meeting()
    fall = model(IMAGE, TABLE, IDS) - model(torch.zeros_like(IMAGE), torch.zeros_like(TABLE), IDS)
    image, table, _ = Maps(model)((IMAGE, TABLE, IDS), [{"y": 1}], DeepLift()).heatmap
    assert close(image.flatten(1).sum(1) + table.sum(1), fall[:, 1].detach(), 1e-9)
    means = [Maps(model)((IMAGE, TABLE, IDS), [{"y": 1}], DeepLift(reference=r)).heatmap for r in (0.0, 0.5)]
    references = [torch.zeros_like, lambda data: torch.full_like(data, 0.5)]
    listed = Maps(model)((IMAGE, TABLE, IDS), [{"y": 1}], DeepLift(reference=references))
    assert close(listed.heatmap[1], (means[0][1] + means[1][1]) / 2) and listed.heatmap[2] is None
    assert listed.multipliers is None and listed.encoding == "multiplier"
    bases = (torch.rand_like(IMAGE), torch.rand_like(TABLE))
    for given in ((*bases, None), bases, {"image": bases[0], "table": bases[1]}):
        data = {"image": IMAGE, "table": TABLE, "ids": IDS} if isinstance(given, dict) else (IMAGE, TABLE, IDS)
        found = crp.explain("deeplift", model, data, 1, baseline=given)
        parts = [part for part in (found.values() if isinstance(found, dict) else found) if part is not None]
        fall = model(IMAGE, TABLE, IDS) - model(*bases, IDS)
        assert close(sum(part.flatten(1).sum(1) for part in parts), fall[:, 1].detach(), 1e-9)


METHODS = {
    "gradient": {},
    "epsilon_plus": {},
    "saliency": {},
    "simple_taylor": {},
    "intgrad": {"steps": 5},
    "smoothgrad": {"n": 4},
    "occlusion": {"window_shape": 2, "step": 2},
    "shapley_sampling": {"samples": 2},
    "grad_cam": {"layer": "conv"},
    "guided_grad_cam": {"layer": "conv"},
    "deeplift": {"baseline": 0.0},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch_size", [None, 1])
def test_methods_pass_on_what_they_do_not_explain(name, batch_size):
    """As of the model in which it is a constant; repeated with the samples, however often a method looks at these."""
    image, table, ids = IMAGE.repeat(2, 1, 1, 1), TABLE.repeat(2, 1), torch.tensor([3, 1, 0, 2])
    for explain, one in ((0, image), (["image"], image)):
        data = (image, table, ids) if explain == 0 else {"image": image, "table": table, "ids": ids}
        found = crp.explain(
            name, Meeting(), data, [0, 1, 2, 0], explain=explain, batch_size=batch_size, **METHODS[name]
        )  # fmt: skip
        assert found.shape == one.shape
        for row, target in enumerate([0, 1, 2, 0]):

            class Bound(Meeting):
                def forward(self, x: Tensor, row: int = row) -> Tensor:
                    n = len(x)
                    return super().forward(x, table[[row] * n], ids[[row] * n])

            wanted = crp.explain(name, Bound(), image[[row]], target, **METHODS[name])
            assert close(found[[row]], wanted, 1e-9)


def test_tuples_of_methods_have_the_form_of_the_data():
    data = {"ids": IDS, "image": IMAGE, "table": TABLE}
    found = crp.explain("intgrad", Meeting(), data, 1, steps=3)
    assert list(found) == ["ids", "image", "table"] and found["ids"] is None
    _, by_place = IntegratedGradients(Meeting(), steps=3)((IMAGE, TABLE, IDS), 1)
    assert close(by_place[0], found["image"]) and close(by_place[1], found["table"]) and by_place[2] is None
    predicted = Meeting()(IMAGE, TABLE, IDS).argmax(1)
    found, wanted = crp.explain("gradient", Meeting(), data), crp.explain("gradient", Meeting(), data, predicted)
    assert close(found["image"], wanted["image"])
    layer = crp.explain("gradient", Meeting(), (IMAGE, TABLE, IDS), 1, layer="mix")
    assert layer.shape == (2, 6)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, d: GradCAM(m, layer="conv")(d, 1), ValueError, "one input, not of 2; name one by explain="),
        (
            lambda m, d: crp.explain("meaningful_perturbation", m, d, 1, explain=0),
            ValueError,
            "one input, not of 3; all other methods pass on",
        ),
        (lambda m, d: Occlusion(m, window_shape=[1, 2, 1])(d, 1), ValueError, "settings for 3 inputs, and there are 2"),
        (lambda m, d: SmoothGrad(m, noise=d)(d, 1), ValueError, "noise for 3 inputs of 2"),
        (lambda m, d: ShapleySampling(m, baseline=(0, 0, 0, 0))(d, 1), ValueError, "4 baselines for 2 inputs"),
        (
            lambda m, d: IntegratedGradients(m, baseline={"ids": 0})({"image": d[0], "table": d[1], "ids": d[2]}, 1),
            ValueError,
            "baseline for 'ids', which is not explained; 'image', 'table' are",
        ),
    ],
    ids=["cam", "perturbation", "occlusion", "noise", "baselines", "baseline of ids"],
)
def test_methods_that_refuse(call, kind, message):
    with pytest.raises(kind, match=message):
        call(Meeting(), (IMAGE, TABLE, IDS))


class Feeds:
    """What `AttributionGraph` asks of a traced graph."""

    def find_input_layers(self, layer: str) -> list[str]:
        return {"out": ["mix"], "mix": ["conv", "fc"]}.get(layer, [])


def test_graph_of_concepts():
    model = Meeting()
    layers = {name: ChannelConcept() for name in ("conv", "fc", "mix", "out")}
    attribution = AttributionGraph(CondAttribution(model), Feeds(), layers)
    data = (IMAGE[:1], TABLE[:1], IDS[:1])
    nodes, connections = attribution(data, EpsilonPlus(), 1, "out", target=1, width=[2, 1], verbose=False)
    assert nodes[0] == ("out", 1) and len(nodes) == 3 + 2 * 2
    assert {layer for layer, _ in nodes} == {"out", "mix", "conv", "fc"}
    only = attribution(data, EpsilonPlus(), 1, "out", target=1, width=[2], verbose=False, explain=0)
    assert only.connections[("out", 1)] == connections[("out", 1)]
    with pytest.raises(ValueError, match="belongs to one sample; sample has 2"):
        attribution((IMAGE, TABLE, IDS), EpsilonPlus(), 1, "out", verbose=False)


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    "other samples": ((IMAGE, TABLE[:1], IDS), {}, ValueError, r"for \[2, 1, 2\] samples; .*0 of shape \(2, 3, 6, 6\)"),
    "no batch axis": ((IMAGE, IDS, torch.tensor(1)), {}, ValueError, r"for \[2, 2, None\] samples; .*2 of shape \(\)"),
    "array": ((IMAGE, TABLE.numpy()), {}, TypeError, r"input 1 is ndarray \(torch.from_numpy .*\); inputs are tensors"),
    "list": ({"x": [1, 2]}, {}, TypeError, r"input 'x' is list \(a tokenizer gives .*=\"pt\"\); inputs are tensors"),
    "empty": ((), {}, TypeError, "a tuple or dict of an input for each argument; it is empty"),
    "keys": ({0: IMAGE}, {}, TypeError, "names of the model's arguments as keys, not 0"),
    "no floats": ({"ids": IDS, "n": 3}, {}, TypeError, "no input is a floating.*'ids' is torch.int64, 'n' is 3"),
    "integers asked": (
        (IMAGE, TABLE, IDS), {"explain": [0, 2]}, TypeError, "input 2 must be a floating-point tensor.*not torch.int64"
    ),
    "number asked": ((IMAGE, TABLE, IDS, 1.0), {"explain": 3}, TypeError, "input 3 must be a floating.*not float"),
    "unknown name": ({"image": IMAGE}, {"explain": "picture"}, KeyError, "no input 'picture' to .* are 'image'"),
    "unknown place": ((IMAGE, TABLE), {"explain": 2}, KeyError, "no input 2 to explain; there are 0, 1"),
    "nothing": ((IMAGE, TABLE), {"explain": []}, ValueError, "explain is empty"),
    "bool": ((IMAGE, TABLE), {"explain": [True]}, TypeError, "by position or name, not by True"),
    "one tensor": (IMAGE, {"explain": 0}, ValueError, "explain=0 chooses among several.*single one"),
    "nan": ((IMAGE, TABLE / 0), {}, ValueError, r"input 1 has NaN or infinite values in samples \[0, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_before_the_model_runs(case, untouched):
    data, keywords, kind, message = WRONG[case]
    model = Call(lambda *_, **__: pytest.fail("the model runs"))
    attribution = CondAttribution(model)
    calls = [
        functools.partial(attribution, data, [{"y": 0}], **keywords),
        functools.partial(attribution.generate, data, [{"y": 0}], **keywords),
        functools.partial(crp.explain, "intgrad", model, data, 0, **keywords),
    ]
    for call in calls:
        with untouched(model), pytest.raises(kind, match=message):
            call()


def test_inputs_know_their_form():
    for data in (IMAGE, (IMAGE, IDS), {"image": IMAGE, "ids": IDS}):
        inputs = Inputs.of(data)
        again = inputs.data
        assert type(again) is type(data) and len(inputs) == 2
        assert inputs.select([1]).explained[0].equal(IMAGE[1:])
        assert Inputs.of(inputs) is inputs
    with pytest.raises(TypeError, match=r"data\[1\] is torch.int64. Several inputs are a tuple or dict of them"):
        Inputs.of([IMAGE, IDS])


@pytest.mark.parametrize("samples", [[0, 1, 2, 3], [1, 2], [3], [2, 0], [1, 1]])
def test_samples_next_to_each_other_are_not_copied(samples):
    data = torch.rand(4, 3)
    chosen = Inputs.of((data, 7)).select(samples).data
    assert torch.equal(chosen[0], data[samples]) and chosen[1] == 7
    is_shared = chosen[0].untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
    assert is_shared == (samples in ([0, 1, 2, 3], [1, 2], [3]))


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("pixel_values", (2, 3, 4, 5), 1),
        ("pixel_values", (2, 6, 3, 4, 5), 2),  # frames of a video
        ("pixel_values_videos", (2, 6, 3, 4, 5), 2),
        ("pixel_values", (2, 1, 4, 3, 4, 5), 3),  # tiles of pictures
        ("pixel_values", (2, 7, 12), 2),  # patches
        ("input_values", (2,), None),
        ("input_values", (2, 9), None),  # waves
        ("input_values", (2, 1, 9), 1),
        ("input_values", (2, 2, 9), 1),
        ("input_values", (2, 9, 4), None),  # spectrograms
        ("input_features", (2, 4, 9), None),
        ("input_features", (2, 1, 4, 9), 1),
        ("inputs_embeds", (2, 7, 4), -1),
        ("values", (2, 9), 1),
    ],
)
def test_heatmaps_have_the_axes_of_pictures_videos_and_sounds(name, shape, axis):
    """By the names that models of Hugging Face give to their inputs; of others, channels are the second axis.

    What such a model says is its main input may be given without its name.
    """
    generator = torch.Generator().manual_seed(3)
    data, weight = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))

    class Named(nn.Module):
        main_input_name = name

        def forward(self, *given: Tensor, **inputs: Tensor) -> Tensor:
            return ((*given, *inputs.values())[0] * weight[:1]).reshape(len(data), -1).sum(1, keepdim=True)

    wanted = data * weight[:1]
    for given in ({name: data}, data, (data, None)):
        found = CondAttribution(Named().eval())(given, [{"y": 0}], GradientTimesInput()).heatmap
        assert close(found, wanted if axis is None else wanted.sum(axis))
