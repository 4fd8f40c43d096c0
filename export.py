"""Write a model as safetensors: python export.py PTB.pt --output ptb

The program is programs/export.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.export", argv, "flags.export.parse_export")


if __name__ == "__main__":
    leave(main)
