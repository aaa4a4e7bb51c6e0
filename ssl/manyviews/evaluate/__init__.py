"""A run is measured: its features beside baselines, how they lie, and a report of it all."""

from manyviews.evaluate.evaluate import check_measured, evaluate, planned
from manyviews.evaluate.layer import chosen
from manyviews.evaluate.record import EVALUATION, OUTCOMES
from manyviews.evaluate.run_tasks import FEATURES
from manyviews.evaluate.settings import EvaluateSettings, Look

__all__ = [
    "EVALUATION",
    "FEATURES",
    "OUTCOMES",
    "EvaluateSettings",
    "Look",
    "check_measured",
    "chosen",
    "evaluate",
    "planned",
]
