"""Complex numbers: the gradient of one is that of its parts, and relevance is of both together, a real number."""

from __future__ import annotations

import pytest
import torch
from preset_cases import maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import AttnLRP, EpsilonPlus, UniformLRP0

X = numbers(2, 6)
FILTER = torch.complex(numbers(9, seed=1), numbers(9, seed=2))
WEIGHT = torch.complex(numbers(9, 9, seed=1), numbers(9, 9, seed=2))
WINDOW = torch.hann_window(8, dtype=torch.float64)


def short_time(x):
    return torch.stft(x, 8, window=WINDOW, return_complex=True)


class Between(nn.Module):
    """Dense layer, a function of 16 features, dense layer: (n, 6) -> (n, 3)."""

    def __init__(self, function):
        super().__init__()
        self.function, self.below = function, nn.Linear(6, 16)
        self.above = nn.Linear(function(numbers(2, 16)).flatten(1).shape[1], 3)

    def forward(self, x):
        return self.above(self.function(self.below(x)).flatten(1))


#: Of degree one: by the ordinary chain rule.
SPECTRA = {
    "real": lambda x: torch.fft.fft(x).real,
    "planes": lambda x: torch.fft.ifft2(torch.fft.fft2(x.reshape(-1, 4, 4))).real,
    "filtered": lambda x: torch.fft.irfft(torch.fft.rfft(x) * FILTER),
    "filtered_planes": lambda x: torch.fft.irfft2(torch.fft.rfft2(x.reshape(-1, 4, 4)) * FILTER[:3], s=(4, 4)),
    "all_axes": lambda x: torch.fft.irfftn(torch.fft.rfftn(x.reshape(-1, 2, 2, 4), dim=(1, 2, 3)), dim=(1, 2, 3)),
    "shifted": lambda x: torch.fft.ifftshift(torch.fft.fftshift(torch.fft.fft(x), 1), 1).imag,
    "magnitude": lambda x: torch.fft.rfft(x).abs(),
    "conjugate": lambda x: torch.fft.irfft(torch.fft.rfft(x).conj()),
    "short_time": lambda x: torch.istft(short_time(x) * FILTER[:5, None], 8, window=WINDOW),
    "rectified": lambda x: (lambda z: torch.complex(z.real.relu(), z.imag.relu()).abs())(torch.fft.fft(x)),
    "rotated": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 8, 2)) * FILTER[:8]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_lrp_0_is_gradient_times_input_without_a_warning(name):
    model = seeded(Between(SPECTRA[name]))
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert off(maps(model, X, UniformLRP0()), gradient * X) <= 1e-9


CONSTANTS = {
    "added": lambda x: torch.fft.irfft(torch.fft.rfft(x) + FILTER),
    "beside": lambda x: torch.cat([torch.fft.rfft(x), FILTER.expand(len(x), -1)], 1).abs(),
    "chosen": lambda x: torch.where(torch.arange(9) < 4, torch.fft.rfft(x), FILTER).abs(),
    "imaginary part": lambda x: torch.complex(x, numbers(16, seed=4).expand_as(x)).abs(),
}


@pytest.mark.parametrize("composite", [EpsilonPlus, AttnLRP])
@pytest.mark.parametrize("name", CONSTANTS)
def test_what_constants_add_is_accounted_for(name, composite):
    found = CondAttribution(seeded(Between(CONSTANTS[name]))).absorbed(X, [{"y": 1}], composite())
    assert found.rest.abs().max() <= 1e-10 * found.initial.abs().min()
    assert found.layers[""]["bias"].abs().min() > 1e-6


def test_a_quotient_holds_its_divisor_constant():
    def divided(x, apart):
        above, below = torch.fft.fft(x), torch.fft.fft(x.flip(1).square())
        return torch.fft.ifft(above / (below.detach() if apart else below)).real

    apart, together = (
        maps(seeded(Between(lambda x, apart=apart: divided(x, apart))), X, AttnLRP()) for apart in (True, False)
    )
    assert off(together, apart) <= 1e-12


REFUSED = {
    "linear": lambda x: F.linear(torch.fft.rfft(x), WEIGHT).abs(),
    "einsum": lambda x: torch.einsum("ni,io->no", torch.fft.rfft(x), WEIGHT).real,
    "conv1d": lambda x: F.conv1d(torch.fft.rfft(x)[:, None], WEIGHT[:2, None, :3]).imag,
    "tanh": lambda x: torch.fft.rfft(x).tanh().real,
}


@pytest.mark.parametrize("name", REFUSED)
def test_rules_for_real_numbers_refuse_complex_ones_by_name(name, untouched):
    model = seeded(Between(REFUSED[name]))
    message = rf"treats real numbers, and the input of {name}\(\) is complex.*None in layer_map"
    with untouched(model), pytest.raises(NotImplementedError, match=message):
        CondAttribution(model)(X, [{"y": 1}], AttnLRP())


def test_a_complex_product_by_the_ordinary_chain_rule():
    model = seeded(Between(REFUSED["einsum"]))
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert off(maps(model, X, UniformLRP0(layer_map=[(torch.einsum, None)])), gradient * X) <= 1e-9


@pytest.mark.parametrize("composite", [None, AttnLRP()], ids=["gradient", "attn_lrp"])
def test_a_layer_of_complex_numbers_has_no_relevance_of_its_own(composite, untouched):
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x)

    class Real(nn.Module):
        def forward(self, z):
            return z.real

    model = nn.Sequential(nn.Linear(6, 4), Fourier(), Real(), nn.Linear(4, 2)).double().eval()
    for conditions, role in (
        ([{"y": 1}], {"record_layer": ["1"]}),
        ([{"y": 1, "1": [0]}], {}),
        ([{}], {"start_layer": "1"}),
    ):
        with untouched(model), pytest.raises(TypeError, match="the output of layer '1' has complex numbers"):
            CondAttribution(model)(X, conditions, composite, **role)
