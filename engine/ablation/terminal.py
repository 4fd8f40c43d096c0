"""An ablation table on a terminal, fitted to its width."""

import textwrap
from pathlib import Path
from typing import Any

from engine.ablation.columns import (
    FILTER,
    HOW_TO_READ_FILTER,
    PUBLISHED,
    Columns,
    agreement_in_words,
    aligned,
    compared,
    daggers,
    how_to_read,
    main_columns,
)

# What is left out first; then come the last columns.
LEAST = ("valid - base [95%]", "valid ppl", "p (test)", "seeds")
NARROWEST_NAME = 16


def on_terminal(figures: dict[str, Any], width: int, page: Path) -> str:
    """The report without flags and links, in lines of at most `width` characters.

    Tables that are too wide have fewer decimals, then fewer columns.

    Args:
        figures: from results.collect.
        width: of the terminal, characters.
        page: the report in full, to refer to.
    """
    room = max(NARROWEST_NAME, width // 3)
    rows = [dict(row, name=_shortened(row["name"], room)) for row in figures["rows"]]
    words = [*daggers(figures["rows"]), figures["note"], how_to_read(figures)]
    filtered = [row for row in rows if row["filter"]]
    published = [one for row in rows for one in compared(row)]
    tables: list[tuple[str, Columns, list[dict[str, Any]], list[str]]] = [
        (figures["title"], main_columns(figures), rows, words),
        (
            "Against the literature",
            PUBLISHED,
            published,
            [agreement_in_words(figures), figures["source"]],
        ),
        ("What the gradient filter did", FILTER, filtered, [HOW_TO_READ_FILTER]),
    ]
    parts, missing = [], ["flags and runs"]
    for title, columns, shown, notes in tables:
        if shown:
            table, left_out = fitted(columns, shown, width)
            parts += [_filled(title, width), table]
            parts += [_filled(note, width) for note in notes if note]
            missing += left_out
    parts.append(_filled(f"The rest ({', '.join(missing)}) is in {page}", width))
    return "\n\n".join(parts) + "\n"


def fitted(columns: Columns, rows: list[dict[str, Any]], width: int) -> tuple[str, list[str]]:
    """A table of at most `width` characters, and the headings of the columns it leaves out."""
    order = [name for name in LEAST if name in columns]
    order += [name for name in reversed(list(columns)[1:]) if name not in order]
    for left_out in (order[:n] for n in range(len(order) + 1)):
        kept = {name: cell for name, cell in columns.items() if name not in left_out}
        for digits in (2, 1):
            table = aligned(kept, rows, digits)
            if table.index("\n") <= width:
                return table, left_out
    return "\n".join(_shortened(line, width) for line in table.splitlines()), left_out


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(0, room - 1)]}…"


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, max(1, width), break_on_hyphens=False)
