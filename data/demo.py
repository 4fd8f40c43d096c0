"""A corpus of real English that needs no network: the documentation that ships inside Python.

The text is taken from `pydoc_data.topics` and the docstrings of the standard library, and brought
into the form of the Penn Treebank corpus: one sentence a line, lower case, numbers as N, rare words
as <unk>. It differs a little between versions of Python; it is for trying things out, not for
numbers to be compared.
"""

import ast
import hashlib
import importlib
import inspect
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.files import SPLITS, atomic_write

UNKNOWN = "<unk>"
MAX_VOCABULARY = 6000
MIN_COUNT = 3
HELDOUT_SHARE = 0.075  # of all tokens, for valid and for test each
MIN_SENTENCES = 2000  # even the smallest installation with its sources has several times that

Sentence = tuple[str, ...]

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

_CODE_LINE = re.compile(r"\s*(>>>|\.\.\. |\$ |#|@\w|import \w|from \w+ import |\(Pdb\))")
_RULE = re.compile(r"[-=*~^+|_\s]{3,}$")
_LIST_ITEM = re.compile(r"\s*(?:[-*+o•]|\(?\d+[.)]|\[\d+\]|--)\s+")
_ROLE = re.compile(r":[\w:]+:`~?([^`]*)`")
_APOSTROPHE = re.compile(r"(?<=[A-Za-z])’(?=[A-Za-z])")
_QUOTING = re.compile(r"[`\"“”‘’*|]+|(?<![A-Za-z])'+|'+(?![A-Za-z])|\[\d+\]|\.{3,}")
_DASH = re.compile(r"\s+(?:--|-|—|–)\s+|--+|—|–")
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?]\)))\s+(?=[A-Z(])")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|resp|aka|approx)\.(?=[\s,)])", re.I)
_TOKEN = re.compile(
    r"""
    \d+(?:[.,:]\d+)*(?:st|nd|rd|th|s)?\b            # a number
    | [A-Za-z_][\w.]*\w(?:\(\))?                    # a word or a dotted name
      (?:['-][A-Za-z]+)*
    | [A-Za-z]
    | [,.;:?!()]
    | \S                                            # a sign that no prose has
    """,
    re.VERBOSE,
)
_PLAIN_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*$")
_PUNCTUATION = frozenset(",.;:?!()")
_FUNCTION_WORD = re.compile(
    r"(?:a|about|all|also|an|and|any|are|as|at|be|been|but|by|can|do|does|each|for|from|has|have|"
    r"how|if|in|into|is|it|its|may|must|no|not|of|on|one|only|or|other|should|so|such|than|"
    r"that|the|their|them|then|there|these|they|this|to|used|was|we|when|where|which|while|"
    r"who|will|with|would|you|your)$"
)


def build_demo(folder: str | os.PathLike[str]) -> None:
    """Write train.txt, valid.txt and test.txt, made from Python's own documentation.

    Whole documents (topics and modules) go to one of the three parts, and no sentence occurs
    twice. Takes a few seconds; the result is the same wherever the same Python is installed.

    Args:
        folder: where the texts shall be; created if need be, and texts in it are replaced.

    Raises:
        DataError: this Python comes without its documentation.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    parts = _split_documents(_collect())
    vocabulary = _frequent_words(parts["train"])
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()  # sentences that differ in rare words only become the same line
    for split, sentences in parts.items():
        with atomic_write(folder / f"{split}.txt", "w") as file:
            for sentence in sentences:
                words = (word if word in vocabulary else UNKNOWN for word in sentence)
                line = " ".join(words) + "\n"
                if line not in seen:
                    seen.add(line)
                    file.write(line)


def _collect() -> dict[str, list[Sentence]]:
    """The sentences of each document, none of them twice."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[Sentence] = set()
    documents: dict[str, list[Sentence]] = {}
    for name, text in (*_topics(), *_docstrings(library)):
        sentences = documents.setdefault(name, [])
        for sentence in _sentences(text):
            if sentence not in seen:
                seen.add(sentence)
                sentences.append(sentence)
    if len(seen) < MIN_SENTENCES:
        raise DataError(
            f"{library}: the demo corpus needs the standard library's sources with their "
            f"docstrings, and this Python has only {len(seen)} usable sentences"
        )
    return documents


