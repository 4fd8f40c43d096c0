"""Write a model as safetensors: python export.py PTB.pt --output ptb

The program is programs/export.py.
"""

import sys
from collections.abc import Sequence

from engine.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_program("programs.export", argv, "flags.export.parse_export")


if __name__ == "__main__":
    sys.exit(main())
