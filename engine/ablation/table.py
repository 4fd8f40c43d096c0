"""A table as its TOML file describes it: rows of flags, seeds, published numbers."""

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import RunError


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name: what it is called there.
    flags: what it adds to the table's flags, as main.py takes them.
    published: the literature's perplexities, "valid" and "test", where there are any.
    """

    name: str
    flags: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "row"


@dataclass(frozen=True)
class Table:
    """What is to be run: each row with each seed. The first row is the base of the comparison.

    flags: of every row, before its own.
    source: where the published numbers are from.
    """

    path: Path
    title: str
    flags: list[str]
    rows: list[Row]
    seeds: list[int]
    note: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        """The file's name without its suffix; the results' folder has it, too."""
        return self.path.stem


def load_table(path: str | Path, project: Path = Path()) -> Table:
    """Read a table.

    Keys: title, seeds, rows, and optionally recipe (a file of flags, as @FILE), flags, note,
    source. A row has a name, and optionally flags (one string, split as a shell does, or a list)
    and published = {valid = …, test = …}.

    Args:
        project: folder in which a recipe is looked for that the working directory lacks.

    Raises:
        RunError: no such file, not TOML, or not a table; names the row and the key.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
        return _table(path, content, project)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not TOML: {error}") from None
    except ValueError as error:
        raise RunError(f"{path}: {error}") from None


def _table(path: Path, content: dict[str, Any], project: Path) -> Table:
    _check_keys(content, dict(title=str, seeds=list, rows=list), "recipe flags note source")
    rows = [_row(number, row) for number, row in enumerate(content["rows"], start=1)]
    seeds = content["seeds"]
    if not rows or not seeds:
        raise ValueError("rows and seeds must not be empty")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ValueError(f"seeds are whole numbers, not {seeds}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds} name one twice")
    for i, row in enumerate(rows):
        for other in rows[:i]:
            if row.slug == other.slug:
                raise ValueError(
                    f"rows {other.name!r} and {row.name!r} would share the folder {row.slug!r}"
                )
    flags = _flags(content.get("flags", []))
    if recipe := _text(content, "recipe"):
        here = Path(recipe).exists() or not (project / recipe).exists()
        flags = [f"@{recipe if here else project / recipe}", *flags]
    notes = dict(note=_text(content, "note"), source=_text(content, "source"))
    return Table(path, str(content["title"]), flags, rows, list(seeds), **notes)


def _row(number: int, content: Any) -> Row:
    place = f"row {number}"
    if not isinstance(content, dict):
        raise ValueError(f"{place} is not a table of its own ([[rows]])")
    try:
        _check_keys(content, dict(name=str), "flags published")
        place = f"row {content['name']!r}"
        published = content.get("published", {})
        known = isinstance(published, dict) and published.keys() <= {"valid", "test"}
        if not known or not all(
            type(x) in (int, float) and 0 < x < 1e9 for x in published.values()
        ):
            raise ValueError("published is {valid = PPL, test = PPL}")
        flags = _flags(content.get("flags", []))
        return Row(content["name"], flags, {k: float(v) for k, v in published.items()})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _check_keys(content: dict[str, Any], required: dict[str, type], optional: str) -> None:
    for key, kind in required.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key} is missing or not a {kind.__name__}")
        if kind is str and not content[key].isprintable():
            raise ValueError(f"{key} has a line's end or another character that is none")
    if unknown := content.keys() - required.keys() - set(optional.split()):
        raise ValueError(f"unknown key {min(unknown)!r}")


def _text(content: dict[str, Any], key: str) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a string")
    return value.strip()


def _flags(value: Any) -> list[str]:
    if isinstance(value, str):
        return shlex.split(value, comments=True)
    if isinstance(value, list) and all(isinstance(flag, str) for flag in value):
        return value
    raise ValueError(f"flags are a string or a list of strings, not {value!r}")
