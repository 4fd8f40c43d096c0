"""What main.py warns of: raw text, sizes that do not fit the text, a model that bigrams beat."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REAL_DATA, ROOT, TINY, Result

from bptt import FixedWindows
from data.corpus import Corpus, Vocabulary
from data.download import ensure_corpus
from training.advice import beaten_by_bigrams, few_updates, large_model, raw_text

Run = Callable[..., Result]


def warnings_of(result: Result) -> list[str]:
    assert result.code == 0, result.err
    return re.findall(r"^warning: (.*)$", result.err, re.MULTILINE)


def corpus_of(train: str, valid: str) -> Corpus:
    vocabulary = Vocabulary(dict.fromkeys(f"{train} {valid}".split()))
    ids = [torch.tensor([vocabulary.index(w) for w in t.split()]).int() for t in (train, valid)]
    return Corpus(vocabulary, ids[0], ids[1], ids[1], "")


@pytest.mark.parametrize(
    ("rare", "warned"),
    [
        ("new newer", True),
        ('"said, u.s.', True),  # twice in train
        ("once twice", False),
        ("new once twice", False),
        ("new <unk>, once", True),
        ("<unk> 's -- $ once", False),
    ],
)
def test_raw_text_is_one_whose_rare_words_are_mostly_new_or_punctuated(
    rare: str, warned: bool
) -> None:
    often = "the cat <unk> , mr. " * 100
    train = f"""{often} once twice twice "said, "said, u.s. u.s. <unk>, 's 's -- $"""
    found = raw_text(corpus_of(train, f"{often[:400]} {rare}"))
    assert len(found) == warned
    if warned:
        count = len(f"{often[:400]} {rare}".split())
        share = sum(word not in train.split() for word in rare.split()) / count
        assert f": {share:.1%} of its words are not in train.txt" in found[0]
    assert not raw_text(corpus_of(train, f"{often * 5} {rare}"))  # too few to matter


def test_sizes() -> None:
    corpus = corpus_of("word " * 1000 + " ".join(map(str, range(99))), "word word")
    assert not large_model(109_900, corpus, layers=3)
    (text,) = large_model(2_000_000, corpus, layers=1)
    assert "1,820 a token" in text
    assert text.endswith("--emsize 50 --nhid 50 has about 25,000")
    (text,) = large_model(2_000_000, corpus, layers=30)
    assert text.endswith("more text or a smaller vocabulary is needed")
    scheme = FixedWindows(7)
    assert not few_updates(scheme, 80 * 71, batch_size=80)
    assert few_updates(scheme, 80 * 36, batch_size=80)[0].endswith("--batch-size 4 makes about 103")
    assert few_updates(scheme, 36, 1)[0].endswith("more text or a smaller --bptt is needed")
    assert not beaten_by_bigrams(100.0, 100.0)


def test_main_says_so(run: Run, tmp_path: Path) -> None:
    draw = random.Random(1)
    prose = [f"Said, {draw.randrange(400)} and “{draw.randrange(400)}”." for _ in range(600)]
    for split, lines in (("train", prose[:400]), ("valid", prose[400:500]), ("test", prose[500:])):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    flags = ["--data", tmp_path, "--save", tmp_path / "run.pt"]
    sizes = ["--emsize", 150, "--nhid", 150, "--nlayers", 1]
    raw, large, few = warnings_of(run(*flags, *sizes, "--dry-run"))
    assert raw.startswith("valid.txt looks like raw text")
    assert "parameters for 2,000 tokens" in large
    assert few.startswith("an epoch has about 1 updates")
    assert not warnings_of(run(*flags, *sizes, "--quick", "--dry-run"))
    raw, won = warnings_of(run(*flags, *TINY, "--bigram", "--max-updates", 2, "--lr", 1e-3))
    assert won.startswith("the bigram model wins, ")
    resumed = run("--resume", tmp_path / "run", "--max-updates", 3)
    assert [text[:17] for text in warnings_of(resumed)] == [won[:17]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["penn", "penn-paper", "wikitext-2", "demo"])
def test_a_recipe_is_not_warned_of(run: Run, tmp_path: Path, recipe: str) -> None:
    if recipe == "demo":
        folder = tmp_path / "data" / "demo"
        ensure_corpus(folder)
    else:
        folder = REAL_DATA / recipe.removesuffix("-paper")
        if not folder.exists():
            pytest.skip(f"{folder} is not there")
    assert not warnings_of(run(f"@{ROOT}/recipes/{recipe}.txt", "--data", folder, "--dry-run"))
