"""How a flag is declared."""

from argparse import _ActionsContainer
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """The declaration of a flag: parser, --help, saved configuration and resume check use it.

    name: first spelling in --help; - and _ are equivalent. Without dashes: a positional argument.
    default: value if the flag is not given. False makes a switch, which takes no value.
    help: one clause; --help appends the default unless that is None.
    type: parses and checks a value, see flags/values.py.
    metavar: name of the value in --help; None: the choices, or "N".
    nargs, const, choices: as in argparse.
    may_change: a resumed run may be given another value.
    per_session: a resumed run does not inherit it.
    belongs_to: (other, value): the flag may be given only if the other flag has this value; True:
    any but 0.
    """

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] = str
    metavar: str | tuple[str, ...] | None = None
    nargs: int | str | None = None
    const: Any = None
    choices: tuple[str, ...] | None = None
    may_change: bool = False
    per_session: bool = False
    belongs_to: tuple[str, Any] | None = None

    @property
    def dest(self) -> str:
        """Name of its attribute, e.g. batch_size."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def is_compared(self) -> bool:
        """True if a resumed run must have the same value."""
        return not (self.may_change or self.per_session)

    def add_to(self, group: _ActionsContainer) -> None:
        """Add the flag to an argparse group, under both spellings."""
        names = [self.name]
        if self.name.startswith("--"):
            names = [self.name, dashed(self.dest), f"--{self.dest}"]
        options: dict[str, Any] = dict(default=self.default, help=self.help)
        if self.default is False:
            options.update(action="store_true")
        else:
            if self.default not in (None, ""):
                options.update(help=f"{self.help} (default: {plain(self.default)})")
            metavar = self.metavar or "|".join(self.choices or ["N"])
            options.update(type=self.type, metavar=metavar, nargs=self.nargs)
            options.update(const=self.const, choices=self.choices)
        group.add_argument(*dict.fromkeys(names), **options)


# A program's flags by the headings of its --help; "" is argparse's default heading.
Sections = Mapping[str, tuple[Flag, ...]]


def by_name(sections: Sections) -> dict[str, Flag]:
    """The flags by attribute name."""
    return {flag.dest: flag for flags in sections.values() for flag in flags}


def defaults(sections: Sections) -> dict[str, Any]:
    """The flags' default values by attribute name."""
    return {name: copy(flag.default) for name, flag in by_name(sections).items()}


def plain(value: Any) -> str:
    """A flag's value as written on a command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def dashed(name: str) -> str:
    """A flag's spelling in messages: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"
