"""What is known of signs: rules for positive contributions see those of negative inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_cases import net
from preset_cases import numbers, off
from torch import nn

from crp.composites import LRP
from crp.rules import ZPlus

#: Multiples of what is not negative, which are not positive.
NEGATIVE = {
    "behind": lambda h: h * -2,
    "before": lambda h: -2.0 * h,
    "method": lambda h: h.mul(-2),
    "keyword": lambda h: torch.mul(input=h, other=-2),
    "in place": lambda h: h.clone().mul_(-2),
    "numpy": lambda h: h * np.float32(-2),
    "integer of numpy": lambda h: h * np.int64(-2),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_contributions_of_negative_multiples(name):
    """R_i = Σ_j (w_ji h_i)⁺ / Σ_k (w_jk h_k)⁺ R_j with h = -2 relu(x): negative weights contribute."""
    model = net(lambda s, x: s.fc(NEGATIVE[name](x.relu())), fc=nn.Linear(12, 2, bias=False))
    x, r = numbers(3, 12), numbers(3, 2, seed=1)
    with LRP(layer_map=[("fc", ZPlus(0.0))]).context(model):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (found,) = torch.autograd.grad(y, leaf, (r / y).detach())
    z = (model.fc.weight.detach() * (-2 * x.relu())[:, None]).clamp(min=0)
    wanted = (z / z.sum(2, keepdim=True) * r[:, :, None]).sum(1)
    assert off(found, wanted) <= 1e-12
