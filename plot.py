"""Draw the curves of runs: python plot.py PTB

The program is programs/plot.py.
"""

import sys
from collections.abc import Sequence

from engine.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_program("programs.plot", argv)


if __name__ == "__main__":
    sys.exit(main())
