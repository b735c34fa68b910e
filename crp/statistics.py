"""Best samples of concepts for each class, under the module name of zennit-crp."""

from crp.compat.accumulators import Statistics

__all__ = ["Statistics"]
