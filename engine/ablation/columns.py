"""The columns of an ablation table, and what its cells say."""

from collections.abc import Callable
from typing import Any

MISSING = "n/a"
HUGE = 1e6  # from here on a perplexity is written as 1.2e+06

# A column: its heading, and what a row has there.
Columns = dict[str, Callable[[dict[str, Any]], str]]


def number(value: float | None, sign: str = "", digits: int = 2) -> str:
    """A perplexity, or a difference of two, as tables show it."""
    if value is None:
        return MISSING
    return f"{value:{sign}.{digits}f}" if abs(value) < HUGE else f"{value:{sign}.2g}"


def _mean_and_sd(spread: dict[str, Any], digits: int) -> str:
    if spread["mean"] is None:
        return "-"
    sd = "" if spread["sd"] is None else f" ± {number(spread['sd'], digits=digits)}"
    return f"{number(spread['mean'], digits=digits)}{sd}"


def _difference(row: dict[str, Any], split: str, digits: int) -> str:
    if row["difference"] is None:
        return "base"
    difference = row["difference"][split]
    if difference["mean"] is None:
        return "-"
    ends = [number(difference[end], "+", digits) for end in ("low", "high")]
    reach = ", ".join(ends) if difference["low"] is not None else MISSING
    return f"{number(difference['mean'], '+', digits)} [{reach}]"


def _p(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    difference = row["difference"]["test"]
    if difference["mean"] is None:
        return "-"
    p = difference["p_holm"]
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seeds(row: dict[str, Any]) -> str:
    done = sum(run["state"] == "done" for run in row["runs"])
    return str(done) if not row["left_out"] else f"{done} of {len(row['runs'])} †"


def _pair(values: dict[str, float], sign: str = "") -> str:
    return " / ".join(number(values.get(split), sign) for split in ("valid", "test"))


def main_columns(figures: dict[str, Any], digits: int = 2) -> Columns:
    """The table's own columns, and one for each stage and split that it measures.

    Args:
        figures: from results.collect.
        digits: decimals of perplexities and their differences.
    """

    def after(name: str, split: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: _mean_and_sd(row["after"][name][split], digits)

    stages = [(name, split) for name, splits in figures["after"].items() for split in splits]
    return {
        "": lambda row: row["name"],
        "seeds": _seeds,
        "valid ppl": lambda row: _mean_and_sd(row["valid"], digits),
        "test ppl": lambda row: _mean_and_sd(row["test"], digits),
        "valid - base [95%]": lambda row: _difference(row, "valid", digits),
        "test - base [95%]": lambda row: _difference(row, "test", digits),
        "p (test)": _p,
        **{f"{name}, {split} ppl": after(name, split) for name, split in stages},
    }


PUBLISHED: Columns = {
    "valid / test ppl": lambda row: row["name"],
    "published": lambda row: _pair(row["published"]),
    "here": lambda row: _pair({split: row[split]["mean"] for split in ("valid", "test")}),
    "here - published": lambda row: _pair(row["beyond_published"], "+"),
}
COST: Columns = {
    "": lambda row: row["name"],
    "flags": lambda row: f"`{row['flags']}`" if row["flags"] else "",
    "parameters": lambda row: "-" if row["parameters"] is None else f"{row['parameters']:,.0f}",
    "s/epoch": lambda row: (
        "-" if row["seconds_per_epoch"] is None else f"{row['seconds_per_epoch']:.1f}"
    ),
    "runs, by seed": lambda row: " ".join(f"[{r['seed']}]({r['folder']})" for r in row["runs"]),
}
FILTER: Columns = {
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


Section = tuple[str, Columns, list[dict[str, Any]], list[str]]


def sections(figures: dict[str, Any], digits: int = 2) -> list[Section]:
    """The report's tables: the title of each, its columns and rows, and what to know of them.

    digits: see main_columns.
    """
    rows = figures["rows"]
    words = [*daggers(rows), how_to_read(figures)]
    found: list[Section] = [(figures["title"], main_columns(figures, digits), rows, words)]
    published = []
    for row in rows:
        stages = [dict(own, name=f"{row['name']}, {name}") for name, own in row["after"].items()]
        published += [one for one in (row, *stages) if one["published"]]
    if published:
        source = [f"Published: {figures['source']}"] if figures["source"] else []
        words = [*agreement_in_words(figures), *source]
        found.append(("Against the literature", PUBLISHED, published, words))
    if filtered := [row for row in rows if row["filter"]]:
        found.append(("What the gradient filter did", FILTER, filtered, [HOW_TO_READ_FILTER]))
    return found


def agreement_in_words(figures: dict[str, Any]) -> list[str]:
    """How the rows' differences to the base compare with the published ones; empty if none do."""
    parts = []
    for split, found in figures["agreement"].items():
        if not found["n"]:
            continue
        part = f"{split}: {found['same_sign']} of {found['n']} have its sign"
        if found["tau"] is not None:
            part += f", Kendall's tau {found['tau']:+.2f} (n = {found['n']}, p = {found['p']:.3f})"
        parts.append(part)
    start = f"Differences to “{figures['base']}”, held against the published difference"
    return [f"{start}: {'; '.join(parts)}."] if parts else []


def daggers(rows: list[dict[str, Any]]) -> list[str]:
    """Which runs are left out of each row, and why."""
    return [f"† {row['name']}: {'; '.join(row['left_out'])}" for row in rows if row["left_out"]]


def how_to_read(figures: dict[str, Any]) -> str:
    """What a row's figures mean."""
    return (
        f"Mean ± standard deviation over the seeds ({', '.join(map(str, figures['seeds']))}). "
        f"Differences to “{figures['base']}” are paired by seed, with Student's 95% interval, "
        "which wants the differences to be roughly normal; p is the paired t test's, adjusted "
        "over the rows by Holm's method. n/a: too few seeds to say (an interval takes two, a "
        "test three)."
    )


def aligned(columns: Columns, rows: list[dict[str, Any]]) -> str:
    """A Markdown table whose columns are aligned."""
    header = list(columns)
    body = [[cell(row).replace("|", "\\|") for cell in columns.values()] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [header, ["-" * width for width in widths], *body]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
