"""`python -m ddst`: the program `ddst`, as `torchrun -m ddst` starts it, too."""

import sys

from ddst.cli import main

if __name__ == "__main__":
    sys.exit(main())
