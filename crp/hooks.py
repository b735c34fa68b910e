"""Hooks, under the module name of zennit-crp."""

from crp.compat.hooks import FeatVisHook, MaskHook

__all__ = ["FeatVisHook", "MaskHook"]
