"""What looks unusual and is seen all the same: no false alarm, and the right value."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torchvision
from preset_cases import ACTIVATION_PRESETS, FEW, LRP_PRESETS, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F
from torchvision import ops

import crp.composites as composites
from crp.composites import EpsilonPlus, UniformLRP0

IMAGES = numbers(2, 4, 6, 6, seed=3)
BOXES = torch.tensor([[0, 0.5, 0.5, 4, 4], [1, 1, 0, 5, 3.5]], dtype=torch.float64)
GRID = numbers(2, 5, 5, 2, seed=5).tanh()
OFFSETS = 0.3 * numbers(2, 18, 6, 6, seed=6)


class Around(nn.Module):
    """Convolution, ReLU, a function, ReLU, mean over positions, dense layer; no biases: (n, 4, 6, 6) -> (n, 3)."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.fc, self.function = (
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.Linear(4, 3, bias=False),
            function,
        )

    def forward(self, x):
        h = self.function(F.relu(self.conv(x)))
        return self.fc(F.relu(h).reshape(len(h), 4, -1).sum(2))


def reduced(h, reduction):
    index = torch.tensor([2, 3, 0, 0])[:, None, None].expand_as(h)
    return torch.ones_like(h).scatter_reduce(1, index, h, reduction, include_self=False)


def set_items(h):
    out = torch.zeros_like(h)
    out[:, :2] = h[:, 2:]
    out[:, 2:, ::2] = 0.5 * h[:, :2, ::2]
    return out


def set_items_by_mask(h):
    out = h.clone()
    out[h > 0.5] = 0.0
    return out


def augmented(h):
    h = h.clone()
    h += h.flip(1)
    h[:, 0] *= 2.0
    h[:, 1] -= h[:, 2].clone()
    return h


def into(h):
    out = torch.empty_like(h)
    with torch.no_grad():
        flipped = torch.empty_like(h)
        torch.mul(h.detach(), 2.0, out=flipped)
    return torch.add(h, 0 * flipped, out=None) + 0 * out.fill_(0.0)


def through_data_classes(h):
    box = {"maps": [h, (h.flip(1), {"more": h.roll(1, 2)})]}
    first, (second, more) = box["maps"]
    return first + second - 0.3 * more["more"]


def filled(h):
    out = h.new_zeros(h.shape)
    for i in range(4):
        out.select(1, i).copy_(h[:, 3 - i])
    return out


def scattered(h):
    index = torch.arange(3, -1, -1).reshape(1, 4, 1, 1).expand_as(h)
    return torch.zeros_like(h).scatter_add(1, index, h)


def views(h):
    h = h.clone()
    flat = h.view(-1)
    flat[:5].mul_(2.0)
    return h


