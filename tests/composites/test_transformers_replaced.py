"""Transformers of three libraries under LRP-0, against the gradient of the model with other functions in it."""

from __future__ import annotations

import pytest
import torch
from preset_cases import off
from replaced_functions import lrp_0
from transformer_families import FAMILIES, built

from crp.composites import AttnLRP, RelP

#: What is written out in these: an activation, exponentials that are divided by a sum of theirs.
WRITTEN_OUT = {"bloom", "gpt_oss", "rwkv"}
CASES = [(name, kind) for name in FAMILIES if name not in WRITTEN_OUT for kind in (AttnLRP, RelP)]
CASES.remove(("mamba2", RelP))  # (what its exponentials weight counts as attention)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_relevance_is_the_gradient_of_the_model_with_other_functions(name, kind):
    model, data = built(name)
    plain = model(data).detach()
    prediction, wanted = lrp_0(model, data, 1, holds_attention=kind is RelP)
    assert off(prediction, plain) <= 1e-12
    with kind().context(model):
        leaf = data.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert off(found, wanted) <= 1e-6  # (some compute their norms or states in float32)
