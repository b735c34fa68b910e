"""Helpers under the module name of zennit-crp: layers of a model, norms, and reading results."""

from crp.compat.export import export
from crp.compat.folders import find_files, load_maximization, load_receptive_field, load_stat_targets, load_statistics
from crp.engine.forward import get_output_shapes
from crp.image.figures import abs_norm, max_norm
from crp.layers import get_layer_names

__all__ = [
    "abs_norm",
    "export",
    "find_files",
    "get_layer_names",
    "get_output_shapes",
    "load_maximization",
    "load_receptive_field",
    "load_stat_targets",
    "load_statistics",
    "max_norm",
]