def rearranged(h):
    """As einops splits and joins axes."""
    n, _, y, x = h.shape
    h = h.reshape(n, 2, 2, y, x // 2, 2).permute(0, 5, 1, 2, 3, 4)
    return h.reshape(n, 2, 4, y, x // 2).sum(1)


def subclassed(h):
    return (2 * h.as_subclass(torch.Tensor)).contiguous(memory_format=torch.channels_last)


def complex_and_back(h):
    return torch.fft.ifft2(torch.fft.fft2(h) * torch.fft.fft2(numbers(1, 1, 6, 6))).real


#: Linear functions of maps, up to ReLU's like: gradient × input is LRP-0 through them.
def by_rows(h, reduce):
    """Of weighted channels, the largest or least one for each row of a sparse matrix."""
    weight = torch.tensor([[0.0, 1, 0, 2], [3, 0, 0, 1], [0, 0, 2, 0], [1, 2, 3, 0]], dtype=h.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (torch says once that they are new)
        weight = weight.to_sparse_csr()
    found = torch.sparse.mm(weight, h.permute(1, 0, 2, 3).flatten(1), reduce)
    return found.reshape(4, *h.shape[:1], *h.shape[2:]).permute(1, 0, 2, 3)


LINEAR = {
    "rearranged": rearranged,
    "einsum": lambda h: torch.einsum("bchw,cd->bdhw", h, numbers(4, 4)),
    "transposed_property": lambda h: (h.mT + h.permute(*range(h.dim())).mT).mT,
    "property_H": lambda h: h.mH.mH,
    "property_T": lambda h: h.flatten(1).T.T.reshape(h.shape),
    "real": lambda h: h.real + torch.view_as_real(torch.complex(h, 2 * h))[..., 1],
    "imag": lambda h: torch.complex(h, 0.5 * h).imag,
    "fft": complex_and_back,
    "rfft": lambda h: torch.fft.irfft2(torch.fft.rfft2(h), s=h.shape[2:]),
    "set_items": set_items,
    "set_items_by_mask": set_items_by_mask,
    "augmented": augmented,
    "into": into,
    "structures": through_data_classes,
    "filled": filled,
    "scattered": scattered,
    "gathered": lambda h: h.gather(1, torch.arange(4).flip(0).reshape(1, 4, 1, 1).expand_as(h)),
    "take_along": lambda h: torch.take_along_dim(h, h.argsort(1), 1),
    "sorted": lambda h: h.sort(1, descending=True).values,
    "medians": lambda h: torch.stack(
        [h.median(1).values, h.kthvalue(2, 1)[0], h.nanmedian(1)[0], h.msort().median().expand_as(h[:, 0])], 1
    ),
    "topk": lambda h: torch.cat([h.topk(2, 1).values, h.topk(2, 1, largest=False)[0]], 1),
    "views": views,
    "unbound": lambda h: torch.stack([*h.unbind(1)][::-1], 1),
    "split": lambda h: torch.cat(torch.split(h, [1, 3], 1)[::-1], 1),
    "chunks": lambda h: sum(torch.cat([a, a], 1) for a in h.chunk(2, 1)),
    "tensor_split": lambda h: torch.cat(torch.tensor_split(h, 3, 1), 1),
    "meshed": lambda h: torch.cat(torch.broadcast_tensors(h[:, :1], h[:, 1:]), 1)[:, :4],
    "where": lambda h: torch.where(h > 0.3, h, 0.1 * h),
    "masked": lambda h: h.masked_fill(h > 0.8, 0.0),
    "grid_sample": lambda h: F.grid_sample(h, GRID, align_corners=False),
    "affine_grid": lambda h: F.grid_sample(
        h, F.affine_grid(numbers(2, 2, 3), [2, 4, 5, 5], False), align_corners=False
    ),
    "interpolate": lambda h: F.interpolate(h, (7, 5), mode="bicubic"),
    "roi_align": lambda h: ops.roi_align(h, BOXES, 3, aligned=True),
    "roi_pool": lambda h: ops.roi_pool(h, BOXES, 2),
    "deform_conv": lambda h: ops.deform_conv2d(h, OFFSETS, numbers(4, 4, 3, 3), padding=1),
    "unfolded": lambda h: h.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)),
    "as_strided": lambda h: h.contiguous().as_strided((2, 4, 3, 6), (144, 36, 12, 1)),
    "diagonal": lambda h: h.diagonal(dim1=2, dim2=3),
    "index_add": lambda h: torch.zeros_like(h).index_add(1, torch.tensor([2, 3, 0, 0]), h),
    "scatter_reduce": lambda h: reduced(h, "mean"),
    "fmax": lambda h: torch.fmax(h, h.flip(1)),
    "hypot": lambda h: torch.hypot(h + 0.0, h.flip(1) * 0.5),
    "index_select": lambda h: h.index_select(1, torch.tensor([2, 3, 0, 0])),
    "fancy": lambda h: h[:, torch.tensor([3, 1, 1, 0])][..., [0, 2]],
    "cumulated": lambda h: h.cumsum(2) / 3,
    "vector": lambda h: h * torch.linspace(0.5, 1, 4, dtype=h.dtype)[:, None, None],
    "norms": lambda h: h / 3.0,
    "subclass": subclassed,
    "partial": lambda h: functools.partial(torch.add, h)(other=h, alpha=-0.5),
    "hooked": lambda h: (h.requires_grad and h.register_hook(lambda g: None), h)[1] * 1.0,
    "no_op": lambda h: h.to(h.dtype).contiguous().requires_grad_(h.requires_grad),
    "autocast": lambda h: torch.amp.autocast("cpu", enabled=False)(lambda t: 2 * t)(h),
    "nested_functions": lambda h: F.dropout(F.pixel_unshuffle(F.pixel_shuffle(h, 2), 2), 0.5, False),
    "pooled": lambda h: F.max_pool2d(h, 2) + F.avg_pool2d(h, 2) + F.adaptive_avg_pool2d(h, 3),
    "pooled_with_indices": lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
    "sparse": lambda h: torch.sparse.mm(torch.eye(4, dtype=h.dtype).to_sparse(), h.permute(1, 0, 2, 3).flatten(1))
    .reshape(4, 2, 6, 6).permute(1, 0, 2, 3),
    "sparse_largest": lambda h: by_rows(h, "amax"),
    "sparse_least": lambda h: by_rows(h, "amin"),
    "sparse_entries": lambda h: torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 1, 3], [2, 0, 3, 1]]), h.transpose(0, 1), (4, 4, *h[:, 0].shape), check_invariants=True
    ).coalesce().to_dense().sum(1).transpose(0, 1),
    "as_tensor": lambda h: torch.as_tensor(h),
    "packed": lambda h: nn.utils.rnn.pad_packed_sequence(
        nn.utils.rnn.pack_padded_sequence(h.flatten(2), [3, 4], batch_first=True, enforce_sorted=False),
        batch_first=True,
    )[0].unflatten(2, h.shape[2:]),
    "padded": lambda h: nn.utils.rnn.pad_sequence([h[0, :2], h[1]], batch_first=True),
    "module_list": lambda h: functools.reduce(lambda t, layer: layer(t), nn.ModuleList([nn.ReLU(), nn.Identity()]), h),
    "functional_call": lambda h: torch.func.functional_call(
        nn.Conv2d(4, 4, 1, bias=False).double(), {"weight": numbers(4, 4, 1, 1)}, (h,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.filterwarnings("ignore:.*no rule for:UserWarning")
def test_lrp_0_without_biases_is_gradient_times_input(name):
    """Ancona et al., ICLR 2018, proposition 1: a value by autograd alone."""
    model = seeded(Around(LINEAR[name]))
    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert gradient.abs().max() > 0
    assert off(maps(model, IMAGES, UniformLRP0()), gradient * IMAGES) <= 1e-9


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", [*LRP_PRESETS, *ACTIVATION_PRESETS])
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.filterwarnings("ignore:.*no rule for:UserWarning", "ignore:outside DeepLIFT", "ignore:DeepLift finds")
def test_there_is_no_false_alarm(name, preset):
    model = seeded(Around(LINEAR[name]))
    composite = {**LRP_PRESETS, **ACTIVATION_PRESETS}[preset]()
    assert maps(model, IMAGES, composite).isfinite().all()
    with composite.context(model):
        predicted = model(IMAGES.clone().requires_grad_()).detach()
    assert off(predicted, model(IMAGES).detach()) <= 1e-12


OF_DEGREE_ONE = ["sorted", "topk", "medians", "fft", "scatter_reduce", "fmax", "hypot"]
OF_DEGREE_ONE += ["sparse_largest", "sparse_entries", "as_tensor", "packed", "padded"]


@pytest.mark.parametrize("name", OF_DEGREE_ONE)
def test_functions_of_degree_one_are_known_to_be(name):
    maps(seeded(Around(LINEAR[name])), IMAGES, EpsilonPlus())  # (warnings are errors)


def test_products_of_what_an_index_puts_at_one_place_have_no_rule():
    with pytest.warns(UserWarning, match=r"EpsilonPlus has no rule for scatter_reduce\(\)"):
        maps(seeded(Around(lambda h: reduced(h, "prod"))), IMAGES, EpsilonPlus())


class Recurrent(nn.Module):
    """Recurrent layer of torch over (n, 5, 6), packed or not, and a dense layer: (n, 3)."""

    def __init__(self, kind, packed=False, **settings):
        super().__init__()
        self.rnn, self.fc = kind(6, 4, batch_first=True, **settings), nn.LazyLinear(3)
        self.packed = packed

    def forward(self, x):
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        out, _ = self.rnn(x)
        if self.packed:
            out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return self.fc(out.relu().mean(1))


class Cells(nn.Module):
    """The same by a cell of torch for each step."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.fc = cell(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc((state[0] if isinstance(state, tuple) else state).relu())


RECURRENT = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm_of_two_layers": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_packed": lambda: Recurrent(nn.LSTM, packed=True),
    "gru": lambda: Recurrent(nn.GRU),
    "gru_packed": lambda: Recurrent(nn.GRU, packed=True, bidirectional=True),
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm_cell": lambda: Cells(nn.LSTMCell),
    "gru_cell": lambda: Cells(nn.GRUCell),
    "rnn_cell": lambda: Cells(nn.RNNCell),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", [*FEW, *ACTIVATION_PRESETS])
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.filterwarnings("ignore:.*no rule for:UserWarning", "ignore:outside DeepLIFT")
def test_recurrent_layers_raise_no_false_alarm(name, preset):
    data = numbers(2, 5, 6)
    model = RECURRENT[name]().double()
    model(data)
    composite = {**FEW, **ACTIVATION_PRESETS}[preset]()
    assert maps(seeded(model), data, composite).isfinite().all()


NETS = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=3),
    "densenet": lambda: torchvision.models.densenet._densenet(4, (2, 2), 8, None, False, num_classes=3),
    "densenet_checkpointed": lambda: torchvision.models.densenet._densenet(
        4, (2, 2), 8, None, False, num_classes=3, memory_efficient=True
    ),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=3),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=3),
    "regnet": lambda: torchvision.models.regnet_y_400mf(num_classes=3),
    "convnext": lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(8, 16, 1), torchvision.models.convnext.CNBlockConfig(16, None, 1)],
        num_classes=3,
    ),
    "lraspp": lambda: Segmentation(torchvision.models.segmentation.lraspp_mobilenet_v3_large),
}


class Segmentation(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.net = make(weights=None, weights_backbone=None, num_classes=3)

    def forward(self, x):
        return self.net(x)["out"].mean((2, 3))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:outside DeepLIFT")
def test_nets_of_torchvision_raise_no_false_alarm(name, untouched):
    model, data = seeded(NETS[name]()), numbers(1, 3, 32, 32)
    for composite in (EpsilonPlus(), composites.get("excitation_backprop"), composites.get("deeplift")):
        with untouched(model):
            assert maps(model, data, composite).isfinite().all()
