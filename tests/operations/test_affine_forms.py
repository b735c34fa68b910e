"""Rules on affine operations whatever makes their weight, against the papers' formulas in matrices."""

import pytest
import torch
from affine_cases import WRITINGS
from core_cases import deviation
from rule_cases import FORMS, LAYERS, as_matrices, in_matrices, relevance, seeded


def matrices_of(plain, a):
    """Those of a layer, and those for the flat rule: a weight of 0, as pruning makes, is in reach."""
    repeat, w, b = as_matrices(plain, a)
    with torch.no_grad():
        plain.weight.fill_(1.0)
    return {"flat": as_matrices(plain, a)}, (repeat, w, b)


def deviations(model, plain, a, m):
    """Forms that are not met, with the largest deviation over the largest value."""
    r = m * plain(a).detach()
    special, usual = matrices_of(plain, a)
    found = {
        name: deviation(relevance(rule, model, a, m), in_matrices(form, special.get(name, usual), a, r).detach())
        for name, (rule, form) in FORMS.items()
    }
    return {name: value for name, value in found.items() if not value <= 1e-10}


@pytest.mark.parametrize("kind", ["bias", "no_bias", "bias_nonnegative"])
@pytest.mark.parametrize("name", LAYERS)
def test_function(name, kind):
    layer, a = seeded(name, kind != "no_bias", "nonnegative" in kind)
    model, plain = WRITINGS["function"](layer, a)
    model.requires_grad_(kind != "no_bias")
    assert not deviations(model, plain, a, torch.randn_like(plain(a)))


@pytest.mark.covering(4)
@pytest.mark.parametrize("writing", list(WRITINGS)[1:])
@pytest.mark.parametrize("name", LAYERS)
def test_weight_that_the_forward_pass_computes(name, writing):
    layer, a = seeded(name, True, False)
    model, plain = WRITINGS[writing](layer, a)
    torch.testing.assert_close(model(a), plain(a), rtol=1e-12, atol=1e-12)
    assert not torch.equal(plain.weight, layer.weight)
    assert not deviations(model, plain, a, torch.randn_like(plain(a)))
