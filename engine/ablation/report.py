"""A table's figures as Markdown, CSV, LaTeX and JSON, and on a terminal."""

import csv
import io
import json
import re
import textwrap
from itertools import product
from pathlib import Path
from typing import Any

from data.files import atomic_write
from engine.ablation.columns import (
    COST,
    Columns,
    aligned,
    daggers,
    how_to_read,
    main_columns,
    sections,
)
from pictures.canvas import on_page

# What a narrow terminal leaves out first; then come the last columns.
LEAST = ("valid - base [95%]", "valid ppl", "p (test)", "seeds")
NARROWEST_NAME = 16
# What LaTeX takes for something else, or does not know.
SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "|": "\\textbar{}",
    "“": "``",
    "”": "''",
    '"': "''",
    **{c: f"${c}$" for c in "<>"},
    "−": "$-$",
    "±": "$\\pm$",
    "†": "$\\dagger$",
    "×": "$\\times$",
}


def write_report(figures: dict[str, Any], folder: Path, curves: str = "") -> list[Path]:
    """Write table.md, .csv, .tex and .json.

    Args:
        figures: from results.collect.
        folder: where to write them.
        curves: name of the picture that the page shows.

    Returns:
        The files.
    """
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
    (title, columns, rows, notes), *others = sections(figures)
    parts = [f"# {title}", figures["note"], aligned(columns, rows), *notes]
    if curves:
        parts.append(on_page("Validation perplexity per epoch", curves))
    for title, columns, shown, notes in others:
        parts += [f"## {title}", aligned(columns, shown), *notes]
    parts += ["## Runs", aligned(COST, rows)]
    parts.append(f"Flags of every row: `{figures['flags']}`" if figures["flags"] else "")
    made = list(figures["made_with"])
    if len(made) > 1:
        made = ["**made in different ways, which the seeds do not share**: " + "; ".join(made)]
    made += [f"commit {c[:12]}{'-dirty' * c.endswith('-dirty')}" for c in figures["commits"]]
    parts.append(", ".join(made))
    return "\n\n".join(part for part in parts if part) + "\n"


# On a terminal


def on_terminal(figures: dict[str, Any], width: int, page: Path) -> str:
    """The report without flags and links, in lines of at most `width` characters.

    Tables that are too wide have fewer decimals, then fewer columns.

    Args:
        figures: from results.collect.
        width: of the terminal, characters.
        page: the report in full, to refer to.
    """
    parts = [_filled(figures["note"], width)] if figures["note"] else []
    missing = ["flags and runs"]
    for section, shorter in zip(sections(figures), sections(figures, digits=1), strict=True):
        title, columns, rows, notes = section
        table, left_out = _fitted([columns, shorter[1]], rows, width)
        missing += left_out
        parts += [_filled(title, width), table, *(_filled(note, width) for note in notes)]
    parts.append(_filled(f"The rest ({', '.join(missing)}) is in {page}", width))
    return "\n\n".join(parts) + "\n"


def _fitted(forms: list[Columns], rows: list[dict[str, Any]], width: int) -> tuple[str, list[str]]:
    """A table of at most `width` characters, and the headings of the columns it leaves out.

    forms: the same columns in two or more forms, the widest first.
    """
    room = max(NARROWEST_NAME, width // 3)
    rows = [dict(row, name=_shortened(row["name"], room)) for row in rows]
    first, *names = forms[0]
    order = [name for name in LEAST if name in names]
    order += [name for name in reversed(names) if name not in LEAST]
    for number, columns in product(range(len(order) + 1), forms):
        kept = [first, *(name for name in names if name not in order[:number])]
        table = aligned({name: columns[name] for name in kept}, rows)
        if table.index("\n") <= width:
            break
    return "\n".join(_shortened(line, width) for line in table.splitlines()), order[:number]


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(0, room - 1)]}…"


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, max(1, width), break_on_hyphens=False)


# CSV and JSON


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


# LaTeX


def latex(figures: dict[str, Any]) -> str:
    """A floating table with caption and label, for \\input; it needs the package booktabs."""
    rows, columns = figures["rows"], main_columns(figures)
    left_out = [" ".join(line.split()) for line in daggers(rows)]
    title = figures["title"].strip()
    caption = [title + "." * (title[-1:] not in ".?!"), how_to_read(figures)]
    caption += ["† Not all seeds: see the comments below the table."] * bool(left_out)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escaped(' '.join(caption))}}}",
        f"\\label{{tab:{re.sub(r'[^0-9A-Za-z]+', '-', figures['table'])}}}",
        "\\small",
        "\\setlength{\\tabcolsep}{4pt}",
        "\\begin{tabular}{l" + "r" * (len(columns) - 1) + "}",
        "\\toprule",
        _line(list(columns)),
        "\\midrule",
        *(_line([cell(row) for cell in columns.values()]) for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
        *(f"% {line}" for line in left_out),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    line = " & ".join("--" if cell == "-" else escaped(cell) for cell in cells)
    return "{}" * line.startswith(("[", "*")) + line + " \\\\"  # else an argument of the last \\


def escaped(text: str) -> str:
    """Text for LaTeX; a hyphen before a number, or between or before words, is a minus."""
    text = re.sub(r"(?<![\w-])-(?=[\s\d.])", "−", " ".join(text.split()))
    text = "".join(SPECIAL.get(c, c) for c in text)
    return re.sub("-(?=-)", "-{}", text)  # else -- becomes a dash
