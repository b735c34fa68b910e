"""Class activation maps of layers whose channels come last, and of those that say how they are arranged."""

from __future__ import annotations

import pytest
import torch
from preset_cases import off, seeded
from torch import nn
from transformer_families import built

import crp
from crp.attributors import GradCAM
from crp.outputs import Position

IDS = torch.tensor([[3, 4, 5, 1, 9, 2], [4, 4, 7, 8, 3, 3]])


def by_hand(model, module, call, start):
    """Rectified sum over channels, which come last, of the activation times its mean gradient over positions."""
    kept = []
    handle = module.register_forward_hook(lambda _, args, output: kept.append(output))
    output = call(model)
    handle.remove()
    (gradient,) = torch.autograd.grad(start(output), kept[0])
    axes = tuple(range(1, gradient.dim() - 1))
    return (kept[0] * gradient.mean(axes, keepdim=True)).sum(-1).clamp(min=0).detach()


@pytest.mark.parametrize("layer", ["transformer.h.0", "transformer.h.1.ln_2"])
def test_tokens_of_a_text(layer):
    model = built("gpt2")[0].model
    found = crp.explain("grad_cam", model, {"input_ids": IDS}, Position(-1, 5), layer=layer)
    wanted = by_hand(
        model, model.get_submodule(layer), lambda m: m(input_ids=IDS).logits, lambda logits: logits[:, -1, 5].sum()
    )
    assert found.shape == IDS.shape and wanted.abs().max() > 1e-9
    assert off(found, wanted) <= 1e-10


def test_patches_of_a_picture():
    model, data = built("timm_vit")
    layer = model.blocks[1].norm1
    cam = GradCAM(
        model,
        layer="blocks.1.norm1",
        interpolation="nearest",
        relu=False,
        reshape=lambda t: t[:, 1:].mT.unflatten(2, (2, 2)),
    )
    _, found = cam(data, 1)
    kept = []
    handle = layer.register_forward_hook(lambda _, args, output: kept.append(output))
    output = model(data)
    handle.remove()
    (gradient,) = torch.autograd.grad(output[:, 1].sum(), kept[0])
    patches = kept[0][:, 1:] * gradient[:, 1:].mean(1, keepdim=True)
    wanted = patches.sum(-1).detach().unflatten(1, (2, 2))
    assert off(found[:, 0], wanted.repeat_interleave(4, 1).repeat_interleave(4, 2)) <= 1e-10


def test_channels_of_a_norm_come_last():
    """Swin's features are (samples, rows, columns, channels)."""
    model, data = built("torchvision_swin")
    cam = GradCAM(model, layer="norm", interpolation="nearest")
    _, maps = cam.maps(data, 1)
    wanted = by_hand(model, model.norm, lambda m: m(data), lambda output: output[:, 1].sum())
    assert maps.shape[2:] == wanted.shape[1:]
    assert off(maps[:, 0], wanted) <= 1e-10


def test_what_cannot_be_arranged():
    model, data = built("timm_vit")
    with pytest.raises(ValueError, match=r"or say by reshape= how its output has \(samples, channels, \*space\)"):
        GradCAM(model, layer="blocks.1.norm1")(data, 1)
    with pytest.raises(ValueError, match=r"reshape made \(1, 5\) of the output of layer 'blocks.1.norm1', \(1, 5, 8\)"):
        GradCAM(model, layer="blocks.1.norm1", reshape=lambda t: t.sum(-1))(data, 1)
    with pytest.raises(TypeError, match="reshape must be a function of the layer's output, or None; not 3"):
        GradCAM(model, layer="blocks.1.norm1", reshape=3)

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.act, self.out = nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 3)

        def forward(self, ids):
            return self.out(self.act(self.embed(ids)).mean(1))

    square = seeded(Square())
    with pytest.raises(ValueError, match="has as many channels as tokens; say by reshape= which axis is which"):
        GradCAM(square, layer="act")(IDS, 1)
    found = GradCAM(square, layer="act", reshape=lambda t: t.mT)(IDS, 1)[1]
    wanted = by_hand(square, square.act, lambda m: m(IDS), lambda output: output[:, 1].sum())
    assert off(found[:, 0], wanted) <= 1e-10
