"""Fine-tune a model that main.py saved, then test it: python finetune.py --save PTB.pt

The program is programs/finetune.py.
"""

from collections.abc import Sequence

from engine.launch import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from engine.program import run_program

    return run_program("programs.finetune", argv, "flags.finetuning.parse_finetuning")


if __name__ == "__main__":
    leave(main)
