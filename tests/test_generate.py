"""Sampling against float64 distributions in loops, generate.py, and the same from Python."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from conftest import Result
from scipy.stats import chisquare  # type: ignore[import-untyped]
from test_bad_input import only_line
from torch import Tensor

import awd_lstm
import generate
from data.corpus import Vocabulary
from data.errors import DataError
from engine.checkpoint import model_payload, write_checkpoint
from evaluation.cache import Cache
from evaluation.plain import Plain
from evaluation.predictor import Prediction, Predictor
from evaluation.sampling import Shape, sample_words, shaped
from model import RNNModel

Run = Callable[..., Result]
WORDS = Vocabulary([*"abcdefghijkl", "<unk>", "<eos>"])
# b and c are equally probable, d has probability 0, and <unk> is the most probable word.
PROBS = [5, 9, 9, 0, 1, 2, 3, 4, 0.5, 0.1, 16, 30, 50, 6]
SHAPES = [
    Shape(),
    Shape(temperature=0.5),
    Shape(temperature=3),
    Shape(top_k=2),
    Shape(top_k=5),
    Shape(top_p=0.5),
    Shape(top_p=0.999),
    Shape(top_k=3, top_p=0.8),  # of the three: of all words 0.8 would be more than they are
    Shape(temperature=1.7, top_k=8, top_p=0.6),
]


def by_hand(probs: list[float], shape: Shape) -> list[float]:
    """p^(1 / temperature), then the top k, then the nucleus, in loops."""
    left = {w: p ** (1 / shape.temperature) for w, p in enumerate(probs)}
    order = sorted(left, key=lambda w: (-left[w], w))
    order = order[: shape.top_k or len(order)]
    total = sum(left[w] for w in order)
    nucleus: list[int] = []
    for w in order:
        if sum(left[v] for v in nucleus) >= shape.top_p * total:
            break
        nucleus.append(w)
    total = sum(left[w] for w in nucleus)
    return [left[w] / total if w in nucleus else 0.0 for w in range(len(probs))]


class Constant(Predictor):
    """Predicts PROBS after every word."""

    device = torch.device("cpu")

    def start(self, columns: int) -> None:
        pass

    def read(self, words: Tensor) -> Prediction:
        return Logs(torch.zeros(words.numel(), 1), len(WORDS))


class Logs(Prediction):
    def log_probs(self, places: slice) -> Tensor:
        probs = torch.tensor(PROBS, dtype=torch.float64) / sum(PROBS)
        return probs.log().expand(len(self.outputs[places]), -1)


ALLOWED = [0.0 if word == "<unk>" else p for word, p in zip(WORDS, PROBS, strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distributions_are_those_by_hand(shape: Shape) -> None:
    logs = torch.tensor(ALLOWED, dtype=torch.float64).log()
    expected = by_hand(ALLOWED, shape)
    torch.testing.assert_close(shaped(logs, shape).tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [Shape(), Shape(1.7, top_k=8, top_p=0.6)], ids=str)
def test_draws_follow_the_distribution(shape: Shape) -> None:
    """Chi-square over 4,000 draws; the draws after an <eos>, which cannot be one, are left out."""
    expected = by_hand(ALLOWED, shape)
    drawn = ["<eos>", *islice(sample_words(Constant(), WORDS, seed=3, shape=shape), 4000)]
    counts = Counter(word for last, word in pairwise(drawn) if last != "<eos>")
    assert p_value(counts, expected) > 0.01
    flatter = [p ** (1 / 1.5) for p in expected]
    assert p_value(counts, [p / sum(flatter) for p in flatter]) < 1e-3


def p_value(counts: Counter[str], expected: list[float]) -> float:
    """Of the hypothesis that words were drawn from a distribution, by Pearson's chi-square."""
    possible = [word for word, p in zip(WORDS, expected, strict=True) if p]
    assert counts.keys() <= set(possible)
    total = sum(counts.values())
    wanted = [p * total for p in expected if p]
    return float(chisquare([counts[word] for word in possible], wanted).pvalue)


@pytest.mark.parametrize(
    "keywords", [{"temperature": 0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0},
                 {"top_p": 1.1}],
)  # fmt: skip
def test_shapes_that_cannot_be(keywords: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Shape(**keywords)  # type: ignore[arg-type]


def test_no_temperature_is_too_small() -> None:
    logs = torch.tensor([-3.0, -1.0, -2.0])
    assert shaped(logs, Shape(temperature=1e-320)).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="not finite"):
        shaped(torch.tensor([math.nan, 0.0]), Shape())


