"""Nets and data that tests of attributors share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import crp
from crp.metrics import continuity, local_lipschitz, pixel_flipping, randomization, selectivity

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
NAMES = [method.name for method in crp.methods()]
MAPS = ["cam", "grad_cam", "grad_cam_pp", "guided_grad_cam"]
#: Options that must be given, or that keep tests short.
GIVEN = {name: {"layer": "4"} for name in MAPS} | {
    "epsilon_gamma_box": {"low": -4.0, "high": 4.0},
    "intgrad": {"steps": 6},
    "smoothgrad": {"n": 6},
    "occlusion": {"window_shape": 4, "step": 4},
    "shapley_sampling": {"sampling_dims": (2,), "samples": 2},
    "meaningful_perturbation": {"steps": 3, "mask_size": 4, "mask_blur": 0.0, "sigma": 1.0, "jitter": 1},
}
#: Metrics that take a model, data, targets and a method.
METRICS = {
    "pixel_flipping": partial(pixel_flipping, patch=2),
    "selectivity": partial(selectivity, patch=2, steps=2),
    "continuity": continuity,
    "local_lipschitz": partial(local_lipschitz, samples=2),
    "randomization": randomization,
}


def gap_net(bias: bool = True) -> nn.Sequential:
    """Convolutions, ReLU, average over positions, one dense layer: (n, 3, 8, 8) -> (n, 4); ``"4"`` is averaged."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 3, padding=1, bias=bias),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=bias),
    )  # fmt: skip
    return net.double().eval()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


class TwoInputs(nn.Module):
    """Scores of a picture and a vector, which meet in a product: (n, 2, 4, 4), (n, 3) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(2, 3, 3)
        self.fc1 = nn.Linear(12, 5)
        self.fc2 = nn.Linear(3, 5)
        self.out = nn.Linear(5, 3)
        self.double().eval()

    def forward(self, picture: Tensor, vector: Tensor) -> Tensor:
        left = torch.relu(self.fc1(torch.relu(self.conv(picture)).flatten(1)))
        return self.out(torch.relu(left + self.fc2(vector)))


def two_inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return (
        torch.randn(n, 2, 4, 4, dtype=torch.float64, generator=generator),
        torch.randn(n, 3, dtype=torch.float64, generator=generator),
    )


def gradient(model: nn.Module, x: Tensor, classes: list[int] | int) -> Tensor:
    """Gradient of one output for each sample, by autograd alone."""
    leaf = x.detach().clone().requires_grad_()
    output = model(leaf)
    ids = torch.as_tensor(classes).expand(len(x))
    return torch.autograd.grad(output[torch.arange(len(x)), ids].sum(), leaf)[0]


class InDict(nn.Module):
    """A net that returns its scores beside something else, under a name; its layers keep their names."""

    def __init__(self, net):
        super().__init__()
        for name, module in net.named_children():
            self.add_module(name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return {"other": -x, "scores": x}


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.function(*inputs, **named)


def explain(name, model, x, target=None, **options):
    return crp.explain(name, model, x, target, **GIVEN.get(name, {}), **options)
