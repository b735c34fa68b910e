"""Questions to a mined table, under the name that notebooks import."""

from crp.visualization.table.ranking import (
    ClassMeans,
    ClassStatistics,
    ReferenceSamples,
    class_means,
    class_statistics,
    list_targets,
    top_k,
)

__all__ = [
    "ClassMeans",
    "ClassStatistics",
    "ReferenceSamples",
    "class_means",
    "class_statistics",
    "list_targets",
    "top_k",
]
