"""Sample text from a model: python generate.py PTB.pt --prompt "the price of"

The program is programs/generate.py.
"""

import sys
from collections.abc import Sequence

from engine.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_program("programs.generate", argv, "flags.generation.parse_generation")


if __name__ == "__main__":
    sys.exit(main())
