"""Extracts features with a run's backbone: scripts/extract.py RUN data=/some/folder output=/some/features."""

import sys

from manyviews.cli import extract

if __name__ == "__main__":
    sys.exit(extract(sys.argv[1:]))
