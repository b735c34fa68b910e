"""Questions to a mined table, under the name that notebooks import; they are in `crp.visualization.table.ranking`."""

from crp.visualization.table.ranking import class_means, class_statistics, list_targets, top_k

__all__ = ["class_means", "class_statistics", "list_targets", "top_k"]
