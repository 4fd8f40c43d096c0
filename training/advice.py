"""Warnings about texts and settings that cannot work well, and what to set instead.

None of the recipes on its corpus comes near a threshold.
"""

import unicodedata

import torch

from bptt import Scheme
from data.corpus import UNK, Corpus

# A word that train has at most RARE times is rare. Where rare words are at least RARE_SHARE of the
# validation text, and more than half of them are new or carry punctuation, the text is raw. Raw
# prose of 1.8 million words has 4.6 % of them, 82 % of these such ones; PTB has 0.5 %, none of
# these such ones; WikiText-2 and the demo corpus have none.
RARE, RARE_SHARE = 2, 0.01
# Parameters per token of train; the paper's models have 26 (PTB) and 16 (WikiText-2), the demo's 7.
PARAMETERS_PER_TOKEN = 100
# Updates in an epoch, at the end of which NT-ASGD decides; the recipes have 300 to 700.
UPDATES, ENOUGH_UPDATES = 10, 100
SMALLER_MODELS = (400, 200, 100, 50)  # units, of the embedding and of each layer


def raw_text(corpus: Corpus) -> list[str]:
    """A warning if the validation text's rare words are mostly new or carry punctuation.

    The vocabulary is that of all three texts. A word of valid that train lacks has an id, but no
    update has ever raised its probability.
    """
    times = torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
    times = times[corpus.valid.long()]  # (N,), how often train has each word of valid
    rare = times <= RARE
    words = [corpus.vocabulary[id_] for id_ in corpus.valid[rare].tolist()]
    new = (times[rare] == 0).tolist()
    marked = [_marked(word) for word in words]
    odd = sum(a or b for a, b in zip(new, marked, strict=True))
    if len(words) < RARE_SHARE * len(times) or odd <= len(words) / 2:
        return []
    example = f", such as {words[marked.index(True)]!r}" if any(marked) else ""
    return [
        f"valid.txt looks like raw text: {sum(new) / len(times):.1%} of its words are not in "
        f"train.txt, so the model never sees them in training, and {sum(marked) / len(words):.0%} "
        f"of its rare words carry punctuation{example}; prepare.py sets punctuation apart and "
        f"replaces rare words by {UNK}"
    ]


def _marked(word: str) -> bool:
    """True for a word that begins or ends with punctuation."""
    ends = [unicodedata.category(character)[0] in "PS" for character in (word[0], word[-1])]
    return any(ends) and any(map(str.isalnum, word)) and word != UNK


def large_model(parameters: int, corpus: Corpus, layers: int) -> list[str]:
    """A warning if the model has many more parameters than the text has tokens."""
    tokens, words = len(corpus.train), len(corpus.vocabulary)
    if parameters <= PARAMETERS_PER_TOKEN * tokens:
        return []
    # Embedding, decoder's bias, and LSTMs of as many units as the embedding has.
    sizes = {units: words * (units + 1) + layers * 8 * units**2 for units in SMALLER_MODELS}
    fitting = [n for n, size in sizes.items() if size <= PARAMETERS_PER_TOKEN / 2 * tokens]
    remedy = "more text or a smaller vocabulary is needed"
    if fitting:
        units, size = fitting[0], float(f"{sizes[fitting[0]]:.2g}")
        remedy = f"--emsize {units} --nhid {units} has about {size:,.0f}"
    return [
        f"{parameters:,} parameters for {tokens:,} tokens of training text are "
        f"{parameters / tokens:,.0f} a token, where the paper's models have 26 and 16: it will "
        f"soon know the text by heart; {remedy}"
    ]


def few_updates(scheme: Scheme, tokens: int, batch_size: int) -> list[str]:
    """A warning if an epoch over a training text of this many tokens has few updates."""
    updates = scheme.expected_windows(tokens // batch_size - 1)
    if updates >= UPDATES:
        return []
    columns = max(1, int(updates * batch_size / ENOUGH_UPDATES))
    remedy = "more text or a smaller --bptt is needed"
    if columns < batch_size:
        more = scheme.expected_windows(tokens // columns - 1)
        remedy = f"--batch-size {columns} makes about {more:.0f}"
    return [
        f"an epoch has about {updates:.0f} updates, so --nonmono, --when and --epochs, which count "
        f"epochs, mean little training; {remedy}"
    ]


def beaten_by_bigrams(ppl: float, bigram_ppl: float) -> list[str]:
    """A warning if counts of pairs of words predict the text better than the model does."""
    if ppl <= bigram_ppl:
        return []
    return [
        f"the bigram model wins, {bigram_ppl:.2f} against {ppl:.2f}: the model predicts the text "
        "worse than counts of pairs of words do; it has trained too little, or the training text "
        "is too short for it"
    ]
