"""Fine-tuning: a classifier from a backbone that has learned without labels; the loop is short, to be copied."""

from manyviews.train.finetune.folder import folder_of
from manyviews.train.finetune.loop import finetune
from manyviews.train.finetune.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "finetune", "folder_of"]
