"""Look at how gradients flow back through time: python diagnose.py PTB.pt --data data/penn

The program is programs/diagnose.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.diagnose", argv, "flags.diagnosis.parse_diagnosis")


if __name__ == "__main__":
    leave(main)
