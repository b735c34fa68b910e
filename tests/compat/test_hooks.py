"""Hooks on layers in zennit's protocol."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus, NameMapComposite
from zennit.core import Composite

from crp import composites
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.hooks import FeatVisHook, MaskHook


def keep_first(grad: Tensor) -> Tensor:
    grad[:, 1:] = 0
    return grad


def double(grad: Tensor) -> Tensor:
    return grad * 2


def test_mask_hook_in_a_composite(vgg_bn, images):
    """As zennit-crp's users build conditional attributions by hand."""
    hook = MaskHook([ChannelConcept.mask(0, [1]), ChannelConcept.mask(1, [2, 3])])
    data = images[:2].clone().requires_grad_()
    with NameMapComposite([(["features.3"], hook)]).context(vgg_bn) as outer, EpsilonPlus().context(outer) as model:
        output = model(data)
        (relevance,) = torch.autograd.grad(output, data, output.detach() * torch.eye(5, dtype=data.dtype)[[0, 0]])
    conditions = [{"y": 0, "features.3": [1]}, {"y": 0, "features.3": [2, 3]}]
    wanted = CondAttribution(vgg_bn)(images[:2], conditions, EpsilonPlus())
    assert torch.allclose(relevance.sum(1), wanted.heatmap, rtol=1e-10)


def test_mask_hook_masks_a_copy():
    grad = torch.ones(2, 3)
    hook = MaskHook([keep_first])
    assert hook.backward(nn.Identity(), grad).sum() == 2
    assert grad.sum() == 6


def test_mask_hook_shares_its_functions_with_copies():
    hook = MaskHook([])
    copy = hook.copy()
    hook.fn_list.append(double)
    assert copy.fn_list == [double]
    copy.remove()
    assert hook.fn_list == []


def test_mask_hook_on_tuples_and_without_gradient():
    hook = MaskHook([double])
    x = torch.ones(1, 2, requires_grad=True) * 1
    hook.post_forward(nn.Identity(), (), (x, None))
    (grad,) = torch.autograd.grad(x.sum(), x)
    assert grad.tolist() == [[2, 2]]
    hook.post_forward(nn.Identity(), (), torch.ones(1))


def test_mask_hook_leaves_with_its_handle(mlp, vectors, untouched):
    with untouched(mlp):
        handle = MaskHook([keep_first]).register(mlp[2])
        data = vectors.clone().requires_grad_()
        (masked,) = torch.autograd.grad(mlp(data).sum(), data)
        handle.remove()
        (free,) = torch.autograd.grad(mlp(data).sum(), data)
    assert not torch.equal(masked, free)


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def analyze_activation(self, *args: object) -> None:
        self.seen.append(("activation", *args))

    def analyze_relevance(self, *args: object) -> None:
        self.seen.append(("relevance", *args))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_feature_visualization_hook(mlp, vectors, untouched, device):
    recorder, concept, batch = Recorder(), ChannelConcept(), {"sample_indices": [7, 8], "targets": [0, 1]}
    hook = FeatVisHook(recorder, concept, "2", batch, device)
    data = vectors[:2].clone().requires_grad_()
    with untouched(mlp), Composite(lambda ctx, name, module: hook if name == "2" else None).context(mlp) as model:
        output = model(data)
        (wanted,) = torch.autograd.grad(output[:, 0].sum(), data)
    (kind, activation, *context), (kind_2, relevance, *context_2) = recorder.seen
    assert (kind, kind_2) == ("activation", "relevance")
    assert context == context_2 == ["2", concept, [7, 8], [0, 1]]
    assert not activation.requires_grad
    found = CondAttribution(mlp)(vectors[:2], [{"y": 0}], None, ["2"], init_rel=1)
    assert torch.allclose(activation, found.activations["2"])
    assert torch.allclose(relevance, found.relevances["2"])
    assert wanted.any()
    with torch.no_grad():
        hook.post_forward(mlp[2], (), mlp[2](mlp[:2](vectors)))
    assert len(recorder.seen) == 3


def test_hooks_on_a_gate_that_a_rule_holds_constant(mlp, vectors):
    """No gradient comes to it: nothing is masked, and its relevance is 0."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.gate = mlp, nn.Sigmoid()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.net(x)
            return y * self.gate(x.mean(1, keepdim=True))

    recorder, batch = Recorder(), {"sample_indices": [0, 1], "targets": [0, 0]}
    data, model = vectors[:2].clone().requires_grad_(), Gated()
    hooks = MaskHook([keep_first]), FeatVisHook(recorder, ChannelConcept(), "gate", batch)
    handles = [hook.register(model.gate) for hook in hooks]
    with composites.EpsilonPlus().context(model):
        (relevance,) = torch.autograd.grad(model(data)[:, 0].sum(), data)
    for handle in handles:
        handle.remove()
    [(_, activation, *_), (kind, found, *_)] = recorder.seen
    assert kind == "relevance" and found.shape == activation.shape and not found.any() and relevance.any()
