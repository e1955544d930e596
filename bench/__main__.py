"""`python -m bench`, the same as `smooth-rt bench`, which imports the rest where an interruption is answered."""

from __future__ import annotations

import sys

from smooth_rt.cli import main as smooth_rt

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark and return the exit code, which is that of `smooth-rt bench` (see `smooth_rt.cli`).

    Args:
        argv: the arguments without the program; None: those of this process.
    """
    return smooth_rt(["bench", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
