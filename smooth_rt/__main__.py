"""`python -m smooth_rt`: the command line where its script is not on the path."""

import sys

from smooth_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
