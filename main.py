"""Train an AWD-LSTM language model, then test it: python main.py @recipes/demo.txt

The program is programs/train.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.train", argv, "flags.training.parse_training")


if __name__ == "__main__":
    leave(main)
