"""Best samples of concepts, under the module name of zennit-crp."""

from crp.compat.accumulators import Maximization

__all__ = ["Maximization"]
