"""Fine-tuning: a classifier from a backbone that has learned without labels; the loop is short, to be copied."""

from contrastive.finetune.folder import folder_of
from contrastive.finetune.loop import finetune
from contrastive.finetune.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "finetune", "folder_of"]
