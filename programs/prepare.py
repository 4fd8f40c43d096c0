"""Make a corpus of one's own texts: python prepare.py FILE… --output data/mine"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from data.files import SPLITS
from data.prepare import Preparation, examples, prepare
from engine.progress import Progress
from engine.tracking import warn
from flags.preparation import parse_preparation

EXAMPLES, WIDTH = 10, 100  # lines shown, and characters of each
MANY = 0.1  # share of <unk> that is warned about


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, DataError: errors that a user can cause; see engine.program.
    """
    args = parse_preparation(argv)
    how = {field.name: getattr(args, field.name) for field in fields(Preparation)}
    how["split"] = tuple(how["split"])
    output = Path(args.output)
    with ExitStack() as stack:
        bars: dict[str, Progress] = {}

        def update(task: str, done: int, total: int) -> None:
            if task not in bars:
                for bar in bars.values():  # of the task before
                    bar.close()
                bars[task] = stack.enter_context(Progress(total, description=task, unit="B"))
                bars[task].report(f"| {task} words, {total:,} bytes")
            bars[task].update(done)

        record = prepare(args.texts, output, Preparation(**how), update)
    print(f"| {output} | files: {record['files']:,} | bytes: {record['bytes']:,}")
    for split in SPLITS:
        part = record[split]
        print(
            f"| {split:5} | {part['lines'] + part['words']:>13,} tokens with <eos> | "
            f"{part['lines']:>11,} lines | {part['unknown'] / part['words']:6.2%} <unk>"
        )
    print(
        f"| vocabulary | {record['vocabulary']:,} words with <eos>, of "
        f"{record['words_of_train']:,} different ones in the training text"
    )
    print("| lines of train.txt:")
    for line in examples(output / "train.txt", EXAMPLES):
        print(f"|   {line if len(line) <= WIDTH else line[: WIDTH - 1] + '…'}")
    if not record["train"]["unknown"] and any(record[split]["unknown"] for split in SPLITS):
        warn(
            "train.txt has no <unk>, and valid.txt or test.txt has: a model cannot learn when to "
            "expect it; --min-count 2 or a smaller --vocab-size gives train.txt some"
        )
    for split in SPLITS:
        share = record[split]["unknown"] / record[split]["words"]
        if share > MANY:
            warn(
                f"{split}.txt: {share:.0%} of its words are <unk>, which is easy to predict: "
                "perplexities will look better than they are; a larger --vocab-size, a smaller "
                "--min-count or more text leaves fewer"
            )
    print(f"| python main.py --data {output} --epochs 20 --dry-run says what training on it takes")
