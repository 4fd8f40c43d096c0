"""Sample text from a model: python generate.py PTB.pt --prompt "the price of"

The program is programs/generate.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.generate", argv, "flags.generation.parse_generation")


if __name__ == "__main__":
    leave(main)
