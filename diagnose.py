"""Look at how gradients flow back through time: python diagnose.py PTB.pt --data data/penn

The program is programs/diagnose.py.
"""

import sys
from collections.abc import Sequence

from engine.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_program("programs.diagnose", argv, "flags.diagnosis.parse_diagnosis")


if __name__ == "__main__":
    sys.exit(main())
