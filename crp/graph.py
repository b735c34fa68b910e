"""Which layer feeds which, under the module name of zennit-crp."""

from crp.trace.graph import GraphNode, ModelGraph, trace_model_graph

__all__ = ["GraphNode", "ModelGraph", "trace_model_graph"]
