"""Pretrains a backbone: scripts/pretrain.py [RECIPE] [key=value …]; --help lists every key."""

import sys

from manyviews.cli import pretrain

if __name__ == "__main__":
    sys.exit(pretrain(sys.argv[1:]))
