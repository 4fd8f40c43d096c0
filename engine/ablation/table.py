"""A table as its TOML file describes it: rows of flags, seeds, published numbers."""

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from engine.ablation.stages import STAGES, After
from engine.errors import RunError


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name: what it is called there.
    flags: what it adds to the table's flags, as main.py takes them.
    published: the literature's perplexities, "valid" and "test", where there are any.
    published_after: the same after a stage, by its name.
    after: what is run on its models, instead of the table's; None: the table's.
    """

    name: str
    flags: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    published_after: dict[str, dict[str, float]] = field(default_factory=dict)
    after: list[After] | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "row"


@dataclass(frozen=True)
class Table:
    """What is to be run: each row with each seed. The first row is the base of the comparison.

    flags: of every row, before its own.
    source: where the published numbers are from.
    after: what is run on each model, in this order.
    """

    path: Path
    title: str
    flags: list[str]
    rows: list[Row]
    seeds: list[int]
    note: str = ""
    source: str = ""
    after: list[After] = field(default_factory=list)

    def after_of(self, row: Row) -> list[After]:
        """What is run on a row's models."""
        return self.after if row.after is None else row.after

    @property
    def stages(self) -> list[str]:
        """Names of all stages, in the order of the columns."""
        return list(dict.fromkeys(a.name for row in self.rows for a in self.after_of(row)))

    @property
    def name(self) -> str:
        """The file's name without its suffix; the results' folder has it, too."""
        return self.path.stem


def load_table(path: str | Path, project: Path = Path()) -> Table:
    """Read a table.

    Keys: title, seeds, rows, and optionally recipe (a file of flags, as @FILE), flags, note,
    source, after. A row has a name, and optionally flags (one string, split as a shell does, or a
    list), after (instead of the table's) and published = {valid = …, test = …}, where a stage's
    name stands for such a pair, too. `after` is a list of stages, each with flags or without:
    ["finetune --lr 5"].

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
    _check_keys(content, dict(title=str, seeds=list, rows=list), "recipe flags note source after")
    rows = [_row(number, row) for number, row in enumerate(content["rows"], start=1)]
    seeds = content["seeds"]
    if not rows or not seeds:
        raise ValueError("rows and seeds must not be empty")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ValueError(f"seeds are whole numbers, not {seeds}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds} name one twice")
    for one, other in combinations(rows, 2):
        if one.slug == other.slug:
            raise ValueError(
                f"rows {one.name!r} and {other.name!r} would share the folder {one.slug!r}"
            )
    flags = _flags(content.get("flags", []))
    if recipe := _text(content, "recipe"):
        here = Path(recipe).exists() or not (project / recipe).exists()
        flags = [f"@{recipe if here else project / recipe}", *flags]
    return Table(
        path,
        title=content["title"],
        flags=flags,
        rows=rows,
        seeds=seeds,
        note=_text(content, "note"),
        source=_text(content, "source"),
        after=_after(content.get("after", [])),
    )


def _row(number: int, content: Any) -> Row:
    place = f"row {number}"
    if not isinstance(content, dict):
        raise ValueError(f"{place} is not a table of its own ([[rows]])")
    try:
        _check_keys(content, dict(name=str), "flags published after")
        place = f"row {content['name']!r}"
        published = content.get("published", {})
        after = dict[str, dict[str, float]]()
        if isinstance(published, dict):
            after = {k: _published(published[k]) for k in published if k in STAGES}
            published = {k: v for k, v in published.items() if k not in STAGES}
        flags = _flags(content.get("flags", []))
        own = _after(content["after"]) if "after" in content else None
        return Row(content["name"], flags, _published(published), after, own)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _published(value: Any) -> dict[str, float]:
    known = isinstance(value, dict) and value.keys() <= {"valid", "test"}
    if not known or not all(type(x) in (int, float) and 0 < x < 1e9 for x in value.values()):
        raise ValueError("published is {valid = PPL, test = PPL}")
    return {split: float(ppl) for split, ppl in value.items()}


def _after(value: Any) -> list[After]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"after is a list of strings, not {value!r}")
    after = [After(words[0], words[1:]) for words in map(_flags, value)]
    for one in after:
        if one.name not in STAGES:
            raise ValueError(f"after: no stage {one.name!r} (there are {', '.join(STAGES)})")
    if len({one.name for one in after}) < len(after):
        raise ValueError(f"after names a stage twice: {value}")
    return after


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
