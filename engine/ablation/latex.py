"""An ablation table in LaTeX."""

import re
from typing import Any

from engine.ablation.columns import daggers, how_to_read, main_columns

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


def latex(figures: dict[str, Any]) -> str:
    """A floating table with caption and label, for \\input; it needs the package booktabs."""
    rows, columns = figures["rows"], main_columns(figures)
    left_out = [_one_line(line) for line in daggers(rows)]
    title = _one_line(figures["title"])
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
        *(_line([cell(row, 2) for cell in columns.values()]) for row in rows),
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
    text = re.sub(r"(?<![\w-])-(?=[\s\d.])", "−", _one_line(text))
    escaped = "".join(SPECIAL.get(c, c) for c in text)
    return re.sub("-(?=-)", "-{}", escaped)  # else -- becomes a dash


def _one_line(text: str) -> str:
    return " ".join(text.split())
