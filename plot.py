"""Draw the curves of runs: python plot.py PTB

The program is programs/plot.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.plot", argv, "flags.plotting.parse_plotting")


if __name__ == "__main__":
    leave(main)
