"""Measurements; run ``python -m benchmarks``."""
