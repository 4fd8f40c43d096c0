"""Run an ablation table and print it: python ablate.py ablations/demo.toml --jobs 2

The program is programs/ablate.py.
"""

import sys
from collections.abc import Sequence

from engine.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_program("programs.ablate", argv, "flags.ablation.parse_ablation")


if __name__ == "__main__":
    sys.exit(main())
