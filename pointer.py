"""Test a model with a continuous cache: python pointer.py --data data/penn --save PTB.pt

The program is programs/pointer.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.pointer", argv, "flags.evaluation.parse_pointer")


if __name__ == "__main__":
    leave(main)
