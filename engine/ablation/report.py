"""A table's figures as Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import atomic_write

MISSING = "n/a"
HUGE = 1e6  # from here on a perplexity is written as 1.2e+06


def write_report(figures: dict[str, Any], folder: Path, curves: bool) -> list[Path]:
    """Write table.md, .csv, .tex and .json.

    Args:
        figures: from results.collect.
        folder: made if need be.
        curves: the page shows curves.png.

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


# Cells


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A perplexity, or a difference of two, as tables show it."""
    if value is None:
        return MISSING
    return f"{value:{sign}.{digits}f}" if abs(value) < HUGE else f"{value:{sign}.2g}"


def _mean_and_sd(spread: dict[str, Any]) -> str:
    if spread["mean"] is None:
        return "-"
    sd = "" if spread["sd"] is None else f" ± {number(spread['sd'])}"
    return f"{number(spread['mean'])}{sd}"


def _difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "base"
    if difference["mean"] is None:
        return "-"
    low, high = (number(difference[end], 2, "+") for end in ("low", "high"))
    reach = f"[{low}, {high}]" if difference["low"] is not None else f"[{MISSING}]"
    return f"{number(difference['mean'], 2, '+')} {reach}"


def _p(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    if difference["mean"] is None:
        return "-"
    p = difference["p_holm"]
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds_per_epoch']:.1f}"


def _seeds(row: dict[str, Any]) -> str:
    done = sum(run["state"] == "done" for run in row["runs"])
    return str(done) if not row["left_out"] else f"{done} of {len(row['runs'])} †"


def _pair(values: dict[str, float], sign: str = "") -> str:
    return " / ".join(number(values.get(split), 2, sign) for split in ("valid", "test"))


MAIN: dict[str, Callable[[dict[str, Any]], str]] = {
    "": lambda row: row["name"],
    "seeds": _seeds,
    "valid ppl": lambda row: _mean_and_sd(row["valid"]),
    "test ppl": lambda row: _mean_and_sd(row["test"]),
    "valid - base [95%]": lambda row: _difference(row["difference"] and row["difference"]["valid"]),
    "test - base [95%]": lambda row: _difference(row["difference"] and row["difference"]["test"]),
    "p (test)": lambda row: _p(row["difference"] and row["difference"]["test"]),
}


def _main_columns(figures: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """MAIN, and a column for each stage and split that it measures."""

    def cell(name: str, split: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: _mean_and_sd(row["after"][name][split])

    stages = [(name, split) for name, splits in figures["after"].items() for split in splits]
    return {**MAIN, **{f"{name}, {split} ppl": cell(name, split) for name, split in stages}}


def _compared(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row, and the row after each stage, where there are published figures."""
    after = [dict(found, name=f"{row['name']}, {name}") for name, found in row["after"].items()]
    return [one for one in (row, *after) if one["published"]]


PUBLISHED: dict[str, Callable[[dict[str, Any]], str]] = {
    "valid / test ppl": lambda row: row["name"],
    "published": lambda row: _pair(row["published"]),
    "here": lambda row: _pair({split: row[split]["mean"] for split in ("valid", "test")}),
    "here - published": lambda row: _pair(row["beyond_published"], "+"),
}
COST: dict[str, Callable[[dict[str, Any]], str]] = {
    "": lambda row: row["name"],
    "flags": lambda row: f"`{row['flags']}`" if row["flags"] else "",
    "parameters": lambda row: "-" if row["parameters"] is None else f"{row['parameters']:,.0f}",
    "s/epoch": lambda row: "-" if row["seconds_per_epoch"] is None else _seconds(row),
    "runs, by seed": lambda row: " ".join(f"[{r['seed']}]({r['folder']})" for r in row["runs"]),
}
FILTER: dict[str, Callable[[dict[str, Any]], str]] = {
    "": lambda row: row["name"],
    "median's factor": lambda row: f"{row['filter']['scale']:.3f}",
    "sequences below 0.9 of it": lambda row: f"{100 * row['filter']['singled_out']:.2f}%",
    "smallest / median's": lambda row: f"{row['filter']['smallest']:.3g}",
    "weights' / median's": lambda row: f"{row['filter']['params']:.3f}",
}
HOW_TO_READ_FILTER = (
    "In the backward pass the filter multiplies each sequence's gradient by a factor, the weights' "
    "by the inverse of the mean inverse factor. The median sequence's factor is a scale, as a "
    "smaller learning rate would be; the other columns are relative to it. Means over updates and "
    "layers."
)


