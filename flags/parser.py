"""The parser of command lines and recipes."""

import argparse
import os
import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import UsageError
from flags.flag import Sections, by_name, defaults


class Parser(argparse.ArgumentParser):
    """Parses a program's flags and recipes (@FILE); raises errors as UsageErrors of one line.

    Args:
        sections: the program's flags, in the order of --help.
        keywords: prog, description and epilog, as in argparse.
    """

    def __init__(self, sections: Sections, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.sections = sections
        for title, flags in sections.items():
            group = self.add_argument_group(title) if title else self
            for flag in flags:
                flag.add_to(group)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags that a command line or its recipes give; later values win.

        Raises:
            UsageError: an invalid flag or value, or a recipe that cannot be read.
        """
        absent = object()
        blank = argparse.Namespace(**dict.fromkeys(by_name(self.sections), absent))
        values = vars(self.parse_args(expand_recipes(argv), blank))
        return {name: value for name, value in values.items() if value is not absent}

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
        """Parse a command line; returns all flags, and the names of those given.

        Raises:
            UsageError: see given.
        """
        given = self.given(argv)
        return argparse.Namespace(**{**defaults(self.sections), **given}), set(given)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """The flags that an abbreviation may stand for; two spellings of one are one."""
        found: list[Any] = super()._get_option_tuples(option_string)
        return list({match[0].dest: match for match in found}.values())

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a UsageError, without the usage before it."""
        if message.startswith("unrecognized arguments"):
            words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            flags = list(self._option_string_actions)
            known = [close for word in words for close in get_close_matches(word, flags, n=1)]
            if ".txt" in message:
                message += " (a recipe is given as @FILE)"
            elif known:
                message += f" (did you mean {', '.join(known)}?)"
            else:
                message += f" ({self.prog} --help lists the flags)"
        raise UsageError(" ".join(message.split()))


def expand_recipes(argv: Iterable[str], within: tuple[str, ...] = ()) -> list[str]:
    """Replace each @FILE by the words of the file, split as by a shell; # starts a comment.

    Args:
        argv: words of a command line; a recipe may name further recipes.
        within: real paths of the recipes that are being expanded.

    Raises:
        UsageError: a recipe cannot be read, or includes itself.
    """
    words = []
    for word in argv:
        if not word.startswith("@"):
            words.append(word)
            continue
        path = Path(word[1:])
        inner, real = _read_recipe(path), os.path.realpath(path)
        if real in within:
            raise UsageError(f"@{path}: a recipe that includes itself")
        words += expand_recipes(inner, (*within, real))
    return words


def _read_recipe(path: Path) -> list[str]:
    words: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"@{path}: {error.strerror or error}") from None
    except ValueError:  # from decoding, or from a NUL in the path
        raise UsageError(f"@{path}: not UTF-8 text".replace("\0", "?")) from None
    for number, line in enumerate(lines, start=1):
        try:
            words += shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"@{path}: line {number}: {error}") from None
    return words
