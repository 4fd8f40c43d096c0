"""The columns of an ablation table, and what its cells say."""

from collections.abc import Callable
from typing import Any

MISSING = "n/a"
HUGE = 1e6  # from here on a perplexity is written as 1.2e+06


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A perplexity, or a difference of two, as tables show it."""
    if value is None:
        return MISSING
    return f"{value:{sign}.{digits}f}" if abs(value) < HUGE else f"{value:{sign}.2g}"


def _mean_and_sd(spread: dict[str, Any], digits: int) -> str:
    if spread["mean"] is None:
        return "-"
    sd = "" if spread["sd"] is None else f" ± {number(spread['sd'], digits)}"
    return f"{number(spread['mean'], digits)}{sd}"


def _difference(row: dict[str, Any], split: str, digits: int) -> str:
    if row["difference"] is None:
        return "base"
    difference = row["difference"][split]
    if difference["mean"] is None:
        return "-"
    low, high = (number(difference[end], digits, "+") for end in ("low", "high"))
    reach = f"[{low}, {high}]" if difference["low"] is not None else f"[{MISSING}]"
    return f"{number(difference['mean'], digits, '+')} {reach}"


def _p(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    difference = row["difference"]["test"]
    if difference["mean"] is None:
        return "-"
    p = difference["p_holm"]
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds_per_epoch']:.1f}"


def _seeds(row: dict[str, Any]) -> str:
    done = sum(run["state"] == "done" for run in row["runs"])
    return str(done) if not row["left_out"] else f"{done} of {len(row['runs'])} †"


def _pair(values: dict[str, float], digits: int, sign: str = "") -> str:
    return " / ".join(number(values.get(split), digits, sign) for split in ("valid", "test"))


# A column: its heading, and what a row has there, with so many decimals.
Columns = dict[str, Callable[[dict[str, Any], int], str]]


MAIN: Columns = {
    "": lambda row, _: row["name"],
    "seeds": lambda row, _: _seeds(row),
    "valid ppl": lambda row, digits: _mean_and_sd(row["valid"], digits),
    "test ppl": lambda row, digits: _mean_and_sd(row["test"], digits),
    "valid - base [95%]": lambda row, digits: _difference(row, "valid", digits),
    "test - base [95%]": lambda row, digits: _difference(row, "test", digits),
    "p (test)": lambda row, _: _p(row),
}


def main_columns(figures: dict[str, Any]) -> Columns:
    """MAIN, and a column for each stage and split that it measures."""

    def cell(name: str, split: str) -> Callable[[dict[str, Any], int], str]:
        return lambda row, digits: _mean_and_sd(row["after"][name][split], digits)

    stages = [(name, split) for name, splits in figures["after"].items() for split in splits]
    return {**MAIN, **{f"{name}, {split} ppl": cell(name, split) for name, split in stages}}


def compared(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row, and the row after each stage, where there are published figures."""
    after = [dict(found, name=f"{row['name']}, {name}") for name, found in row["after"].items()]
    return [one for one in (row, *after) if one["published"]]


def agreement_in_words(figures: dict[str, Any]) -> str:
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
    return f"{start}: {'; '.join(parts)}." if parts else ""


PUBLISHED: Columns = {
    "valid / test ppl": lambda row, _: row["name"],
    "published": lambda row, digits: _pair(row["published"], digits),
    "here": lambda row, digits: _pair({s: row[s]["mean"] for s in ("valid", "test")}, digits),
    "here - published": lambda row, digits: _pair(row["beyond_published"], digits, "+"),
}
COST: Columns = {
    "": lambda row, _: row["name"],
    "flags": lambda row, _: f"`{row['flags']}`" if row["flags"] else "",
    "parameters": lambda row, _: "-" if row["parameters"] is None else f"{row['parameters']:,.0f}",
    "s/epoch": lambda row, _: "-" if row["seconds_per_epoch"] is None else _seconds(row),
    "runs, by seed": lambda row, _: " ".join(f"[{r['seed']}]({r['folder']})" for r in row["runs"]),
}
FILTER: Columns = {
    "": lambda row, _: row["name"],
    "median's factor": lambda row, _: f"{row['filter']['scale']:.3f}",
    "sequences below 0.9 of it": lambda row, _: f"{100 * row['filter']['singled_out']:.2f}%",
    "smallest / median's": lambda row, _: f"{row['filter']['smallest']:.3g}",
    "weights' / median's": lambda row, _: f"{row['filter']['params']:.3f}",
}
HOW_TO_READ_FILTER = (
    "In the backward pass the filter multiplies each sequence's gradient by a factor, the weights' "
    "by the inverse of the mean inverse factor. The median sequence's factor is a scale, as a "
    "smaller learning rate would be; the other columns are relative to it. Means over updates and "
    "layers."
)


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


def aligned(columns: Columns, rows: list[dict[str, Any]], digits: int = 2) -> str:
    """A Markdown table whose columns are aligned."""
    header = list(columns)
    body = [[cell(row, digits).replace("|", "\\|") for cell in columns.values()] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [header, ["-" * width for width in widths], *body]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