# Markdown


def markdown(figures: dict[str, Any], curves: bool) -> str:
    """The whole report as Markdown, columns aligned so that a terminal shows it well, too."""
    rows = figures["rows"]
    parts = [f"# {figures['title']}", figures["note"], _aligned(_main_columns(figures), rows)]
    parts += [f"† {row['name']}: {'; '.join(row['left_out'])}" for row in rows if row["left_out"]]
    parts.append(_how_to_read(figures))
    if curves:
        parts.append("![Validation perplexity per epoch](curves.png)")
    if published := [one for row in rows for one in _compared(row)]:
        parts += ["## Against the literature", _aligned(PUBLISHED, published)]
        parts.append(f"Published: {figures['source']}" if figures["source"] else "")
    if filtered := [row for row in rows if row["filter"]]:
        parts += ["## What the gradient filter did", _aligned(FILTER, filtered), HOW_TO_READ_FILTER]
    parts += ["## Runs", _aligned(COST, rows)]
    parts.append(f"Flags of every row: `{figures['flags']}`" if figures["flags"] else "")
    made = list(figures["made_with"])
    if len(made) > 1:
        made = ["**made in different ways, which the seeds do not share**: " + "; ".join(made)]
    made += [f"commit {c[:12]}{'-dirty' * c.endswith('-dirty')}" for c in figures["commits"]]
    parts.append(", ".join(made))
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_to_read(figures: dict[str, Any]) -> str:
    return (
        f"Mean ± standard deviation over the seeds ({', '.join(map(str, figures['seeds']))}). "
        f"Differences to “{figures['base']}” are paired by seed, with Student's 95% interval, "
        "which wants the differences to be roughly normal; p is the paired t test's, adjusted "
        "over the rows by Holm's method. n/a: too few seeds to say (an interval takes two, a "
        "test three)."
    )


def _aligned(
    columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]
) -> str:
    header = list(columns)
    body = [[cell(row).replace("|", "\\|") for cell in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["-" * max(3, width) for width in widths]
    lines = [header, rule, *body]
    padded = [[c.ljust(max(3, w)) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# CSV and LaTeX


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


def latex(figures: dict[str, Any]) -> str:
    """A tabular for the booktabs package, with a caption; \\input it into a table."""
    columns = _main_columns(figures)
    names = list(columns)[1:]
    lines = [
        f"% {figures['title']}; needs \\usepackage{{booktabs}}",
        "\\begin{tabular}{l" + "r" * len(names) + "}",
        "\\toprule",
        " & ".join(["", *map(_escaped, names)]) + " \\\\",
        "\\midrule",
    ]
    lines += [
        " & ".join(_escaped(c(row)) for c in columns.values()) + " \\\\" for row in figures["rows"]
    ]
    lines += ["\\bottomrule", "\\end{tabular}"]
    left_out = [
        f"% {row['name']}: {'; '.join(row['left_out'])}"
        for row in figures["rows"]
        if row["left_out"]
    ]
    return "\n".join([*lines, *left_out]) + "\n"


def _escaped(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"}
    special.update(
        {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    )
    special.update({"±": "$\\pm$", "†": "$\\dagger$", "<": "$<$", "−": "$-$", "×": "$\\times$"})
    return "".join(special.get(c, c) for c in text)