def save_model(path: Path, vocabulary: Vocabulary = WORDS) -> RNNModel:
    """A model with random weights, large enough that what it says depends on the context."""
    model = RNNModel("LSTM", len(vocabulary), 6, 16, 2, wdrop=0.5, tie_weights=True).eval()
    for name, p in model.named_parameters():
        std = {"encoder.weight": 1, "decoder.bias": 0}.get(name, 0 if "bias" in name else 2)
        torch.nn.init.normal_(p, std=std)
    write_checkpoint(path, model_payload(model, vocabulary))
    return model


@torch.no_grad()
def most_probable(model: RNNModel, prompt: list[str], count: int) -> list[str]:
    """Each next word is the most probable one, of those that may come."""
    words = ["<eos>", *prompt]
    for _ in range(count):
        ids = torch.tensor([[WORDS.index(word)] for word in words])
        output, _ = model(ids, model.init_hidden(1))
        logits = model.decoder(output[-1:])[0]
        logits[WORDS.index("<unk>")] = -math.inf
        if words[-1] == "<eos>":
            logits[WORDS.index("<eos>")] = -math.inf
        words.append(WORDS[int(logits.argmax())])
    return words[1 + len(prompt) :]


def test_generate(call: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "m.pt", tmp_path / "generated.txt"
    model = save_model(path)
    greedy = [path, "--prompt", "a f", "--top-k", 1, "--words", 12]
    said = [word for word in most_probable(model, ["a", "f"], 40) if word != "<eos>"]
    result = call(generate, *greedy)
    assert (result.code, result.err) == (0, "")
    assert result.out.split() == ["a", "f", *said[:12]]
    assert len(result.out.splitlines()) > 1
    assert call(generate, *greedy, "--seed", 5).out == result.out
    assert call(generate, *greedy, "--top-k", 9, "--temperature", 1e-9).out == result.out
    assert call(generate, *greedy, "--top-k", 9, "--top-p", 1e-9).out == result.out

    one = call(generate, path, "--seed", 4, "--words", 50)
    assert one == call(generate, path, "--seed", 4, "--words", 50)
    assert one.out != call(generate, path, "--seed", 5, "--words", 50).out
    assert len(one.out.split()) == 50
    assert not {"<unk>", "<eos>"} & set(one.out.split())
    assert "" not in one.out.splitlines()
    sentences = call(generate, path, "--seed", 4, "--sentences", 3)
    assert one.out.startswith(sentences.out)
    assert sentences.out.count("\n") == 3
    cached = call(generate, path, "--seed", 4, "--words", 50, "--cache", "--lambdasm", 0.9)
    assert cached.code == 0
    assert cached.out != one.out

    theirs = ["--data", "data/penn", "--model", "LSTM", "--words", 50, "--temperature", 1.0]
    theirs += ["--checkpoint", path, "--outf", out, "--log-interval", 20]
    result = call(generate, *theirs, "--seed", 4)
    assert (result.code, result.out, out.read_text()) == (0, "", one.out)
    assert result.err.splitlines() == ["| Generated 20/50 words", "| Generated 40/50 words"]


def test_prompts_of_unknown_words(call: Run, tmp_path: Path) -> None:
    path, bare = tmp_path / "m.pt", tmp_path / "bare.pt"
    save_model(path)
    result = call(generate, path, "--prompt", "a Zürich a yes Zürich", "--words", 3)
    assert result.code == 0
    assert result.out.startswith("a Zürich a yes Zürich ")
    assert result.err == (
        "warning: --prompt: the vocabulary lacks 'Zürich', 'yes', read as <unk>\n"
    )
    line = only_line(call(generate, path, "--prompt", "Zürich yes"), 2)
    assert line == "argument --prompt: the vocabulary lacks all of its words: 'Zürich', 'yes'"
    save_model(bare, Vocabulary(["a", "<eos>"]))
    line = only_line(call(generate, bare, "--prompt", "a yes"), 2)
    assert line == "argument --prompt: the vocabulary lacks 'yes', and has no <unk>"


def test_bad_input(call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    broken = save_model(Path("m.pt"))
    torch.nn.init.constant_(broken.encoder.weight, math.nan)
    write_checkpoint(Path("nan.pt"), model_payload(broken, WORDS))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    not_finite = "nan.pt: the model's probabilities are not finite"
    for flags, code, expected in [
        ("", 2, "give one MODEL"),
        ("a.pt --checkpoint b.pt", 2, "give one MODEL"),
        ("nowhere.pt", 1, "nowhere.pt: no such file"),
        ("m.pt --temperature 0", 2, "--temperature"),
        ("m.pt --top-p 1.5", 2, "--top-p"),
        ("m.pt --window 3", 2, "--window: goes with --cache only"),
        ("m.pt --outf nowhere/out.txt --words 1", 1, "nowhere/out.txt: cannot write"),
        ("nan.pt --words 1", 1, not_finite),
        ("nan.pt --words 1 --outf m.pt", 1, not_finite),
    ]:
        assert expected in only_line(call(generate, *flags.split()), code)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# From Python


@torch.no_grad()
def test_scores_and_next_words(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.pt")
    lm = awd_lstm.load(tmp_path / "m.pt")
    words = ["<eos>", "a", "c", "<unk>", "b", "<eos>"]
    ids = torch.tensor([WORDS.index(word) for word in words])
    logs = model.decoder(model(ids[:, None], model.init_hidden(1))[0]).log_softmax(1)
    total = sum(float(log[id_]) for log, id_ in zip(logs, ids[1:], strict=False))
    score = lm.score("a c nonsense b")
    assert (score.tokens, score.unknown) == (5, 1)
    assert score.log_prob == pytest.approx(total, rel=1e-6)
    assert score.ppl == pytest.approx(math.exp(-total / 5), rel=1e-6)
    assert lm.score("a c <unk> b").unknown == 0
    after = lm.next_word("a c", top=None)
    assert list(lm.next_word("a c", top=2).items()) == list(after.items())[:2]
    assert list(after.values()) == sorted(after.values(), reverse=True)
    assert sum(after.values()) == pytest.approx(1)
    for word, probability in after.items():
        expected = float(logs[2][WORDS.index(word)].exp())
        assert probability == pytest.approx(expected, rel=1e-5)
    cached = lm.cached(window=5, theta=0.5, lambdasm=1.0).next_word("a c a", top=None)
    # the words that came after <eos>, a and c
    assert {word for word, probability in cached.items() if probability > 0} == {"a", "c"}
    save_model(tmp_path / "bare.pt", Vocabulary(["a", "<eos>"]))
    with pytest.raises(DataError, match="lacks 'nonsense'"):
        awd_lstm.load(tmp_path / "bare.pt").score("a nonsense")


def test_samples_and_evaluation(tmp_path: Path, call: Run) -> None:
    model = save_model(tmp_path / "m.pt")
    lm = awd_lstm.load(tmp_path / "m.pt")
    for prompt in ("", "a", "b f", "<eos> c", "d e f g"):
        said = most_probable(model, prompt.split(), 12)
        assert lm.sample(prompt, words=12, top_k=1).split() == said
    printed = call(generate, tmp_path / "m.pt", "--prompt", "a f", "--words", 9, "--seed", 2).out
    sampled = lm.sample("a f", words=30, seed=2).split()
    assert printed.split()[2:] == [word for word in sampled if word != "<eos>"][:9]
    cache = ["--cache", "--window", 7, "--theta", 0.02, "--lambdasm", 0.9]
    printed = call(generate, tmp_path / "m.pt", "--prompt", "a f", "--words", 25, *cache).out
    sampled = lm.cached(window=7, theta=0.02, lambdasm=0.9).sample("a f", words=99).split()
    assert printed.split()[2:] == [word for word in sampled if word != "<eos>"][:25]
    (tmp_path / "text.txt").write_text("a b nonsense c\nd e a b\n" * 9)
    words = (tmp_path / "text.txt").read_text().replace("nonsense", "<unk>")
    ids = [WORDS.index(word) for word in words.replace("\n", " <eos> ").split()]
    for predictor in (Plain(model), Cache(Plain(model), window=8, theta=0.3, lambdasm=0.2)):
        predictor.start(1)
        read = predictor.read(torch.tensor(ids)[:-1, None])
        expected = -float(read.score(torch.tensor(ids)[1:]).double().mean())
        score = lm.evaluate(tmp_path / "text.txt")
        assert score.loss == pytest.approx(expected, rel=1e-12)
        assert (score.tokens, score.unknown) == (len(ids) - 1, 9)
        lm = lm.cached(window=8, theta=0.3, lambdasm=0.2)
    assert lm.evaluate(tmp_path / "text.txt", columns=4).loss != score.loss
