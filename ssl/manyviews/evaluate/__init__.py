"""Evaluates a run: its features beside baselines, their geometry, and a report; and compares runs."""

from manyviews.evaluate.evaluate import check_measured, evaluate
from manyviews.evaluate.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "check_measured", "evaluate"]
