"""The concept atlas: pages on which a mined table is looked at."""

from crp.visualization.report.options import Finding, make_tile
from crp.visualization.report.suspects import Suspect, find_suspects
from crp.visualization.report.write import write_report

__all__ = ["Finding", "Suspect", "find_suspects", "make_tile", "write_report"]
