"""From run folders to a scaling report: a table, a figure, and a dashboard in TensorBoard.

Reads run folders only, and so can be made again at any time. Loads no torch. Must not know how runs are started.
"""

from __future__ import annotations

from launch.report.table import Row, ScalingTable, build
from launch.report.views import show
from launch.report.write import write

__all__ = ["Row", "ScalingTable", "build", "show", "write"]
