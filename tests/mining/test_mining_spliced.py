"""Latents of an autoencoder add up, with its error and its bias, in mined tables, references and the graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution_cases import close
from concept_cases import Autoencoder
from feature_net import Images, as_tensors, make_fv, make_net
from torch import Tensor

from crp.attribution import AttributionGraph, CondAttribution
from crp.composites import EpsilonGamma, EpsilonPlus
from crp.concepts import ChannelConcept, splice
from crp.trace.graph import trace_model_graph
from crp.visualization.table.store import Table

LAYER, WIDTH = "second", 3


def autoencoder() -> Autoencoder:
    torch.manual_seed(2)
    return Autoencoder(5, WIDTH).double().eval()


@pytest.mark.parametrize("composite", [EpsilonPlus(), EpsilonGamma()], ids=lambda c: type(c).__name__)
def test_tables_and_references_of_latents(tmp_path, composite):
    net, code = make_net(), autoencoder()
    data, conditions = Images().data, [{"y": label} for label in Images().labels]
    plain = CondAttribution(net)(data, conditions, composite, [LAYER])
    bias = torch.einsum("bchw,c->b", plain.multipliers[LAYER], code.decoder.bias.detach())
    with splice(net, LAYER, code) as names:
        fv = make_fv(tmp_path, net=net, layers=[names.code, names.error, names.decoder])
        fv.run(composite, 0, 12, batch_size=5, progress=False)
        table = Table.open(fv.path)
        sums = {name: np.concatenate([b.value for b in table.blocks(name, "relevance", "sum")]) for name in names}
        whole: Tensor = torch.zeros(())
        for name in (names.code, names.error):
            ids = np.flatnonzero((sums[name] != 0).any(0)).tolist()  # (a dead latent has no heatmap)
            found = fv.get_max_reference(
                ids, name, "relevance", (0, 12), composite, plot_fn=as_tensors, init="relevance"
            )
            for samples, heatmaps in found.values():
                order = (samples[:, None] == data[None]).flatten(2).all(2).int().argmax(1)
                whole = whole + torch.zeros_like(plain.heatmap).index_copy(0, order, heatmaps)
    totals = {name: torch.from_numpy(of_layer).sum(1) for name, of_layer in sums.items()}
    relevance = plain.relevances[LAYER].flatten(1).sum(1)
    assert sums[names.code].shape == (12, WIDTH * 5) and (sums[names.code] != 0).any(0).sum() > 5
    assert close(totals[names.code] + bias, totals[names.decoder], 1e-10)
    assert close(totals[names.code] + totals[names.error] + bias, relevance, 1e-10)
    assert close(whole, plain.heatmap, 1e-10)


def test_latents_in_the_graph():
    """What latents, error and bias take from a channel above adds up to what the layer takes from it."""
    net, code, data = make_net(), autoencoder(), Images().data[:1]
    condition = [{"y": 1, "relu2": [2]}]
    plain = CondAttribution(net)(data, condition, EpsilonPlus(), [LAYER], exclude_parallel=False)
    with splice(net, LAYER, code) as names:
        attribution, layers = CondAttribution(net), [names.code, names.error, "relu2"]
        graph = AttributionGraph(
            attribution, trace_model_graph(net, data, layers), dict.fromkeys(layers, ChannelConcept())
        )
        n = WIDTH * 5
        _, connections = graph(data, EpsilonPlus(), 2, "relu2", 1, [n], abs_norm=False, verbose=False)
    found = connections["relu2", 2]
    assert {layer for layer, *_ in found} == {names.code, names.error}
    bias = torch.einsum("bchw,c->", plain.multipliers[LAYER], code.decoder.bias.detach())
    total = sum(value for *_, value in found) + bias.item()
    assert total == pytest.approx(plain.relevances[LAYER].sum().item(), rel=1e-10)
