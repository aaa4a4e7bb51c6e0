"""The report of a run: a page that needs no network, and its pictures for TensorBoard."""

from manyviews.report.findings import Findings
from manyviews.report.page import write_report

__all__ = ["Findings", "write_report"]
