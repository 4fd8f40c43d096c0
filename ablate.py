"""Run an ablation table and print it: python ablate.py ablations/demo.toml --jobs 2

The program is programs/ablate.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.ablate", argv, "flags.ablation.parse_ablation")


if __name__ == "__main__":
    leave(main)
