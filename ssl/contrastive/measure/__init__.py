"""A run is measured: its features beside baselines, how they lie, and a report of it all."""

from contrastive.measure.evaluate import check_measured, evaluate, planned
from contrastive.measure.layer import chosen
from contrastive.measure.parts import FEATURES
from contrastive.measure.record import EVALUATION, OUTCOMES
from contrastive.measure.settings import EvaluateSettings, Look

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
