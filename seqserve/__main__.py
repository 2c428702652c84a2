"""`python -m seqserve` is the command `seqserve`."""

import sys

from seqserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
