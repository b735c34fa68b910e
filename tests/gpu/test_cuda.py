"""On a GPU, the numbers are those of the CPU, and no backward pass waits for the device."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import FAMILIES
from grammar_programs import Roll, written
from model_grammar import GrammarNet
from preset_cases import LRP_PRESETS
from torch import Tensor, nn

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.concepts.fused import fused_scores
from crp.concepts.scores import scores_of
from crp.visualization import FeatureVisualization
from crp.visualization.table.fingerprint import fingerprint_model
from crp.visualization.table.ranking import top_k
from crp.visualization.table.store import Table

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NETS = {
    str(family): family
    for family in FAMILIES
    if family.name in ("vgg11_bn", "resnet18", "densenet121", "mobilenet_v2", "efficientnet_b0")
}
PRESETS = {
    name: LRP_PRESETS[name]
    for name in ("epsilon", "gamma", "alpha_beta", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat",
                 "epsilon_gamma_box", "deep_taylor", "excitation_backprop")
}  # fmt: skip
nets = pytest.mark.parametrize("net", NETS)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Without TF32, in which factors of float32 products have 10 bits."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    yield
    convolutions.allow_tf32, products.allow_tf32 = before


@lru_cache(maxsize=1)
def pair(net: str) -> tuple[nn.Module, nn.Module]:
    """The same net on the CPU and on the GPU, in float64."""
    model = NETS[net].build().requires_grad_(False)
    return model, copy.deepcopy(model).to(DEVICE)


def heatmap(model: nn.Module, data: Tensor, preset: str, conditions: list[dict[str, list[int]]]) -> Tensor:
    return CondAttribution(model)(data, conditions, PRESETS[preset]()).heatmap.cpu().double()


def deviation(found: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - exact).abs().max() / exact.abs().max())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Context in which an operation that makes the host wait raises an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("preset", PRESETS)
@nets
def test_float64_and_float32(net: str, preset: str) -> None:
    """float32 deviates from float64 no more than on the CPU, but for how errors add up."""
    model, on_gpu = pair(net)
    data, conditions = NETS[net].images(2), [{"y": [1]}]
    exact = heatmap(model, data, preset, conditions)
    assert float(exact.abs().max()) > 0
    assert deviation(heatmap(on_gpu, data.to(DEVICE), preset, conditions), exact) <= 1e-9
    narrow = heatmap(copy.deepcopy(model).float(), data.float(), preset, conditions)
    on_gpu = copy.deepcopy(on_gpu).float()
    found = heatmap(on_gpu, data.float().to(DEVICE), preset, conditions)
    assert deviation(found, exact) <= 10 * deviation(narrow, exact) + 1e-4


@pytest.mark.parametrize(
    "kind", [composites.EpsilonPlus, composites.AttnLRP, composites.UniformAlphaBeta, composites.DeepLift]
)
def test_random_models(kind: type[composites.Composite]) -> None:
    """What is known of a function is found out on the host: the same on any device, or refused on both."""

    def explained(model: nn.Module, data: Tensor) -> Tensor | type[Exception]:
        try:
            return CondAttribution(model)(data, [{"y": [0]}], kind()).heatmap.cpu()
        except Exception as error:
            return type(error)

    for seed in range(60):
        program = replace(written(Roll(seed)), store="buffer")
        model, data = GrammarNet(program).requires_grad_(False), program.data()
        exact = explained(model, data)
        with torch.device(DEVICE):  # (models make constants as they run)
            found = explained(copy.deepcopy(model).to(DEVICE), data.to(DEVICE))
        if isinstance(exact, Tensor) and isinstance(found, Tensor):
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9 * float(exact.abs().max()), msg=f"{seed=}")
        else:
            assert found is exact, f"{seed=}"


def test_an_index_on_the_device_takes_one_of_functions_side_by_side() -> None:
    class Gated(nn.Module):
        def __init__(self, softmax: bool) -> None:
            super().__init__()
            self.linear, self.softmax = nn.Linear(4, 4), softmax
            self.register_buffer("index", torch.tensor([0]))

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            both = torch.stack([x, torch.zeros_like(x)], -1).softmax(-1)
            return (both.index_select(-1, self.index)[..., 0] if self.softmax else x.sigmoid()) - 0.2

    torch.manual_seed(0)
    spelled, plain = (Gated(softmax).double().eval().to(DEVICE) for softmax in (True, False))
    plain.load_state_dict(spelled.state_dict())
    data = torch.randn(2, 4, dtype=torch.float64, device=DEVICE)
    found, exact = (CondAttribution(m)(data, [{"y": [1]}], composites.AttnLRP()).heatmap for m in (spelled, plain))
    assert exact.abs().max() > 0 and deviation(found, exact) <= 1e-9


@nets
def test_concepts(net: str) -> None:
    model, on_gpu = pair(net)
    data, conditions = NETS[net].images(), [{"y": [0], NETS[net].middle: [channel]} for channel in range(5)]
    rules = composites.EpsilonPlusFlat()

    def maps(model: nn.Module, data: Tensor) -> Tensor:
        parts = CondAttribution(model).generate(data, conditions, rules, batch_size=3, verbose=False)
        return torch.cat([part.heatmap.cpu() for part in parts])

    assert deviation(maps(on_gpu, data.to(DEVICE)), maps(model, data)) <= 1e-9


@nets
def test_backward_passes_wait_for_nothing(net: str) -> None:
    model, data = pair(net)[1].float(), NETS[net].images(2).float().to(DEVICE).requires_grad_()
    try:
        for preset, make in PRESETS.items():
            with make().context(model) as modified:
                output = modified(data)[:, 0].sum()
            (first,) = torch.autograd.grad(output, data, retain_graph=True)  # (weights are modified once)
            torch.cuda.synchronize()
            with no_waiting():
                (second,) = torch.autograd.grad(output, data)
            assert deviation(second, first) <= 1e-4, preset
    finally:
        pair.cache_clear()  # (float32 has rounded the weights)


class Images:
    """Images of a net, with labels."""

    def __init__(self, net: str) -> None:
        self._images = NETS[net].images(24)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], index % 3


@pytest.mark.parametrize("net", ["vgg11_bn", "resnet18"])
def test_mining(net: str, tmp_path: Path) -> None:
    """Ranks are the same to the last, and values to rounding."""
    tables = []
    for name, model in zip(("cpu", "gpu"), pair(net), strict=True):
        layers = [layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        channels = dict.fromkeys(layers, ChannelConcept())
        attribution = CondAttribution(model)
        found = FeatureVisualization(attribution, Images(net), channels, path=tmp_path / name)
        found.run(composites.EpsilonPlusFlat(), batch_size=4, progress=False)
        tables.append(Table.open(tmp_path / name))
    assert attribution._replayed.replays.replayed == 3  # (of six batches: one is learned from, two are computed)
    for layer in layers:
        for mode in ("relevance", "activation"):
            one, other = (top_k(table, layer, mode, k=6) for table in tables)
            np.testing.assert_allclose(other.value, one.value, rtol=1e-9, atol=1e-9 * np.abs(one.value).max())
            # Samples of equal value, such as 0, may be in any order.
            distinct = np.diff(one.value, axis=0, prepend=np.inf, append=-np.inf)
            alone = (np.abs(distinct[:-1]) > 1e-9) & (np.abs(distinct[1:]) > 1e-9)
            assert alone.mean() > 0.25
            np.testing.assert_array_equal(other.sample[alone], one.sample[alone])
            np.testing.assert_array_equal(other.position[alone], one.position[alone])


@nets
def test_channels_last(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout changes no number but by rounding, and recorded layers come in the usual one."""
    model, layer = pair(net)[1], NETS[net].middle
    monkeypatch.setattr("crp.engine.memory_layout._multiplies_matrices", lambda data: True)
    data, conditions = NETS[net].images(2).to(DEVICE), [{"y": [1]}]
    for preset, make in PRESETS.items():
        attribution, usual = CondAttribution(model), CondAttribution(model)
        attribution.replay = usual.replay = usual.channels_last = False
        found, exact = (each(data, conditions, make(), [layer]) for each in (attribution, usual))
        assert deviation(found.heatmap, exact.heatmap) <= 1e-9, preset
        assert deviation(found.relevances[layer], exact.relevances[layer]) <= 1e-9, preset
        assert found.relevances[layer].is_contiguous()


