"""Results are told sample by sample: of a model that predicts samples together, a batch is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import crp
from crp.attribution import CondAttribution
from crp.attributors import IntegratedGradients, Occlusion, ShapleySampling
from crp.audit.intervening import intervene
from crp.composites import Composite, EpsilonPlus, GradientTimesInput
from crp.concepts import AxisConcept, ChannelConcept
from crp.engine.attached import put_on
from crp.engine.forward import get_output_shapes, record_outputs
from crp.errors import CRPError
from crp.metrics import pixel_flipping
from crp.visualization import Table, Texts
from crp.visualization.mining.run import mine
from crp.visualization.objectives import channel
from crp.visualization.synthesis import maximize

LINEAR = {"y": 1}
#: Samples of each forward pass, kept where no model is put back.
SIZES: list[int] = []
#: Ways to put a hook on a module.
REGISTERING = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
MIXED = "depends on the samples beside it"
DRAWN = "Net puts out something else of the same data at another call, as by random numbers"


class Net(nn.Module):
    """A net that does something to its features; ``returned`` makes what it returns of its scores."""

    def __init__(self, between: Callable[[Tensor], Tensor], returned: Callable[[Tensor], Any] = lambda scores: scores):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.between, self.returned = between, returned
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        SIZES.append(len(x))
        return self.returned(self.fc(self.between(self.conv(x).relu()).mean((2, 3))))


class Echo(nn.Module):
    """Adds something of the call before."""

    last = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.last
        self.last = float(x.detach().mean())
        return x


class Several(nn.Module):
    """Batch norm of vectors, which cannot be computed of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, track_running_stats=False).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mean((2, 3)))[:, :, None, None]


