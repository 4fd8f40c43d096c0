"""Make a corpus of your own texts: python prepare.py FILE… --output data/mine

The program is programs/prepare.py.
"""

import sys
from collections.abc import Sequence

from engine.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_program("programs.prepare", argv, "flags.preparation.parse_preparation")


if __name__ == "__main__":
    sys.exit(main())
