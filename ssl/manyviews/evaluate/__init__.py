"""Evaluates runs: features beside baselines, geometry, a report; and compares them."""

from manyviews.evaluate.evaluate import check_measured, evaluate
from manyviews.evaluate.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "check_measured", "evaluate"]