@pytest.mark.parametrize("net", ["vgg11_bn", "resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "excitation_backprop"])  # (starts from 1 / y)
def test_replays(net: str, preset: str) -> None:
    """A CUDA graph gives what the computation gives, for other data, targets and weights."""
    model = pair(net)[1]
    attribution, plain, rules = CondAttribution(model), CondAttribution(model), PRESETS[preset]()
    plain.replay = False
    generator = torch.Generator().manual_seed(0)
    data, layer = NETS[net].images(2).to(DEVICE), NETS[net].middle
    for number in range(7):
        if number == 5:
            with torch.no_grad():
                next(model.parameters()).mul_(1.25)
        images = data + torch.randn(data.shape, generator=generator, dtype=data.dtype).to(DEVICE)
        conditions = [{"y": [number]}, {"y": [2 * number]}]
        found, exact = (each(images, conditions, rules, [layer]) for each in (attribution, plain))
        assert deviation(found.heatmap, exact.heatmap) <= 1e-9
        assert deviation(found.relevances[layer], exact.relevances[layer]) <= 1e-9
    with torch.no_grad():
        next(model.parameters()).div_(1.25)
    assert attribution._replayed.replays.replayed == 2


def test_replays_of_concepts() -> None:
    model, layer = pair("resnet18")[1], "layer3.1.conv1"
    attribution, plain, rules = CondAttribution(model), CondAttribution(model), composites.EpsilonPlusFlat()
    plain.replay = False
    data = NETS["resnet18"].images().to(DEVICE)
    conditions = [{"y": [1], layer: [channel]} for channel in range(64)]
    maps = [
        torch.cat([part.heatmap for part in each.generate(data, conditions, rules, batch_size=8, verbose=False)])
        for each in (attribution, plain)
    ]
    assert deviation(*maps) <= 1e-9
    assert attribution._replayed.replays.replayed == 8 - 3


@pytest.mark.parametrize("net", ["vgg11_bn", "resnet18"])
def test_attributions_wait_for_nothing(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the forward pass to the heatmap, without and with replay, where no rule looks at signs of the input.

    A call waits twice beside: for whether its data are finite, before the model runs, and for whether the heatmap is.
    """
    monkeypatch.setattr("crp.engine.inputs.check_data", lambda *_: None)
    monkeypatch.setattr("crp.engine.call.check_result", lambda *_: None)
    model, data = pair(net)[1], NETS[net].images(2).to(DEVICE)
    for preset in ("epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat"):
        attribution, rules = CondAttribution(model), PRESETS[preset]()
        for number in range(6):
            torch.cuda.synchronize()
            if number in (1, 5):  # (once computed, and once replayed)
                with no_waiting():
                    attribution(data, [{"y": [number]}], rules)
            else:
                attribution(data, [{"y": [number]}], rules)
        assert attribution._replayed.replays.replayed == 3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_by_one_kernel(dtype: torch.dtype, channels_last: bool) -> None:
    """Sum, maximum and its first position of short and long layers, with ties and what is no number."""
    for shape in ((4, 8, 1, 1), (3, 70, 7, 7), (2, 33, 90, 90)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        values.view(-1)[::3] = 0
        values[0, 0], values[0, 1], values[1, 2, -1, -1] = -1, -torch.inf, torch.nan
        there = values.to(DEVICE)
        there = there.contiguous(memory_format=torch.channels_last) if channels_last else there
        assert fused_scores(there.flatten(2)) is not None
        found, exact = scores_of(there), scores_of(values)
        torch.testing.assert_close(found.position.cpu(), exact.position, rtol=0, atol=0)
        torch.testing.assert_close(found.max.cpu(), exact.max, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found.sum.cpu(), exact.sum, rtol=1e-5, atol=1e-3, equal_nan=True)
        assert found.sum.dtype == exact.sum.dtype


def test_a_replay_does_not_read_memory_that_is_gone() -> None:
    """Weights whose memory a user gave back, and took anew: the recording reads the old memory, which is not there."""
    model = pair("vgg11_bn")[1]
    attribution, plain, rules = CondAttribution(model), CondAttribution(model), composites.EpsilonPlusFlat()
    plain.replay = False
    data = NETS["vgg11_bn"].images(2).to(DEVICE)
    weight = next(model.parameters())
    kept = weight.detach().clone()
    for number in range(6):
        attribution(data + number, [{"y": [1]}], rules)
    assert attribution._replayed.replays.replayed == 3
    storage = weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    torch.cuda.empty_cache()
    filler = torch.full_like(kept, 7.0)
    storage.resize_(size)
    with torch.no_grad():
        weight.copy_(kept * 2)
    for number in range(4):
        found, exact = (each(data + number, [{"y": [2]}], rules).heatmap for each in (attribution, plain))
        assert deviation(found, exact) <= 1e-9
    assert filler.mean() == 7
    with torch.no_grad():
        weight.copy_(kept)


def test_fingerprints_are_those_of_the_host() -> None:
    model = nn.Sequential(nn.Conv2d(300, 600, 3), nn.Linear(1500, 1500))
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        assert fingerprint_model(copy.deepcopy(model).to(DEVICE)) == fingerprint_model(model)
