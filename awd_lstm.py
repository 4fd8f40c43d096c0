"""Trained models from Python: scores, next words, samples and perplexities of texts.

import awd_lstm
lm = awd_lstm.load("PTB.pt")
print(lm.sample("the price of", words=20))
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from data.corpus import EOS, Vocabulary
from data.text import Text, encode_words, read_text
from engine.checkpoint import load_model
from evaluation.cache import Cache
from evaluation.evaluate import evaluate, perplexity
from evaluation.plain import Plain
from evaluation.predictor import Predictor
from evaluation.sampling import Shape, predict_next, sample_words


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        loss: mean negative log likelihood, nats per token.
        tokens: number of predictions; the <eos> at a line's end is one.
        unknown: words that the vocabulary lacks, read as <unk>.
    """

    loss: float
    tokens: int
    unknown: int

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole text, nats."""
        return -self.loss * self.tokens

    @property
    def ppl(self) -> float:
        """Perplexity; infinity if it overflows."""
        return perplexity(self.loss)


class LanguageModel:
    """A predictor of words, and the vocabulary.

    Sentences and prompts are words separated by whitespace, and follow an <eos>. A word that the
    vocabulary lacks is read as <unk>; if it has no <unk>, methods raise a data.errors.DataError
    that names the word.

    Args:
        predictor: one that reads any number of words at a time.
        vocabulary: has <eos>.
    """

    def __init__(self, predictor: Predictor, vocabulary: Vocabulary) -> None:
        self.predictor = predictor
        self.vocabulary = vocabulary

    def cached(self, window: int, theta: float, lambdasm: float) -> "LanguageModel":
        """The same model with a continuous cache over the text; see evaluation.cache.Cache."""
        return LanguageModel(Cache(self.predictor, window, theta, lambdasm), self.vocabulary)

    def score(self, sentence: str) -> Score:
        """Score the words of a sentence and the <eos> after them."""
        return self._score(encode_words([EOS, *sentence.split(), EOS], self.vocabulary), 1)

    def evaluate(self, path: str | Path, columns: int = 1) -> Score:
        """Score all words of a UTF-8 text but the first; each line ends with an <eos>.

        Args:
            path: the text.
            columns: contiguous columns that the text is divided into, each read from a zero
                state. main.py takes 1 for the test text and 10 for the validation text.
        """
        return self._score(read_text(path, self.vocabulary), columns)

    def next_word(self, prompt: str = "", top: int | None = 10) -> dict[str, float]:
        """The words that most probably come after a prompt, with their probabilities.

        Args:
            prompt: the words to continue.
            top: number of words; None: the whole vocabulary.

        Returns:
            {word: probability}; the most probable comes first.
        """
        ids = encode_words([EOS, *prompt.split()], self.vocabulary).ids
        self.predictor.start(1)
        log_probs = predict_next(self.predictor, ids.tolist())
        probs, words = log_probs.double().exp().sort(descending=True)
        found = zip(words[:top].tolist(), probs[:top].tolist(), strict=True)
        return {self.vocabulary[word]: probability for word, probability in found}

    def sample(
        self,
        prompt: str = "",
        words: int = 20,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 1111,
    ) -> str:
        """Sample words after a prompt.

        Args:
            prompt: the words to continue.
            words: number of words; an <eos> is one, <unk> is not sampled.
            temperature, top_k, top_p: see evaluation.sampling.shaped.
            seed: of the draws.

        Returns:
            The sampled words, separated by spaces, without the prompt.
        """
        shape = Shape(temperature, top_k, top_p)
        ids = encode_words(prompt.split(), self.vocabulary).ids.tolist()
        sampled = sample_words(self.predictor, self.vocabulary, seed, ids, shape)
        return " ".join(islice(sampled, words))

    def _score(self, text: Text, columns: int) -> Score:
        loss = evaluate(self.predictor, text.ids, columns)
        return Score(loss, len(text.ids) - 1, text.unknown)


def load(path: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Load a model that main.py saved, or a folder that export.py wrote.

    Raises:
        engine.errors.CheckpointError: it is missing, damaged, or not a model.
    """
    model, vocabulary = load_model(path, device)
    return LanguageModel(Plain(model), vocabulary)
