"""Cache, dynamic evaluation, temperature and MC dropout against their equations, in loops."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.cache import Cache
from evaluation.dynamic import Dynamic, root_mean_squares
from evaluation.evaluate import score
from evaluation.plain import Plain
from evaluation.predictor import Mean, Predictor, Temperature
from model import RNNModel
from noise import Noise

WORDS = 7  # few, so that words come again


def small_model(rnn_type: str = "LSTM") -> RNNModel:
    torch.manual_seed(1)
    sizes = (WORDS, 4, 6, 2)
    model = RNNModel(rnn_type, *sizes, 0.3, 0.2, 0.4, 0.2, 0.3, tie_weights=True).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model.eval()


def text(length: int = 41, seed: int = 2) -> Tensor:
    return torch.randint(0, WORDS, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def steps(model: RNNModel, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Output h, the model's distribution and the word that came, one word at a time."""
    hidden = model.init_hidden(1)
    for now, then in pairwise(ids):
        output, hidden = model(now.reshape(1, 1), hidden)
        yield output[0], model.decoder(output)[0].softmax(0), int(then)


def cached_by_hand(
    model: RNNModel, ids: Tensor, window: int, theta: float, lambdasm: float
) -> list[float]:
    found: list[float] = []
    entries: list[tuple[Tensor, int]] = []
    for h, p, then in steps(model, ids):
        recent = entries[-window:]
        probability = float(p[then])
        if recent:
            weights = [math.exp(theta * float(h @ key)) for key, _ in recent]
            hits = [w for w, (_, word) in zip(weights, recent, strict=True) if word == then]
            probability = (1 - lambdasm) * probability + lambdasm * sum(hits) / sum(weights)
        found.append(math.log(probability) if probability else -math.inf)
        entries.append((h, then))
    return found


