"""What a model makes of its data as a whole: vectors for directions, prototypes, clusters, correction."""

from crp.audit.auditing import AuditedSample, audit, audit_table, save_audit
from crp.audit.clustering import Clusters, clusters, export_corelay, save_clusters
from crp.audit.collect import Collected, collect
from crp.audit.context import context_scores
from crp.audit.correcting import Effect, effect, penalty, project, prune
from crp.audit.intervening import intervene, part_of
from crp.audit.prototypes import Prototypes, prototypes
from crp.audit.semantics import Match, clarity, embed_references, polysemanticity, redundancy, search

__all__ = [
    "AuditedSample",
    "Clusters",
    "Collected",
    "Effect",
    "Match",
    "Prototypes",
    "audit",
    "audit_table",
    "clarity",
    "clusters",
    "collect",
    "context_scores",
    "effect",
    "embed_references",
    "export_corelay",
    "intervene",
    "part_of",
    "penalty",
    "polysemanticity",
    "project",
    "prototypes",
    "prune",
    "redundancy",
    "save_audit",
    "save_clusters",
    "search",
]
