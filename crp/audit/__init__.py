"""What a model makes of its data as a whole: vectors for directions, prototypes, audits, clusters."""

from crp.audit.auditing import AuditedSample, audit
from crp.audit.clustering import Clusters, clusters, export_corelay
from crp.audit.collect import Collected, collect
from crp.audit.prototypes import Prototypes, prototypes

__all__ = [
    "AuditedSample",
    "Clusters",
    "Collected",
    "Prototypes",
    "audit",
    "clusters",
    "collect",
    "export_corelay",
    "prototypes",
]
