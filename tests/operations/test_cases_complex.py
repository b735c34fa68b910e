"""Complex numbers: the gradient of one is that of its parts, and relevance is of both together, a real number."""

from __future__ import annotations

import pytest
import torch
from preset_cases import maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import (
    AttnLRP,
    EpsilonPlus,
    UniformAlphaBeta,
    UniformEpsilon,
    UniformGamma,
    UniformLRP0,
    UniformZPlus,
)
from crp.rules import Epsilon, Whole

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


def of_numbers(x):
    return torch.fft.rfft(x)


def of_parts(x):
    """Real and imaginary parts, one after the other."""
    return torch.view_as_real(torch.fft.rfft(x)).mT.flatten(-2)


def parts(weight):
    """Matrix of real numbers that does to real and imaginary parts what one of complex numbers does to these."""
    return torch.cat([torch.cat([weight.real, -weight.imag], 1), torch.cat([weight.imag, weight.real], 1)])


def kernels(weight):
    """Kernels of both parts for both parts."""
    return torch.stack([torch.cat([weight.real, -weight.imag], 1), torch.cat([weight.imag, weight.real], 1)])


def in_turn(z):
    return torch.view_as_real(z).mT


def convolved(x):
    both = torch.view_as_real(torch.fft.rfft(x)).mT
    return F.conv1d(both, kernels(WEIGHT[:2, None, :3]).flatten(0, 1)).unflatten(1, (2, 2)).transpose(1, 2)


#: With complex weights, and the same written in real numbers.
WEIGHTED = {
    "linear": (lambda x: in_turn(F.linear(of_numbers(x), WEIGHT)), lambda x: F.linear(of_parts(x), parts(WEIGHT))),
    "with a bias": (
        lambda x: in_turn(F.linear(of_numbers(x), WEIGHT, FILTER)),
        lambda x: F.linear(of_parts(x), parts(WEIGHT), torch.cat([FILTER.real, FILTER.imag])),
    ),
    "adjoint": (
        lambda x: in_turn(of_numbers(x).conj() @ WEIGHT.mH),
        lambda x: F.linear(of_parts(x) * torch.ones(2, 9).double().mul(torch.tensor([[1.0], [-1.0]])).flatten(),
                           parts(WEIGHT.conj())),
    ),
    "einsum": (
        lambda x: in_turn(torch.einsum("...i,io,o->...o", of_numbers(x), WEIGHT, FILTER)),
        lambda x: F.linear(of_parts(x), parts((WEIGHT * FILTER).mT)),
    ),
    "modes": (  # (as of a Fourier neural operator)
        lambda x: torch.einsum("bim,iom->bom", modes(x), WEIGHT[:4, :6].unflatten(1, (2, 3))).abs(),
        lambda x: modes_apart(modes(x)),
    ),
    "conv1d": (lambda x: in_turn(F.conv1d(of_numbers(x)[:, None], WEIGHT[:2, None, :3])), convolved),
}  # fmt: skip


def modes(x):
    return torch.fft.rfft(x.unflatten(1, (4, 4)))


def modes_apart(z):
    weight, both = WEIGHT[:4, :6].unflatten(1, (2, 3)), torch.cat([z.real, z.imag], 1)
    matrices = torch.stack([parts(weight[..., m].mT) for m in range(3)])
    return torch.complex(*torch.einsum("bim,moi->bom", both, matrices).chunk(2, 1)).abs()


@pytest.mark.parametrize("composite", [UniformLRP0, UniformEpsilon, UniformZPlus, UniformGamma, UniformAlphaBeta])
@pytest.mark.parametrize("name", WEIGHTED)
def test_sums_weighted_by_complex_numbers_are_those_of_their_parts(name, composite):
    of_complex, of_real = (seeded(Between(function)) for function in WEIGHTED[name])
    assert off(maps(of_complex, X, composite()), maps(of_real, X, composite())) <= 1e-9
    found = CondAttribution(of_complex).absorbed(X, [{"y": 1}], composite())
    assert found.rest.abs().max() <= 1e-10 * found.initial.abs().min()


REFUSED = {
    "tanh": lambda x: torch.fft.rfft(x).tanh().real,
    "vdot": lambda x: torch.vdot(torch.fft.rfft(x)[0], FILTER).real.expand(len(x), 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rules_for_real_numbers_refuse_complex_ones_by_name(name, untouched):
    model = seeded(Between(REFUSED[name]))
    message = rf"treats real numbers, and the input of {name}\(\) is complex.*None in layer_map"
    with untouched(model), pytest.raises(NotImplementedError, match=message):
        CondAttribution(model)(X[:1], [{"y": 1}], AttnLRP())


def test_a_module_as_a_whole_that_returns_complex_numbers_is_refused():
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x)

    model = nn.Sequential(nn.Linear(6, 4), Fourier(), nn.Flatten()).double().eval()
    with pytest.raises(TypeError, match=r"Fourier returns complex numbers.* or None to it"):
        CondAttribution(model, output=lambda z: z.abs())(
            X, [{"y": 1}], EpsilonPlus(layer_map=[("1", Whole(Epsilon()))])
        )


def test_a_complex_product_by_the_ordinary_chain_rule():
    model = seeded(Between(WEIGHTED["einsum"][0]))
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert off(maps(model, X, UniformZPlus(layer_map=[(torch.einsum, None), ("", Epsilon(0))])), gradient * X) <= 1e-9


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
