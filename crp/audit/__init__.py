"""What a model makes of its data as a whole: vectors for directions, prototypes, clusters, and correction."""

from crp.audit.collect import Collected, collect

__all__ = ["Collected", "collect"]
