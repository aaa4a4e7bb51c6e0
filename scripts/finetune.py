"""Fine-tunes a classifier from a run's backbone: scripts/finetune.py RUN data=/some/folder [key=value …]."""

import sys

from manyviews.cli import finetune

if __name__ == "__main__":
    sys.exit(finetune(sys.argv[1:]))
