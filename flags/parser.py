"""The parser of command lines and recipes."""

import argparse
import difflib
import os
import shlex
import stat
from collections.abc import Iterable, Sequence
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

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a UsageError, without the usage before it."""
        if message.startswith("unrecognized arguments") and ".txt" in message:
            message += " (a recipe is given as @FILE)"
        elif message.startswith("unrecognized arguments") and self._is_corpus(message.split()[2]):
            message += " (a corpus is given as --data FOLDER)"
        elif message.startswith("unrecognized arguments"):
            words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            known = [close for word in words for close in self._close_to(word)]
            message += f" (did you mean {', '.join(known)}?)" if known else ""
        raise UsageError(" ".join(message.split()))

    def _is_corpus(self, word: str) -> bool:
        """Whether a word is a folder, and the program takes a corpus."""
        # Path.is_dir raises for a name that is too long.
        return "--data" in self._option_string_actions and os.path.isdir(word)  # noqa: PTH112

    def _close_to(self, word: str) -> list[str]:
        """The flag whose name is most like a word; empty if none is."""
        return difflib.get_close_matches(word, self._option_string_actions, n=1)


def expand_recipes(argv: Iterable[str], within: tuple[str, ...] = ()) -> list[str]:
    """Replace each @FILE by the words of the file, split as by a shell; # starts a comment.

    Args:
        argv: words of a command line; a recipe may name further recipes.
        within: real paths of the recipes that are being expanded.

    Raises:
        UsageError: a recipe cannot be read, is not a regular file, or includes itself.
    """
    words = []
    for word in argv:
        if not word.startswith("@"):
            words.append(word)
            continue
        path = Path(word[1:])
        inner = _read_recipe(path)
        real = os.path.realpath(path)
        if real in within:
            raise UsageError(f"@{path}: a recipe that includes itself")
        words += expand_recipes(inner, (*within, real))
    return words


def _read_recipe(path: Path) -> list[str]:
    words: list[str] = []
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO may never end
            raise UsageError(f"@{path}: a recipe has to be a regular file")
        lines = path.read_text(encoding="utf-8").splitlines()
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
