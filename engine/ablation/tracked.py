"""An ablation table in Weights & Biases."""

import importlib
from pathlib import Path
from typing import Any

from engine.tracking import WandbOptions, WandbRun


def log_table(
    folder: Path, options: WandbOptions, rows: list[dict[str, Any]], picture: Path | None
) -> None:
    """Log a finished table as a W&B run of its own; a failure costs one warning.

    Args:
        folder: where W&B keeps its files.
        rows: the table's lines, all with the same keys.
        picture: a PNG to go with it.
    """
    tracked = WandbRun(folder, {}, options, None)

    def send(run: Any) -> None:
        wandb = importlib.import_module("wandb")
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        images = {} if picture is None else {"curves": wandb.Image(str(picture))}
        run.log({"table": table, **images})

    tracked.attempt(send)
    tracked.close(0)
