"""A table's figures as Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from data.files import atomic_write
from engine.ablation.columns import (
    COST,
    FILTER,
    HOW_TO_READ_FILTER,
    PUBLISHED,
    agreement_in_words,
    aligned,
    compared,
    daggers,
    how_to_read,
    main_columns,
)
from engine.ablation.latex import latex
from pictures.canvas import on_page


def write_report(figures: dict[str, Any], folder: Path, curves: str = "") -> list[Path]:
    """Write table.md, .csv, .tex and .json.

    Args:
        figures: from results.collect.
        folder: made if need be.
        curves: name of the picture that the page shows.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "table.md": markdown(figures, curves),
        "table.csv": comma_separated(figures),
        "table.tex": latex(figures),
        "table.json": json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        with atomic_write(folder / name, "w") as file:
            file.write(content)
    return [folder / name for name in contents]


# Markdown


def markdown(figures: dict[str, Any], curves: str = "") -> str:
    """The whole report as Markdown, its columns aligned; curves: see write_report."""
    rows = figures["rows"]
    parts = [f"# {figures['title']}", figures["note"], aligned(main_columns(figures), rows)]
    parts += [*daggers(rows), how_to_read(figures)]
    if curves:
        parts.append(on_page("Validation perplexity per epoch", curves))
    if published := [one for row in rows for one in compared(row)]:
        parts += ["## Against the literature", aligned(PUBLISHED, published)]
        parts.append(agreement_in_words(figures))
        parts.append(f"Published: {figures['source']}" if figures["source"] else "")
    if filtered := [row for row in rows if row["filter"]]:
        parts += ["## What the gradient filter did", aligned(FILTER, filtered), HOW_TO_READ_FILTER]
    parts += ["## Runs", aligned(COST, rows)]
    parts.append(f"Flags of every row: `{figures['flags']}`" if figures["flags"] else "")
    made = list(figures["made_with"])
    if len(made) > 1:
        made = ["**made in different ways, which the seeds do not share**: " + "; ".join(made)]
    made += [f"commit {c[:12]}{'-dirty' * c.endswith('-dirty')}" for c in figures["commits"]]
    parts.append(", ".join(made))
    return "\n\n".join(part for part in parts if part) + "\n"


# CSV


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row's figures without nesting, for CSV and W&B."""
    values: dict[str, Any] = dict(row=row["name"], flags=row["flags"])
    for split in ("valid", "test"):
        values[f"{split}_n"] = row[split]["n"]
        values[f"{split}_mean"], values[f"{split}_sd"] = row[split]["mean"], row[split]["sd"]
        difference = row["difference"][split] if row["difference"] else {}
        for key in ("n", "mean", "sd", "low", "high", "p", "p_holm", "sign_flip_p"):
            values[f"{split}_difference_{key}"] = difference.get(key)
        values[f"{split}_published"] = row["published"].get(split)
        values[f"{split}_beyond_published"] = row["beyond_published"].get(split)
        for name, found in row["after"].items():
            spread = found[split]
            values.update({f"{name}_{split}_{key}": spread[key] for key in ("n", "mean", "sd")})
    values.update(parameters=row["parameters"], seconds_per_epoch=row["seconds_per_epoch"])
    return dict(values, left_out="; ".join(row["left_out"]))


def comma_separated(figures: dict[str, Any]) -> str:
    """One line a row, numbers in full; an empty field where there is none."""
    rows = [flat(row) for row in figures["rows"]]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
