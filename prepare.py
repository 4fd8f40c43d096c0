"""Make a corpus of your own texts: python prepare.py FILE… --output data/mine

The program is programs/prepare.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.prepare", argv, "flags.preparation.parse_preparation")


if __name__ == "__main__":
    leave(main)
