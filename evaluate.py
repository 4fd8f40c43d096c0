"""Measure the perplexity of a text under a trained model: python evaluate.py PTB.pt

The program is programs/evaluate.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.evaluate", argv, "flags.evaluation.parse_evaluation")


if __name__ == "__main__":
    leave(main)