class Experts(nn.Module):
    """Sends samples through an expert that takes so many of a batch, and passes the others by."""

    def forward(self, x: Tensor) -> Tensor:
        order = (x.detach().mean((2, 3)) @ torch.linspace(-1, 1, 8, dtype=x.dtype)).argsort()
        taken = torch.zeros(len(x), 1, 1, 1, dtype=x.dtype)
        taken[order[: max(len(x) // 2, 1)]] = 1
        return x + 2 * x * taken


def batch_norm() -> nn.Module:
    return nn.BatchNorm2d(8, track_running_stats=False).double().eval()


MIXING = {
    "mean": lambda: lambda x: x - x.mean(0, keepdim=True),
    "softmax over samples": lambda: lambda x: x * x.softmax(0),
    "batch norm": batch_norm,
    "experts with places": Experts,
    "sum of all before": lambda: lambda x: x.cumsum(0),
    "sum of all behind": lambda: lambda x: x.flip(0).cumsum(0).flip(0),
    "turned round": lambda: lambda x: x.flip(0),
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_model_that_takes_several_samples_only_is_refused(images: Tensor) -> None:
    attribution = CondAttribution(Net(Several()))
    with pytest.raises(CRPError, match=MIXED):
        attribution(images, [LINEAR], EpsilonPlus())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        attribution(images[:1], [LINEAR], EpsilonPlus())


@pytest.mark.promise("Input", "A batch is refused whose samples the model does not predict one by one")
@pytest.mark.parametrize("composite", [EpsilonPlus(), GradientTimesInput(), None], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("kind", MIXING)
def test_a_batch_is_refused_and_one_sample_is_explained(
    images: Tensor, kind: str, composite: Composite | None, untouched: Callable[[nn.Module], Any]
) -> None:
    model = Net(MIXING[kind]())
    attribution = CondAttribution(model)
    with untouched(model):
        with pytest.raises(CRPError, match=MIXED):
            attribution(images, [LINEAR], composite)
        with pytest.raises(CRPError, match=MIXED):
            attribution(images[:1].expand(3, -1, -1, -1), [LINEAR], composite)
        alone = [attribution(image[None], [LINEAR, {"y": 2}], composite).heatmap[0] for image in images]
        parts = attribution.generate(images, [LINEAR], composite, batch_size=1, verbose=False)
        assert all(torch.equal(part.heatmap[0], heatmap) for part, heatmap in zip(parts, alone, strict=True))
        with pytest.raises(CRPError, match=MIXED):
            list(attribution.generate(images, [LINEAR], composite, batch_size=2, verbose=False))


def test_rows_of_one_sample_with_columns_of_their_own_are_refused(images: Tensor) -> None:
    attribution = CondAttribution(Net(batch_norm()))
    conditions = [{"y": 1, "conv": [0]}, {"y": 1, "conv": [1]}]
    attribution(images[:1], conditions, EpsilonPlus())
    with pytest.raises(CRPError, match=MIXED):
        attribution(images[:1], conditions, EpsilonPlus(), exclude_parallel=False)


def test_what_layers_keep_is_refused_too(images: Tensor) -> None:
    with pytest.raises(CRPError, match=MIXED):
        CondAttribution(Net(batch_norm())).absorbed(images, [LINEAR], EpsilonPlus())


class Pairs(nn.Module):
    """Similarities of pictures and texts, as CLIP returns them: (pictures, texts), and (texts, pictures)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.words = Net(nn.Identity()), nn.Embedding(9, 5).double()

    def forward(self, pictures: Tensor, ids: Tensor) -> dict[str, Tensor]:
        pictures, texts = self.net(pictures), self.words(ids).mean(1)
        return {"per_picture": pictures @ texts.T, "per_text": texts @ pictures.T}


def test_of_tables_of_similarities_those_are_refused_that_are_another_samples(images: Tensor) -> None:
    model, data = Pairs().eval(), {"pictures": images, "ids": torch.arange(8).reshape(4, 2)}
    per_picture, per_text = (
        CondAttribution(model, output=lambda found, name=name: found[name]) for name in ("per_picture", "per_text")
    )
    for _ in range(2):
        heatmaps = per_picture(data, [LINEAR], GradientTimesInput()).heatmap
        with pytest.raises(CRPError, match=MIXED):
            per_text(data, [LINEAR], GradientTimesInput())
    one = {"pictures": images[1:2], "ids": data["ids"][1:2]}
    for attribution in (per_picture, per_text):
        assert torch.allclose(attribution(one, [{"y": 0}], GradientTimesInput()).heatmap[0], heatmaps[1])


def test_the_message_names_the_layer_and_the_way_out(images: Tensor) -> None:
    model = Net(batch_norm())
    with pytest.raises(CRPError, match=r"(?s)Net.*'between' normalizes by the batch \(no running.*batch_size=1"):
        CondAttribution(model)(images, [LINEAR], EpsilonPlus())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Occlusion(model, window_shape=5, step=5),
        lambda model: ShapleySampling(model, samples=1),
        lambda model: IntegratedGradients(model, steps=2),
    ],
    ids=["occlusion", "shapley", "integrated gradients"],
)
def test_variants_of_one_sample_are_refused_together(images: Tensor, make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(CRPError, match=MIXED):
        make(Net(batch_norm()))(images[:1], 1)
    attributor = make(Net(batch_norm()))
    attributor.batch_size = 1
    assert attributor(images[:1], 1)[1].isfinite().all()


def test_metrics_refuse(images: Tensor) -> None:
    with pytest.raises(CRPError, match=MIXED):
        pixel_flipping(Net(batch_norm()), images, 1, relevance=images.sum(1))


@pytest.mark.parametrize("start", [None, torch.rand(1)], ids=["zeros", "random"])
def test_pictures_are_not_maximized_together(start: Tensor | None) -> None:
    with pytest.raises(CRPError, match=MIXED):
        maximize(Net(batch_norm()), channel("conv", [0, 1]), (2, 3, 10, 10), start=start, steps=1, verbose=False)


def test_interventions_are_refused_together(images: Tensor) -> None:
    attribution = CondAttribution(Net(batch_norm()))
    with pytest.raises(CRPError, match=MIXED):
        intervene(attribution, images, "conv", ChannelConcept(), [0], [1] * 4, scale=0.0)
    intervene(attribution, images[:1], "conv", ChannelConcept(), [0], [1], scale=0.0)


class Graph(nn.Module):
    """Scores of each of seven nodes, from those before; the edges are fixed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.edges = nn.Linear(3, 4), (torch.arange(7), torch.arange(7).roll(1))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return torch.zeros_like(h).index_add(-2, self.edges[0], h[..., self.edges[1], :])


@pytest.mark.promise("Input", "The nodes of a fixed graph are refused as samples")
def test_nodes_of_a_graph_that_are_taken_for_samples_are_refused() -> None:
    data = torch.randn(7, 3, dtype=torch.float64)
    with pytest.raises(CRPError, match=rf"{MIXED} .*; the nodes of a graph are one$"):
        CondAttribution(Graph())(data, [LINEAR], EpsilonPlus())
    of_node = CondAttribution(Graph())(data[None], [{"y": [(4, 1)]}], EpsilonPlus())
    assert of_node.prediction.shape == (1, 7, 4)


class StepsFirst(nn.Module):
    def __init__(self, gives_all: bool) -> None:
        super().__init__()
        self.gives_all, self.recurrent, self.fc = gives_all, nn.LSTM(8, 6), nn.Linear(6, 3)

    def forward(self, series: Tensor) -> Any:
        steps = self.recurrent(series)[0]
        return (self.fc(steps[-1]), steps) if self.gives_all else self.fc(steps[-1])


@pytest.mark.promise("Input", "Steps are not taken for samples where a model has as many of both")
@pytest.mark.parametrize("gives_all", [False, True])
@pytest.mark.parametrize("n", [2, 4, 5])
def test_as_many_steps_as_samples_are_told_apart(n: int, gives_all: bool) -> None:
    attribution = CondAttribution(StepsFirst(gives_all).eval(), output=itemgetter(0) if gives_all else None)
    with pytest.raises(ValueError, match=MIXED + ".* Samples are along the first axis"):
        attribution(torch.randn(n, n, 8), [{"y": 1}] * n, EpsilonPlus())


def test_a_sample_of_zeros_tells_too(images: Tensor) -> None:
    with pytest.raises(CRPError, match=MIXED):
        CondAttribution(Net(batch_norm()))(torch.cat([images[:1] * 0, images]), [LINEAR], EpsilonPlus())


@pytest.mark.promise("Input", "Mining refuses models that keep something of a call for the next one")
@pytest.mark.parametrize("modes", [("relevance", "activation"), ("activation",)], ids=len)
@pytest.mark.parametrize(("between", "message"), [(batch_norm, MIXED), (Echo, "given the same sample again")])
def test_mining_refuses_before_a_file_is_written(
    images: Tensor, tmp_path: Path, between: Callable[[], Any], message: str, modes: tuple[str, ...]
) -> None:
    pairs = [(image, i % 5) for i, image in enumerate(images)]
    options: dict[str, Any] = {"modes": modes, "progress": False}
    layers = {"conv": ChannelConcept()}
    with pytest.raises(CRPError, match=message):
        mine(CondAttribution(Net(between())), pairs, layers, EpsilonPlus(), tmp_path / "t", batch_size=2, **options)
    assert not (tmp_path / "t").exists()


class Words(nn.Module):
    """A net of texts that does something to the embeddings: (n, 5)."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.fc, self.between = nn.Embedding(9, 8), nn.Linear(8, 5), between
        self.double().eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.fc(self.between(self.words(input_ids)).mean(1))


@pytest.mark.parametrize("modes", [("relevance", "activation"), ("activation",)], ids=len)
@pytest.mark.parametrize(
    ("between", "message"),
    [(lambda: lambda x: x - x.mean(0, keepdim=True), MIXED), (Echo, "given the same sample again")],
    ids=["mixed", "kept"],
)
def test_mining_of_texts_refuses_before_a_file_is_written(
    tmp_path: Path, modes: tuple[str, ...], between: Callable[[], Any], message: str
) -> None:
    texts, layers = Texts([[1, 2, 3], [4, 5, 6], [8, 0, 1]]), {"fc": AxisConcept(-1)}
    options: dict[str, Any] = {"modes": modes, "targets": [1], "progress": False}
    with pytest.raises(CRPError, match=message):
        mine(CondAttribution(Words(between())), texts, layers, EpsilonPlus(), tmp_path / "t", batch_size=2, **options)
    assert not (tmp_path / "t").exists()
    mine(CondAttribution(Words(lambda x: x)), texts, layers, EpsilonPlus(), tmp_path / "t", batch_size=2, **options)


def test_mining_one_by_one_is_each_alone(images: Tensor, tmp_path: Path) -> None:
    pairs = [(image, i % 5) for i, image in enumerate(images)]
    attribution = CondAttribution(Net(batch_norm()))
    mine(attribution, pairs, {"conv": ChannelConcept()}, EpsilonPlus(), tmp_path, batch_size=1, progress=False)
    found = Table.open(tmp_path).column("conv", 3, "relevance", "sum").value
    for i, image in enumerate(images):
        alone = attribution(image[None], [{"y": [i % 5]}], EpsilonPlus(), ["conv"]).relevances["conv"]
        assert float(found[i]) == pytest.approx(float(alone[0, 3].sum()), rel=1e-12)


def test_known_models_are_run_once_for_each_part(images: Tensor) -> None:
    model = Net(lambda x: x)
    SIZES.clear()
    CondAttribution(model)(images, [LINEAR], EpsilonPlus())
    assert SIZES == [4, 4, 4]
    CondAttribution(model)(images, [LINEAR], EpsilonPlus())
    assert SIZES == [4, 4, 4, 4]


def test_one_sample_needs_no_further_pass(images: Tensor) -> None:
    SIZES.clear()
    CondAttribution(Net(lambda x: x))(images[:1], [LINEAR, {"y": 2}], EpsilonPlus())
    assert SIZES == [1]


def test_hooks_of_others_see_their_calls_only(images: Tensor) -> None:
    model, seen = Net(lambda x: x), list[int]()
    with torch.no_grad():
        handle = model.conv.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    CondAttribution(model)(images, [LINEAR], EpsilonPlus())
    handle.remove()
    assert seen == [4]


@pytest.mark.promise("Input", "Hooks of a user's own, as those that log, switch off no check of a model")
@pytest.mark.parametrize("on_all", [False, True], ids=["of a layer", "of all modules"])
@pytest.mark.parametrize("register", REGISTERING)
def test_models_with_hooks_are_looked_at_without_them(
    images: Tensor,
    register: str,
    on_all: bool,
    untouched: Callable[[nn.Module], Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    calls: list[str] = []

    def log(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Conv2d):
            calls.append(register)

    def hooked(between: Callable[[Tensor], Tensor]) -> nn.Module:
        model = Net(between)
        if not on_all:
            getattr(model.conv, register)(log)
        return model

    if on_all:
        handle = getattr(nn.modules.module, register.replace("register_", "register_module_"))(log)
        request.addfinalizer(handle.remove)

    mixing, drawing = hooked(MIXING["mean"]()), hooked(Noise())
    with untouched(mixing), pytest.raises(CRPError, match=MIXED):
        CondAttribution(mixing)(images, [LINEAR], EpsilonPlus())
    with untouched(drawing), pytest.warns(UserWarning, match=DRAWN):
        CondAttribution(drawing)(images, [LINEAR], EpsilonPlus())
    assert calls == 2 * [register]
    pairs = [(image, 0) for image in images]
    with pytest.raises(CRPError, match="given the same sample again"):
        mine(CondAttribution(hooked(Echo())), pairs, {"conv": ChannelConcept()}, EpsilonPlus(), tmp_path)


def test_a_composite_on_the_model_switches_no_check_off(images: Tensor) -> None:
    model, composite = Net(batch_norm()), EpsilonPlus()
    with composite.context(model), pytest.raises(CRPError, match=MIXED):
        CondAttribution(model)(images, [LINEAR], composite)


def test_a_default_device_switches_no_check_off(images: Tensor) -> None:
    """`torch.set_default_device` is a mode of torch, as this context is."""
    with torch.device("cpu"), pytest.raises(CRPError, match=MIXED):
        CondAttribution(Net(batch_norm()))(images, [LINEAR], EpsilonPlus())


class Keeping(Net):
    """Predicts from what a hook of its own has kept."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__(between)
        self.conv.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        return self.fc(self.between(self.kept).mean((2, 3)))


def test_hooks_of_the_model_itself_are_a_part_of_it(images: Tensor) -> None:
    CondAttribution(Keeping(nn.ReLU()))(images, [LINEAR], EpsilonPlus())
    with pytest.raises(CRPError, match=MIXED):
        CondAttribution(Keeping(batch_norm()))(images, [LINEAR], EpsilonPlus())


def test_the_model_is_put_back(images: Tensor) -> None:
    """Looking is no call: what a model keeps is of the call that was asked for."""
    model, other = (Net(Echo()) for _ in range(2))
    CondAttribution(model)(images, [LINEAR], EpsilonPlus())
    other(images)
    assert model.between.last == other.between.last


# --- what is not the same again -------------------------------------------------------------------------------------


class Noise(nn.Module):
    """Draws numbers in evaluation mode."""

    def __init__(self, draw: Callable[[], Any] = lambda: torch.rand(1)) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.draw())


class Private(nn.Module):
    """Draws numbers from a generator of its own."""

    def __init__(self, generator: Any, draw: Callable[[Any], Any] = lambda generator: generator.random()) -> None:
        super().__init__()
        self.held, self.draw = [generator], draw

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.draw(self.held[0]))


def drawing_from(generator: random.Random) -> Callable[[Tensor], Tensor]:
    """A function with a generator around it."""
    return lambda x: x * generator.random()


DRAWING = {
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=True),
    "torch": Noise(),
    "Python": Noise(random.random),
    "NumPy": Noise(np.random.rand),
    "own of torch": Private(torch.Generator(), lambda generator: torch.rand(1, generator=generator)),
    "own of Python": Private(random.Random(0)),
    "own of NumPy": Private(np.random.default_rng(0)),
    "own of NumPy, older": Private(np.random.RandomState(0)),
    "around a function": drawing_from(random.Random(0)),
    "of the system": Private(random.SystemRandom()),
}


@pytest.mark.promise(
    "Input", "A warning says so where a model draws random numbers, by which results differ from call to call"
)
@pytest.mark.parametrize("n_samples", [1, 4])
@pytest.mark.parametrize("composite", [EpsilonPlus(), None], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("draw", DRAWING)
def test_random_numbers_in_evaluation_mode_are_told_once(
    images: Tensor, n_samples: int, composite: Composite | None, draw: str, untouched: Callable[[nn.Module], Any]
) -> None:
    model = Net(DRAWING[draw])
    attribution = CondAttribution(model)
    with untouched(model), pytest.warns(UserWarning, match=DRAWN):
        one = attribution(images[:n_samples], [LINEAR], composite)
    assert not torch.equal(one.heatmap, attribution(images[:n_samples], [LINEAR], composite).heatmap)


def test_methods_and_mining_tell_random_numbers_too(images: Tensor, tmp_path: Path) -> None:
    pairs, concepts = [(image, i % 5) for i, image in enumerate(images)], {"conv": ChannelConcept()}
    for noise in (Noise(), Private(random.Random(0))):
        with pytest.warns(UserWarning, match=DRAWN):
            Occlusion(Net(noise), window_shape=5, step=5)(images, 1)
        with pytest.warns(UserWarning, match=DRAWN):
            CondAttribution(Net(noise)).absorbed(images[:1], [LINEAR], EpsilonPlus())
        with pytest.warns(UserWarning, match=DRAWN):
            attribution, folder = CondAttribution(Net(noise)), tmp_path / type(noise).__name__
            mine(attribution, pairs, concepts, EpsilonPlus(), folder, progress=False)


def test_an_own_generator_that_is_not_drawn_from_is_not_told(images: Tensor) -> None:
    CondAttribution(Net(Private(random.Random(0), lambda _: 1)))(images, [LINEAR], EpsilonPlus())


def test_random_numbers_that_change_nothing_are_not_told(images: Tensor) -> None:
    SIZES.clear()
    attribution = CondAttribution(Net(lambda x: x + 0 * torch.rand_like(x)))
    for _ in range(2):
        attribution(images[:1], [LINEAR], EpsilonPlus())
    assert SIZES == [1, 1, 1, 1]


class Padded(nn.Module):
    """An encoder of texts, of which padding is a part in the mean, or is not: (n, 5)."""

    def __init__(self, over_all: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.fc, self.over_all = nn.TransformerEncoder(block, 2), nn.Linear(8, 5), over_all
        self.double().eval()

    def forward(self, steps: Tensor, padding: Tensor) -> Tensor:
        steps = self.encoder(steps, src_key_padding_mask=padding)
        kept = torch.ones_like(padding) if self.over_all else ~padding
        return self.fc((steps * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))


STEPS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize("composite", [EpsilonPlus(), None], ids=lambda c: type(c).__name__)
def test_padding_that_counts_with_gradients_only_is_told(
    composite: Composite | None, untouched: Callable[[nn.Module], Any]
) -> None:
    model = Padded(over_all=True)
    data = {"steps": STEPS, "padding": PADDING}
    with untouched(model), pytest.warns(UserWarning, match="without gradients .*'encoder'.* zeros of padded positions"):
        found = CondAttribution(model)(data, [LINEAR], composite)
    assert torch.allclose(found.prediction, model(**data))
    CondAttribution(model)(data, [LINEAR], composite)


def test_padding_that_counts_nowhere_needs_no_word() -> None:
    model, data = Padded(over_all=False), {"steps": STEPS, "padding": PADDING}
    with torch.no_grad():
        predicted = model(**data)
    assert torch.allclose(CondAttribution(model)(data, [LINEAR], EpsilonPlus()).prediction, predicted)


def test_layers_of_padded_encoders_are_seen_without_gradients() -> None:
    """Where torch makes nested tensors of them, whose shape nobody can ask for."""
    model, data, layers = Padded(True), {"steps": STEPS, "padding": PADDING}, ["encoder.layers.0", "encoder"]
    assert get_output_shapes(model, data, layers) == dict.fromkeys(layers, torch.Size([5, 8]))
    with put_on(None, model):
        outputs = record_outputs(model, lambda model: model(**data), 2, layers)
    with pytest.warns(UserWarning, match="zeros of padded"):
        activations = CondAttribution(model)(data, [LINEAR], EpsilonPlus(), layers).activations
    assert all(torch.allclose(outputs[layer], activations[layer]) for layer in layers)


# --- what must not be refused ---------------------------------------------------------------------------------------


class OnlyPairs(nn.Module):
    """Takes an even number of samples, as models with a fixed batch do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, *x.shape[1:]).flatten(0, 1)


def as_boxes(scores: Tensor) -> list[dict[str, Tensor]]:
    return [{"scores": row, "labels": torch.arange(5)} for row in scores]


@pytest.mark.parametrize(
    ("between", "returned"),
    [
        (OnlyPairs(), lambda scores: scores),
        (Echo(), lambda scores: scores),
        (nn.Identity(), lambda scores: {"logits": scores, "loss": scores.mean(), "table": scores @ scores.T}),
        (nn.Identity(), lambda scores: {"logits": scores, "limits": scores.amax(0)}),
        (nn.Identity(), lambda scores: {"logits": scores, "state": [scores[0], scores[:1]]}),
        (nn.Identity(), lambda scores: {"logits": scores.where(torch.arange(5) != 3, -torch.inf)}),
    ],
    ids=["pairs", "state", "means and tables", "over samples", "lists", "infinite"],
)
def test_models_that_are_no_mixture_are_explained(
    images: Tensor, between: nn.Module, returned: Callable[[Tensor], Any]
) -> None:
    attribution = CondAttribution(Net(between, returned))
    state = torch.get_rng_state()
    assert attribution(images, [LINEAR], EpsilonPlus()).heatmap.any()
    torch.set_rng_state(state)
    before = torch.rand(1)
    torch.set_rng_state(state)
    attribution(images, [LINEAR], EpsilonPlus())
    assert torch.equal(torch.rand(1), before)


def test_outputs_in_a_list_are_told_apart(images: Tensor) -> None:
    def explain(between: Callable[[Tensor], Tensor]) -> Tensor:
        output = lambda returned: torch.stack([entry["scores"] for entry in returned])  # noqa: E731
        return crp.explain("gradient_x_input", Net(between, as_boxes), images, 1, output=output)

    assert explain(lambda x: x).any()
    with pytest.raises(CRPError, match=MIXED):
        explain(batch_norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_short_numbers_is_no_mixture(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(12)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    data = torch.randn(5, 3, 24, 24, dtype=dtype)
    assert CondAttribution(model.to(dtype).eval())(data, [LINEAR], EpsilonPlus()).heatmap.isfinite().all()
