"""Divides lines of text into words."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache


def words(line: str) -> list[str]:
    """Divide a line into words and punctuation, for languages that put spaces between words.

    - A word is a run of letters and digits. Single hyphens inside it belong to it, and so do
      points, commas and colons between two digits: ``well-known``, ``1,000.5``, ``10:30``.
    - An apostrophe between letters begins a new word: ``it's`` is ``it 's``, ``don't`` is
      ``don 't``. The apostrophe ``’`` is read as ``'``.
    - Each other character is a word, and so is a run of the same one: ``.``, ``...``, ``--``.
    - ``<unk>`` stays whole.
    """
    return [match[0] for match in _pattern().finditer(line.replace("’", "'"))]


TOKENIZERS: Mapping[str, Callable[[str], list[str]]] = {"whitespace": str.split, "words": words}


@lru_cache
def _pattern() -> re.Pattern[str]:
    # Marks (accents, vowel signs) and joiners are no \w, but belong to the letter before them.
    marks = [chr(c) for c in range(0x10000) if unicodedata.category(chr(c)).startswith("M")]
    mark = f"[{''.join(marks)}\u200c\u200d]"
    letter = rf"(?:[^\W_]|{mark})"
    inside = r"(?:-|(?<=\d)[.,:](?=\d))"
    word = f"{letter}+(?:{inside}{letter}+)*"
    after_letter = rf"(?:(?<=[^\W_])|(?<={mark}))"
    return re.compile(rf"<unk>|{word}|{after_letter}'{word}|(\S)\1*")
