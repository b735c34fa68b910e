"""Caches of reference pictures, under the module name of zennit-crp."""

from crp.visualization.cache import Cache, ImageCache

__all__ = ["Cache", "ImageCache"]
