"""The command line: `python -m manyviews pretrain …`, as the console command `manyviews` has it."""

import sys

from manyviews.cli import main

if __name__ == "__main__":
    sys.exit(main())
