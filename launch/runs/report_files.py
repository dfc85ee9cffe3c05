"""Kinds of files that a report consists of, for the schema of the launcher and for those who write them."""

from enum import Enum


class ReportFile(Enum):
    """One of the files of a report; tensorboard is the Scaling run of a sweep, or the Summary run of one run."""

    md = "md"
    csv = "csv"
    png = "png"
    svg = "svg"
    json = "json"
    html = "html"
    tensorboard = "tensorboard"
