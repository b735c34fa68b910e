"""SpRAy on a trained net: half of a class is recognised by a mark, and is a cluster of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trained_nets import MEAN, STD, cifar_images, cifar_net

from crp.attribution import CondAttribution
from crp.audit import clusters
from crp.composites import EpsilonPlus, EpsilonPlusFlat

CAT = 3


def stamped(images: Tensor) -> Tensor:
    """Images with a magenta square around a green one in the upper left corner."""
    images = images.clone()
    images[:, :, 1:6, 1:6] = torch.tensor([1.0, 0, 1])[:, None, None]
    images[:, :, 2:5, 2:5] = torch.tensor([0, 1.0, 0])[:, None, None]
    return images


def tune_last_block(model: nn.Module, data: Tensor, labels: Tensor) -> None:
    """Train the last residual block and the classifier for 40 epochs, with the statistics of batch norm as they are."""
    torch.manual_seed(0)
    *before, last = model.layer3
    with torch.no_grad():
        features = model.layer2(model.layer1(model.relu(model.bn1(model.conv1(data)))))
        for block in before:
            features = block(features)
    optimizer = torch.optim.Adam([*last.parameters(), *model.linear.parameters()], 1e-3)
    for _ in range(40):
        for batch in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            logits = model.linear(model.flatten(model.pool(last(features[batch]))))
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("composite", [EpsilonPlus(), EpsilonPlusFlat()], ids=lambda c: type(c).__name__)
def test_marked_cats_are_a_cluster_of_their_own(composite):
    """Of 50 cats, every other one has a mark; the net is tuned on these images, and its heatmaps are clustered."""
    model, (images, labels) = cifar_net(), cifar_images()
    cats = torch.where(labels == CAT)[0]
    marked = torch.zeros(len(labels), dtype=torch.bool)
    marked[cats[::2]] = True
    data = (torch.where(marked[:, None, None, None], stamped(images), images) - MEAN) / STD
    attribution = CondAttribution(model)

    def heatmaps() -> tuple[Tensor, list[float]]:
        heatmap = attribution(data[cats], [{"y": CAT}], composite).heatmap
        positive = heatmap.clamp_min(0)
        on_mark = positive[:, 1:6, 1:6].sum((1, 2)) / positive.sum((1, 2))
        return heatmap, [float(on_mark[marked[cats] == kind].mean()) for kind in (True, False)]

    before = heatmaps()[1]
    tune_last_block(model, data, labels)
    model.eval()
    with torch.no_grad():
        assert (model(data).argmax(1) == labels).float().mean() > 0.98
    heatmap, after = heatmaps()
    assert after[0] > 1.3 * before[0] and after[0] > 5 * after[1]
    small = F.avg_pool2d(heatmap[:, None], 4)[:, 0]
    for maps in (heatmap, small):
        found = clusters(maps)
        share = [float(marked[cats][found.label == i].float().mean()) for i in range(len(found.sizes))]
        assert len(found.sizes) == 2 and max(share) >= 0.95 and min(share) == 0 and found.separation > 0.8
