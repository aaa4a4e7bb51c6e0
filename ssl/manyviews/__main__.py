"""The command line as a module: `python -m manyviews pretrain …`."""

import sys

from manyviews.cli import main

if __name__ == "__main__":
    sys.exit(main())
