"""Measures a run beside raw pixels and random weights: kNN, linear probe, retrieval …: evaluate.py RUN [key=value]."""

import sys

from manyviews.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:]))
