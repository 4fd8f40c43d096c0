"""Checks the command lines of the programs that a table runs after main.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import UsageError
from flags.evaluation import EVALUATION, parse_evaluation
from flags.finetuning import FINETUNING, parse_finetuning
from flags.flag import Sections, dashed
from flags.parser import Parser

# By the program's file: its flags, what checks a command line, and flags that a table may not give.
PROGRAMS: Mapping[str, tuple[Sections, Callable[[Sequence[str]], Any], tuple[str, ...]]] = {
    "finetune.py": (FINETUNING, parse_finetuning, ("seed", "dry_run")),
    "evaluate.py": (EVALUATION, parse_evaluation, ("per_word", "by_line", "text")),
}


def check_stage(program: str, ours: Sequence[str], argv: Sequence[str]) -> None:
    """Check a stage's command line before anything runs.

    Args:
        program: its file.
        ours: the part that ablate.py gives, which comes first.
        argv: all of it.

    Raises:
        UsageError: the program would refuse it, or the table gives a flag that is not its own.
    """
    sections, parse, taken = PROGRAMS[program]
    try:
        parse(argv)
        given, fixed = Parser(sections).given(argv), Parser(sections).given(ours)
    except SystemExit:  # from -h
        raise UsageError("-h runs nothing") from None
    for name, value in given.items():
        if fixed[name] != value if name in fixed else name in taken:
            raise UsageError(f"argument {dashed(name)}: a table may not give it")