def _topics() -> Iterator[tuple[str, str]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out; the docstrings are the larger part
        return
    for name in sorted(topics):
        yield f"topic {name}", topics[name]


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """Name of the module and text, for each docstring in the sources; nothing is imported."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            with warnings.catch_warnings():  # about the escapes in other people's strings
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and files made to be broken
        for text in _docstrings_below(tree):
            yield f"module {relative.as_posix()}", text


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield inspect.cleandoc(text)
    for child in getattr(node, "body", ()):
        yield from _docstrings_below(child)


def _sentences(text: str) -> Iterator[Sentence]:
    for paragraph in _paragraphs(text):
        paragraph = _APOSTROPHE.sub("'", _ROLE.sub(r"\1", paragraph))
        paragraph = _DASH.sub(", ", _QUOTING.sub("", paragraph))
        paragraph = _ABBREVIATION.sub(lambda match: match[1].replace(".", ""), paragraph)
        for raw in _SENTENCE_END.split(paragraph):
            sentence = tuple(_normalise(token) for token in _TOKEN.findall(raw))
            if _is_prose(sentence):
                yield sentence


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items, each joined to one line, without code, tables and headings."""
    lines: list[str] = []
    for line in (*text.expandtabs().splitlines(), ""):
        item = _LIST_ITEM.match(line)
        indented_more = lines and _indent(line) > _indent(lines[-1]) + 2
        if not line.strip() or item or _RULE.match(line) or indented_more:
            if lines and not any(_CODE_LINE.match(line_) for line_ in lines):
                yield " ".join(line_.strip() for line_ in lines)
            lines = []
        if item:
            line = " " * item.end() + line[item.end() :]
        if line.strip() and not _RULE.match(line):
            lines.append(line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _normalise(token: str) -> str:
    if token[0].isdigit():
        return "N"
    return token.removesuffix("()").lower()


def _is_prose(sentence: Sentence) -> bool:
    """Whether tokens read like a sentence of English rather than code, a table or a fragment."""
    words = [token for token in sentence if token not in _PUNCTUATION]
    if not 5 <= len(words) <= 80 or sentence[0] in _PUNCTUATION or sentence[-1] in (",", "("):
        return False
    if any(not token[0].isalnum() and token[0] != "_" for token in words):
        return False
    plain = sum(token == "N" or _PLAIN_WORD.match(token) is not None for token in words)
    functional = sum(_FUNCTION_WORD.match(token) is not None for token in words)
    marks = len(sentence) - len(words)
    one_piece = sentence.count("(") == sentence.count(")") and sentence.count(":") <= 1
    return (
        plain >= 0.75 * len(words)
        and functional >= 0.18 * len(words)
        and marks <= 0.3 * len(words)
        and one_piece
    )


def _split_documents(documents: dict[str, list[Sentence]]) -> dict[str, list[Sentence]]:
    """Deal documents out in the order of a hash of their names, until each part has its share."""
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    total = sum(len(sentence) + 1 for name in order for sentence in documents[name])
    parts: dict[str, list[Sentence]] = {split: [] for split in SPLITS}
    num_tokens = 0
    for name in order:
        share = num_tokens / total
        split = ("valid", "test", "train")[(share >= HELDOUT_SHARE) + (share >= 2 * HELDOUT_SHARE)]
        parts[split] += documents[name]
        num_tokens += sum(len(sentence) + 1 for sentence in documents[name])
    return parts


def _frequent_words(sentences: list[Sentence]) -> frozenset[str]:
    counts = Counter(word for sentence in sentences for word in sentence)
    # Sorted by word among equals, so that the cut does not depend on the order of the text.
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return frozenset(word for word, count in ranked[:MAX_VOCABULARY] if count >= MIN_COUNT)
