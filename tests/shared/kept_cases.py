"""All that can be kept beside a table, made of a feature visualization after a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from zennit.composites import EpsilonPlus

from crp.audit import audit_table, clusters, contexts, interventions, meanings, prototypes, save_audit, save_clusters
from crp.visualization import FeatureVisualization
from crp.visualization.table.store import Table


def embed(samples: torch.Tensor) -> torch.Tensor:
    """Embedding of pictures in four features: how bright each quarter is, and 1."""
    means = torch.nn.functional.adaptive_avg_pool2d(samples.float().mean(1, keepdim=True), 2).flatten(1)
    return torch.cat([means, torch.ones(len(samples), 1)], 1)


TEXTS = {"upper left": [1.0, 0, 0, 0, 0], "all the same": [1.0, 1, 1, 1, 4]}


def keep_everything(
    fv: FeatureVisualization, layer: str = "second", texts: Mapping[str, Any] = TEXTS
) -> dict[str, Any]:
    """Keep results of every kind beside the table, of its layer "second", and return them by kind."""
    layer = "second"
    table = Table.open(fv.path)
    found = prototypes(table, layer, (1, 2), seed=3)
    audited = audit_table(table, found, k=3)
    of_class = clusters(table, layer, 0, n=2, n_neighbours=3, seed=5)
    meant = meanings(fv, layer, embed, texts, n=3)
    tested = interventions(fv, EpsilonPlus(), layer, [0, 1, 4], targets=[0, 1, 1])
    inside = torch.zeros(3, 6, 6, dtype=torch.bool)
    inside[:, 1:4, 2:] = True
    seen = contexts(fv, EpsilonPlus(), layer, [0, 1, 4], inside, targets=[0, 1, 1])
    save_audit(table, found, audited)
    save_clusters(table, of_class, layer, 0)
    for one in (found, meant, tested, seen):
        one.save(table)
    return {
        "prototypes": found,
        "audit": audited,
        "clusters": of_class,
        "meanings": meant,
        "interventions": tested,
        "context": seen,
    }
