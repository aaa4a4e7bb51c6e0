"""Evaluates runs: features beside baselines, geometry, a report; and compares them."""

from manyviews.evaluation.evaluate import check_measured, evaluate
from manyviews.evaluation.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "check_measured", "evaluate"]
