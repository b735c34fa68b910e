"""The page on which a table is looked at."""

from crp.visualization.report.page import Finding
from crp.visualization.report.write import make_tile, write_report

__all__ = ["Finding", "make_tile", "write_report"]
