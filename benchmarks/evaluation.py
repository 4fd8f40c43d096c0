"""Speed of evaluation with a cache and with dynamic evaluation, each against the obvious way.

    python -m benchmarks.evaluation --data data/penn

The model has the paper's size (or --nhid's) and random weights, which cost what trained ones do.
All figures come from one process; ways take turns, and the ratio is the median over the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.corpus import load_corpus
from data.files import atomic_write
from engine.device import keep_freed_memory
from evaluation.cache import Cache
from evaluation.dynamic import Dynamic
from evaluation.evaluate import score
from evaluation.plain import Plain
from evaluation.predictor import Check, Prediction, Predictor
from model import RNNModel, repackage_hidden

THETA, LAMBDA = 0.7, 0.1
LR, LAMB, SEGMENT = 1e-3, 0.002, 5


class Read(Predictor):
    """A text that was read and scored before, so that a cache's own time can be taken."""

    def __init__(self, base: Predictor, ids: Tensor) -> None:
        self.device = base.device
        self.segment = len(ids) - 1
        base.start(1)
        prediction = base.read(ids[:-1, None].long())
        self.prediction = Scored(prediction, prediction.score(ids[1:].long()))

    def start(self, columns: int) -> None:
        """See Predictor."""

    def read(self, words: Tensor) -> Prediction:
        """See Predictor."""
        return self.prediction


class Scored(Prediction):
    """A prediction whose targets' log-probabilities are known."""

    def __init__(self, base: Prediction, scores: Tensor) -> None:
        super().__init__(base.outputs, base.ntoken)
        self.log_probs = base.log_probs  # type: ignore[method-assign]
        self.scores = scores

    def score(self, targets: Tensor, check: Check = lambda: None) -> Tensor:
        """See Prediction."""
        return self.scores


def by_word(
    outputs: Tensor, probs: Tensor, one_hots: Tensor, ids: Tensor, window: int, first: int
) -> Tensor:
    """The cache as the original computes it: one-hot rows (window, V), a loop over the words.

    Args:
        outputs: (N, E).
        probs: the model's distributions of the words from `first` on, (n, V).
        one_hots: the words that come after, (N, V).
    """
    scores = []
    for n, p in enumerate(probs):
        t = first + n
        attention = (THETA * (outputs[t - window : t] @ outputs[t])).softmax(0)
        cached = (attention[:, None] * one_hots[t - window : t]).sum(0)
        scores.append((LAMBDA * cached + (1 - LAMBDA) * p)[ids[t + 1]].log())
    return torch.stack(scores)


def with_optimizer(model: RNNModel, ids: Tensor) -> float:
    """Dynamic evaluation by SGD as one would write it with torch.optim."""
    trained = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), LR)
    hidden, total = model.init_hidden(1), 0.0
    for start in range(0, len(ids) - 1, SEGMENT):
        targets = ids[start + 1 : start + 1 + SEGMENT].long()
        words = ids[start : start + len(targets), None].long()
        output, hidden = model(words, repackage_hidden(hidden))
        loss = F.cross_entropy(model.decoder(output), targets)
        total += loss.item() * len(targets)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p, p0 in zip(model.parameters(), trained, strict=True):
                p.add_(p0 - p, alpha=LAMB)
        optimizer.step()
    return -total / (len(ids) - 1)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of cache and dynamic evaluation.")
    parser.add_argument("--data", default="data/penn")
    parser.add_argument("--nhid", type=int, default=1150)
    parser.add_argument("--window", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=6000, help="of the test text, for the cache")
    parser.add_argument("--segments", type=int, default=40, help="of 5, for dynamic evaluation")
    parser.add_argument("--words", type=int, default=60, help="for the original's way")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="write the figures as JSON")
    args = parser.parse_args()
    keep_freed_memory()
    corpus = load_corpus(args.data)
    torch.manual_seed(1)
    ntoken = len(corpus.vocabulary)
    model = RNNModel("LSTM", ntoken, 400, args.nhid, 3, wdrop=0.5, tie_weights=True).eval()
    ids = corpus.test[: args.tokens + 1].clone()
    window = args.window
    read = Read(Plain(model), ids)
    first = args.tokens - args.words
    outputs, prediction = read.prediction.outputs, read.prediction
    probs = prediction.log_probs(slice(first, args.tokens)).exp()
    one_hots = F.one_hot(ids[1:].long(), ntoken).float()
    short = ids[: SEGMENT * args.segments + 1]
    roots = [torch.full_like(p, 1e-3) for p in model.parameters()]
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: score(Plain(model), ids, 1),
        "cache alone": lambda: score(Cache(read, window, THETA, LAMBDA), ids, 1),
        "loop over words": lambda: by_word(outputs, probs, one_hots, ids, window, first),
        "dynamic sgd": lambda: score(Dynamic(model, LR, LAMB, SEGMENT), short, 1),
        "dynamic rms": lambda: score(Dynamic(model, LR, LAMB, SEGMENT, roots), short, 1),
        "torch.optim sgd": lambda: with_optimizer(deepcopy(model), short),
    }
    # The same results, before anything is timed.
    torch.testing.assert_close(
        ways["cache alone"]()[first:].float(), ways["loop over words"](), rtol=1e-3, atol=1e-3
    )
    assert abs(float(ways["dynamic sgd"]().mean()) - ways["torch.optim sgd"]()) < 1e-3
    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(args.rounds)]
    median = {name: statistics.median(r[name] for r in rounds) for name in ways}

    def ratio(ours: str, other: str, scale: float = 1) -> float:
        return statistics.median(scale * r[other] / r[ours] for r in rounds)

    figures = dict(
        cache_share=1 / ratio("cache alone", "plain"),
        cache_against_loop=ratio("cache alone", "loop over words", args.tokens / args.words),
        dynamic_against_optim=ratio("dynamic sgd", "torch.optim sgd"),
        dynamic_rms_against_optim=ratio("dynamic rms", "torch.optim sgd"),
    )
    tokens = dict.fromkeys(ways, len(short) - 1)
    tokens |= {"plain": args.tokens, "cache alone": args.tokens, "loop over words": args.words}
    for name, value in median.items():
        print(f"| {name:<16} | {1000 * value / tokens[name]:9.3f} ms per word")
    print(f"| the cache adds {figures['cache_share']:.1%} to plain evaluation")
    print(
        f"| the cache is {figures['cache_against_loop']:.0f} times as fast as the loop over words"
    )
    print(f"| dynamic evaluation: {figures['dynamic_against_optim']:.2f} times torch.optim's speed")
    print(f"| by rms: {figures['dynamic_rms_against_optim']:.2f} times torch.optim's sgd")
    if args.output:
        told = dict(figures, median_seconds=median, rounds=rounds, flags=vars(args))
        told |= dict(torch=torch.__version__, threads=torch.get_num_threads())
        with atomic_write(args.output, "w") as file:
            file.write(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
