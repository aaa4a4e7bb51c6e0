"""Fine-tuning: trains a classifier from a pretrained backbone."""

from manyviews.train.finetune.folder import folder_of
from manyviews.train.finetune.loop import finetune
from manyviews.train.finetune.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "finetune", "folder_of"]
