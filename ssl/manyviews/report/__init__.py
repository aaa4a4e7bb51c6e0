"""The report of a run: one page that needs no network, and the same pictures for TensorBoard."""

from manyviews.report.findings import Findings
from manyviews.report.page import write_report

__all__ = ["Findings", "write_report"]