@pytest.mark.parametrize("window", [1, 3, 10, 39, 40, 41, 1000])
@pytest.mark.parametrize(("theta", "lambdasm"), [(0.0, 0.4), (0.7, 0.1), (5.0, 1.0), (1.0, 0.0)])
def test_the_cache(window: int, theta: float, lambdasm: float) -> None:
    """Block borders at every offset."""
    model, ids = small_model(), text()
    expected = cached_by_hand(model, ids, window, theta, lambdasm)
    for rows in (1, 2, 3, 7, 40, 100):
        cache = Cache(Plain(model), window, theta, lambdasm)
        assert score(cache, ids, 1, rows).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_cache_of_each_column_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in blocks of few scores, and without anything of an earlier text."""
    model, ids = small_model(), text()
    bounds = [0, 14, 27, 40]  # 40 predictions: 14 13 13
    expected: list[float] = []
    for start, stop in pairwise(bounds):
        expected += cached_by_hand(model, ids[start : stop + 1], 5, 0.7, 0.3)
    cache = Cache(Plain(model), 5, 0.7, 0.3)
    score(cache, text(seed=3), 2, 4)
    assert score(cache, ids, 3, 6).tolist() == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("evaluation.cache.BLOCK_VALUES", 40)
    monkeypatch.setattr("evaluation.predictor.BLOCK_VALUES", 40)
    assert score(cache, ids, 3, 6).tolist() == pytest.approx(expected, rel=1e-9)


def rms_by_hand(model: RNNModel, ids: Tensor, columns: int, segment: int) -> list[Tensor]:
    """By the whole text's graph: each segment's gradient with the state before it held fixed."""
    length = len(ids) // columns
    squares = [torch.zeros_like(p) for p in model.parameters()]
    states = [model.init_hidden(1) for _ in range(columns)]
    count = 0
    for start in range(0, length - segment, segment):
        loss = torch.zeros((), dtype=torch.float64)
        for column in range(columns):
            own = ids[column * length : (column + 1) * length]
            output, state = model(own[start : start + segment, None], states[column])
            states[column] = [tuple(part.detach() for part in parts) for parts in state]
            log_p = model.decoder(output).log_softmax(1)
            for row in range(segment):
                loss = loss - log_p[row, own[start + row + 1]] / (segment * columns)
        model.zero_grad()
        loss.backward()
        for square, p in zip(squares, model.parameters(), strict=True):
            assert p.grad is not None
            square += p.grad**2
        count += 1
    return [(square / count).sqrt() for square in squares]


@pytest.mark.parametrize("columns", [1, 3])
def test_statistics_of_gradients(columns: int) -> None:
    model, ids = small_model(), text(50)
    length = len(ids) // columns
    beginnings = torch.cat([ids[n * length : n * length + 9] for n in range(columns)])
    for most, part in ((None, ids), (2, beginnings)):
        found = root_mean_squares(model, ids, columns, segment=4, most=most)
        expected = rms_by_hand(model, part, columns, segment=4)
        for root, other in zip(found, expected, strict=True):
            torch.testing.assert_close(root, other, rtol=1e-9, atol=1e-15)


def dynamic_by_hand(
    model: RNNModel, ids: Tensor, segment: int, update: Callable[[list[Tensor], list[Tensor]], None]
) -> list[float]:
    """Losses of one column, the weights updated after each whole segment."""
    found: list[float] = []
    weights: list[Tensor] = list(model.parameters())
    hidden = model.init_hidden(1)
    for start in range(0, len(ids) - 1, segment):
        targets = ids[start + 1 : start + 1 + segment]
        output, state = model(ids[start : start + len(targets), None], hidden)
        hidden = [tuple(part.detach() for part in parts) for parts in state]
        log_p = model.decoder(output).log_softmax(1)
        own = torch.stack([log_p[n, target] for n, target in enumerate(targets)])
        found += own.tolist()
        gradients = torch.autograd.grad(-own.mean(), weights)
        with torch.no_grad():
            update(weights, list(gradients))
    return found


@pytest.mark.parametrize("method", ["sgd", "rms"])
@pytest.mark.parametrize("segment", [1, 4])
def test_dynamic_evaluation(method: str, segment: int) -> None:
    """Losses, and the weights after all segments but the last, which nothing follows."""
    model, ids = small_model(), text(23)
    lr, lamb, epsilon = 0.05, 0.3, 0.01
    trained = [p.detach().clone() for p in model.parameters()]
    roots = root_mean_squares(model, text(50, 5), 2, segment) if method == "rms" else None
    learner = Dynamic(model, lr, lamb, segment, roots, epsilon)
    scores = score(learner, ids, 1).tolist()
    before = [list[Tensor]()]

    def update(weights: list[Tensor], gradients: list[Tensor]) -> None:
        before[0] = [w.clone() for w in weights]
        mean = 0.0 if roots is None else sum(float(r.mean()) for r in roots) / len(roots)
        for n, (w, g, w0) in enumerate(zip(weights, gradients, trained, strict=True)):
            flat, flat_g, flat_0 = w.view(-1), g.reshape(-1), w0.view(-1)
            for i in range(len(flat)):
                rate, pull = lr, lamb
                if roots is not None:
                    rms = float(roots[n].view(-1)[i])
                    rate, pull = lr / (rms + epsilon), min(lamb * rms / mean, 1.0)
                flat[i] = flat[i] + pull * (flat_0[i] - flat[i]) - rate * flat_g[i]

    other = small_model()
    assert scores == pytest.approx(dynamic_by_hand(other, ids, segment, update), rel=1e-9)
    for adapted, expected in zip(learner.model.parameters(), before[0], strict=True):
        torch.testing.assert_close(adapted, expected, rtol=1e-9, atol=1e-12)
    for p, w0 in zip(model.parameters(), trained, strict=True):
        assert torch.equal(p, w0)
    assert score(learner, ids, 1).tolist() == scores  # starts from the trained weights again


def test_dynamic_evaluation_ignores_a_gradient_filter() -> None:
    ids = text()
    plain, filtered = small_model(), small_model()
    config = dict(filtered.config(), grad_filter=2.0)
    filtered = RNNModel(**config).double()
    filtered.load_state_dict(plain.state_dict())
    scores = [score(Dynamic(m, 0.1, 0.1), ids, 4).tolist() for m in (plain, filtered)]
    assert scores[0] == scores[1]
    roots = [root_mean_squares(m, ids, 4) for m in (plain, filtered)]
    assert all(torch.equal(a, b) for a, b in zip(*roots, strict=True))


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_dynamic_evaluation_runs_forward_as_cudnn_needs_it_for_backward(
    rnn_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its training mode, though the model is in evaluation mode and drops nothing."""
    model, ids, name = small_model(rnn_type), text(), rnn_type.lower()
    compute = getattr(torch, name)

    def as_cudnn(*args: Any) -> Any:
        *_, train, _, _ = args
        assert train or not torch.is_grad_enabled(), "its backward would raise a RuntimeError"
        return compute(*args)

    expected = score(Dynamic(model, 0.1, 0.1), ids, 1), root_mean_squares(model, ids, 2)
    monkeypatch.setattr(torch, name, as_cudnn)
    found = score(Dynamic(model, 0.1, 0.1), ids, 1), root_mean_squares(model, ids, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    score(Plain(model), ids, 1)


def test_off_is_plain_bit_for_bit() -> None:
    model, ids = small_model().float(), text(200)
    plain = score(Plain(model), ids, 2, window=5)
    roots = root_mean_squares(model, ids, 2)
    same: list[Predictor] = [
        Cache(Plain(model), 30, 0.7, 0),
        Dynamic(model, lr=0, lamb=0.3),
        Dynamic(model, lr=0, lamb=0.3, root_mean_squares=roots),
        Cache(Dynamic(model, lr=0, lamb=0.3), 30, 0.7, 0),
        Mean([Plain(model)]),
    ]
    for predictor in same:
        assert torch.equal(score(predictor, ids, 2, window=5), plain)


def test_cache_over_dynamic() -> None:
    """The cache's keys are outputs of the weights of their time."""
    model, ids = small_model(), text()
    learner = Dynamic(model, 0.1, 0.2, segment=4)
    learner.start(1)
    keys, distributions = [], []
    for start in range(0, 40, 4):
        prediction = learner.read(ids[start : start + 4, None])
        keys += list(prediction.outputs)
        distributions += list(prediction.log_probs(slice(None)).exp())
    expected = []
    for t, (h, p) in enumerate(zip(keys, distributions, strict=True)):
        then, first = int(ids[t + 1]), max(0, t - 6)
        probability = float(p[then])
        if t:
            weights = [math.exp(0.9 * float(h @ keys[i])) for i in range(first, t)]
            hits = [w for i, w in zip(range(first, t), weights, strict=True) if ids[i + 1] == then]
            probability = 0.8 * probability + 0.2 * sum(hits) / sum(weights)
        expected.append(math.log(probability))
    found = score(Cache(Dynamic(model, 0.1, 0.2, segment=4), 6, 0.9, 0.2), ids, 1)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_temperature() -> None:
    model, ids = small_model(), text()
    expected = []
    for _, p, then in steps(model, ids):
        powers = [float(q) ** (1 / 0.6) for q in p]
        expected.append(math.log(powers[then] / sum(powers)))
    found = score(Temperature(Plain(model), 0.6), ids, 1, 7)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_mc_dropout() -> None:
    """K networks with a mask each for the whole text; windows change nothing."""
    model, ids = small_model(), text()
    sums = torch.zeros(40, dtype=torch.float64)
    for seed in (3, 4, 5):
        noise = Noise(torch.Generator().manual_seed(seed))
        output, _ = model.train()(ids[:-1, None], model.init_hidden(1), noise=noise)
        p = model.decoder(output).softmax(1)
        sums += torch.stack([p[t, ids[t + 1]] for t in range(40)])
    model.eval()
    networks = Mean([Plain(model, masks=seed) for seed in (3, 4, 5)])
    for window in (1, 6, 100):
        found = score(networks, ids, 1, window)
        torch.testing.assert_close(found, (sums / 3).log(), rtol=1e-9, atol=0)
    assert not model.training


@torch.no_grad()
def test_the_keys_of_a_cache_over_several_networks_are_the_means_of_their_outputs() -> None:
    model, ids = small_model(), text()
    outputs, distributions = [], []
    for seed in (3, 4, 5):
        noise = Noise(torch.Generator().manual_seed(seed))
        output, _ = model.train()(ids[:-1, None], model.init_hidden(1), noise=noise)
        outputs.append(output)
        distributions.append(model.decoder(output).softmax(1))
    keys, p = (torch.stack(each).mean(0) for each in (outputs, distributions))
    expected = []
    for t, then in enumerate(ids[1:].tolist()):
        probability, recent = float(p[t, then]), range(max(0, t - 9), t)
        if recent:
            weights = [math.exp(0.7 * float(keys[t] @ keys[i])) for i in recent]
            hits = [w for i, w in zip(recent, weights, strict=True) if ids[i + 1] == then]
            probability = 0.6 * probability + 0.4 * sum(hits) / sum(weights)
        expected.append(math.log(probability))
    networks = Mean([Plain(model.eval(), masks=seed) for seed in (3, 4, 5)])
    found = score(Cache(networks, 9, 0.7, 0.4), ids, 1, 7)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


PREDICTORS: dict[str, Callable[[RNNModel], Predictor]] = {
    "plain": Plain,
    "mc dropout": lambda m: Mean([Plain(m, masks=1), Plain(m, masks=2)]),
    "cache": lambda m: Cache(Plain(m), 9, 0.7, 0.3),
    "tempered cache": lambda m: Temperature(Cache(Plain(m), 9, 0.7, 0.3), 0.8),
    "cache of tempered mc dropout, dynamic": lambda m: Cache(
        Temperature(Mean([Dynamic(m, 0.1, 0.2, masks=1), Dynamic(m, 0.1, 0.2, masks=2)]), 1.3),
        9,
        0.7,
        0.3,
    ),
}


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_score_rank_and_distribution_agree(
    name: str, rnn_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.predictor.BLOCK_VALUES", 3 * WORDS)
    model, ids = small_model(rnn_type), text()
    predictor = PREDICTORS[name](model)
    predictor.start(2)
    for start in range(0, 20, 5):
        words = torch.stack([ids[start : start + 5], ids[20 + start : 25 + start]], 1)
        goals = torch.stack([ids[start + 1 : start + 6], ids[21 + start : 26 + start]], 1).flatten()
        prediction = predictor.read(words)
        log_p = prediction.log_probs(slice(0, 10))
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(10).double())
        own = log_p.gather(1, goals[:, None])[:, 0]
        torch.testing.assert_close(prediction.score(goals), own)
        order = log_p.argsort(dim=1, descending=True)
        ranks = [order[n].tolist().index(int(goal)) + 1 for n, goal in enumerate(goals)]
        assert prediction.ranks(goals).tolist() == ranks


@pytest.mark.parametrize("values", [(0, 1, 0.1), (5, -1, 0.1), (5, 1, 1.1), (5, 1, math.nan)])
def test_settings_that_cannot_be(values: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="the cache's"):
        Cache(Plain(small_model()), *values)
    with pytest.raises(ValueError, match="temperature"):
        Temperature(Plain(small_model()), 0)
