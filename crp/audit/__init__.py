"""What a model makes of its data as a whole: vectors for directions, prototypes, clusters, correction."""

from crp.audit.auditing import AuditedSample, audit, audit_table, save_audit
from crp.audit.clustering import Clusters, clusters, export_corelay, save_clusters, with_concepts
from crp.audit.collect import Collected, collect
from crp.audit.comparing import Comparison, LayerComparison, compare
from crp.audit.context import Contexts, context_scores, contexts, inside_boxes
from crp.audit.correcting import Effect, effect, penalty, project, prune
from crp.audit.heatmaps import keep_heatmaps, kept_heatmaps
from crp.audit.intervening import intervene, part_of
from crp.audit.meanings import Meanings, meanings
from crp.audit.prototypes import Prototypes, prototypes
from crp.audit.semantics import Match, clarity, embed_references, polysemanticity, redundancy, search
from crp.audit.tested import Interventions, interventions

__all__ = [
    "AuditedSample", "Clusters", "Collected", "Comparison", "Contexts", "Effect", "Interventions",
    "LayerComparison", "Match", "Meanings", "Prototypes", "audit", "audit_table", "clarity", "clusters", "collect",
    "compare", "context_scores", "contexts", "effect", "embed_references", "export_corelay", "inside_boxes",
    "intervene", "interventions", "keep_heatmaps", "kept_heatmaps", "meanings", "part_of", "penalty",
    "polysemanticity", "project", "prototypes", "prune", "redundancy", "save_audit", "save_clusters", "search",
    "with_concepts",
]  # fmt: skip
