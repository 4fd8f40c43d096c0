"""Training row by row, in float64: what the pieces and windows of each scheme are held against.

The reference knows nothing of windows or pieces. It is told which rows' losses count in an update
and what the gradient is multiplied by before each row; it builds one graph of single steps and
lets autograd take its gradient. Only the random factors, and the gradient filter's equations,
which have tests of their own, are the code's.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import write_corpus
from small_trainer import SmallTrainer
from torch import Tensor

from bptt import RandomizedWindows, Scheme, Window
from data.corpus import load_corpus
from gradient_filter import GradientFilter
from model import RNNModel
from noise import Noise
from training.objective import paper_penalties

BATCH, LR, WDECAY, CLIP, ALPHA, BETA = 3, 2.0, 0.01, 0.3, 2.0, 1.0
ROWS = 23
RATES = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5)
Parts = tuple[Tensor, ...]
# From the input, the state and the weights to the next state, of a layer in a row.
Cell = Callable[[Tensor, Parts, dict[str, Tensor], int, int], Parts]
Gate = Callable[[int], float]


class Update(NamedTuple):
    """An update by its definition.

    first: row that it is run from; counted: rows whose loss counts; gate: what the gradient is
    multiplied by where it crosses from a row to the one before; filtered: rows at which another
    call of the gradient filter begins; next_first: row that the next update is run from; apart:
    rows that TAR does not compare with the row before.
    """

    first: int
    counted: range
    gate: Gate
    filtered: set[int]
    next_first: int
    apart: set[int] = set()  # noqa: RUF012


def crossed(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by factor."""
    return x.detach() + factor * (x - x.detach()) if factor else x.detach()


def lstm_cell(x: Tensor, state: Parts, w: dict[str, Tensor], layer: int, row: int) -> Parts:
    h, c = state
    sums = x @ w["weight_ih_l0"].T + w["bias_ih_l0"] + h @ w["weight_hh_l0"].T + w["bias_hh_l0"]
    i, f, g, o = sums.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(x: Tensor, state: Parts, w: dict[str, Tensor], layer: int, row: int) -> Parts:
    (h,) = state
    in_r, in_z, in_n = (x @ w["weight_ih_l0"].T + w["bias_ih_l0"]).chunk(3, dim=1)
    hh_r, hh_z, hh_n = (h @ w["weight_hh_l0"].T + w["bias_hh_l0"]).chunk(3, dim=1)
    r, z = (in_r + hh_r).sigmoid(), (in_z + hh_z).sigmoid()
    n = (in_n + r * hh_n).tanh()
    return ((1 - z) * n + z * h,)


def filters_of(model: RNNModel) -> list[GradientFilter]:
    return [layer.gradient_filter for layer in model.layers if layer.gradient_filter is not None]


class Reference:
    """Weights, states and gradients, row by row."""

    def __init__(self, trainer: SmallTrainer) -> None:
        self.model = trainer.model
        self.rows = trainer.updater.rows
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.hidden = [tuple(part[0] for part in state) for state in trainer.hidden]
        self.bptt, self.clip = trainer.updater.bptt, trainer.step.clip
        self.wdecay = trainer.optimizer.param_groups[0]["weight_decay"]
        penalties = {p.over_pairs: p.weight for p in trainer.updater.gradient.objective.penalties}
        self.alpha, self.beta = penalties.get(False, 0), penalties.get(True, 0)
        self.cell: Cell = lstm_cell
        self.filters = [
            GradientFilter(threshold=f.threshold, normalize=f.normalize)
            for f in filters_of(self.model)
        ]

    def objective(self, update: Update, noise: Noise) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Mean loss, what the gradient is taken of, and the weights in it."""
        w = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        embedding = w["encoder.weight"]
        last = update.counted[-1]
        words = noise.drop("words", (len(embedding), 1), self.model.dropoute, like=embedding)
        first = self._locked(noise.of("input"), self.model.layer_sizes[0], self.model.dropouti)
        x = {
            t: torch.stack([embedding[i] * words[i] for i in self.rows[t].long()]) * first
            for t in range(update.first, last + 1)
        }
        self.states = {update.first: self.hidden}
        for layer in range(self.model.nlayers):
            x, raw = self._layer(layer, x, w, update, noise.of(f"layer {layer}"))
        total = torch.zeros((), dtype=torch.float64)
        for t in update.counted:
            scores = x[t] @ w.get("decoder.weight", embedding).T + w["decoder.bias"]
            for b in range(BATCH):
                total = total - scores[b].log_softmax(0)[self.rows[t + 1, b].long()]
        n = len(update.counted)
        loss = total / (n * BATCH)
        units = BATCH * self.model.layer_sizes[-1]
        ar = sum(((x[t] ** 2).sum() for t in update.counted), torch.zeros(())) / (n * units)
        return loss, loss + self.alpha * ar + self.beta * self._slowness(raw, update), w

    def _locked(self, noise: Noise, features: int, dropout: float) -> Tensor:
        like = self.model.encoder.weight
        return noise.drop("output", (1, BATCH, features), dropout, like=like, batch_dim=1)[0]

    def _layer(
        self, layer: int, x: dict[int, Tensor], w: dict[str, Tensor], update: Update, noise: Noise
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Dropped and raw outputs of a layer, by row."""
        prefix = f"rnns.{layer}." + ("module." if self.model.wdrop else "")
        own = {n.removeprefix(prefix): v for n, v in w.items() if n.startswith(prefix)}
        for name in [name for name in own if name.endswith("_raw")]:
            value, name = own.pop(name), name.removesuffix("_raw")
            mask = noise.drop(name, tuple(value.shape), self.model.wdrop, like=value)
            own[name] = value * mask
        state = self.hidden[layer]
        raw, used = {}, own
        for t in x:
            if self.filters and (t == update.first or t in update.filtered):
                later = [s for s in x if s >= t]
                ends = [s for s in later if s > t and s in update.filtered]
                part = [s for s in later if not ends or s < ends[0]]
                inputs, *rest = self.filters[layer](
                    torch.stack([x[s] for s in part]), *own.values()
                )
                used = dict(zip(own, rest, strict=True))
                x = {**x, **dict(zip(part, inputs, strict=True))}
            if t > update.first:
                state = tuple(crossed(part, update.gate(t)) for part in state)
            state = self.cell(x[t], state, used, layer, t)
            raw[t] = state[0]
            states = self.states.setdefault(t + 1, [])
            self.states[t + 1] = [*states, tuple(part.detach() for part in state)]
        last = layer == self.model.nlayers - 1
        dropout = self.model.dropout if last else self.model.dropouth
        mask = self._locked(noise, state[0].size(1), dropout)
        return {t: raw[t] * mask for t in raw}, raw

    def _slowness(self, raw: dict[int, Tensor], update: Update) -> Tensor | float:
        """TAR: each stretch of rows by its share of the counted ones."""
        n = len(update.counted)
        stretches: list[list[int]] = []
        for t in update.counted:
            if stretches and t not in update.apart:
                stretches[-1].append(t)
            else:
                stretches.append([t])
        result: Tensor | float = 0.0
        for rows in stretches:
            for t, u in pairwise(rows):
                size = (len(rows) - 1) * raw[t].numel()
                result = result + ((raw[u] - raw[t]) ** 2).sum() / size * len(rows) / n
        return result

    def run(self, update: Update, noise: Noise) -> float:
        """Do the update; returns the mean loss."""
        loss, objective, w = self.objective(update, noise)
        objective.backward()
        gradients = {name: v.grad for name, v in w.items() if v.grad is not None}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        lr = LR * len(update.counted) / self.bptt
        self.weights = {
            n: (v - lr * (factor * gradients[n] + self.wdecay * v)).detach() for n, v in w.items()
        }
        self.hidden = self.states[update.next_first]
        return float(loss.detach())


def build_trainer(
    folder: Path,
    scheme: Scheme,
    bptt: int,
    kind: str = "LSTM",
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    wdecay: float = WDECAY,
    clip: float = CLIP,
    device: torch.device | None = None,
    **changes: Any,
) -> SmallTrainer:
    """A trainer with everything on, ROWS rows an epoch; changes: other keywords of the model."""
    corpus = load_corpus(write_corpus(folder / "corpus", lines=200))
    short = replace(corpus, train=corpus.train[: (ROWS + 1) * BATCH])
    torch.manual_seed(5)
    sizes: dict[str, Any] = dict(ninp=4, nhid=5, nlayers=2, tie_weights=True)
    keywords = {**sizes, **RATES, **changes}
    model = RNNModel(kind, len(corpus.vocabulary), **keywords).to(device, torch.float64)
    with torch.no_grad():  # larger weights, so that what crosses a boundary matters
        for p in model.parameters():
            p.mul_(2)
    trainer = SmallTrainer(
        folder,
        model,
        scheme,
        short,
        paper_penalties(alpha, beta),
        batch_size=BATCH,
        bptt=bptt,
        lr=LR,
        wdecay=wdecay,
        clip=clip,
    )
    assert trainer.num_steps == ROWS
    return trainer


def whole(row: int) -> float:
    return 1.0


def cut_before(rows: set[int]) -> Gate:
    return lambda t: 0.0 if t in rows else 1.0


def truncated(k1: int, k2: int) -> list[Update]:
    """The updates of BPTT(k1, k2), from its definition."""
    updates = []
    for row in range(0, ROWS, k1):
        counted = range(row, min(row + k1, ROWS))
        first = min(row, max(0, row + k1 - k2))  # through k2 rows, the counted ones at their end
        following = row + k1
        next_first = min(following, max(0, following + k1 - k2))
        cuts = {row + k2 * i for i in range(1, k1)} if k1 > k2 else set[int]()
        filtered = cuts | ({next_first} if following < ROWS else set())

        updates.append(
            Update(first, counted, cut_before(cuts), filtered, min(next_first, ROWS), cuts)
        )
    return updates


class Planned:
    """Stands in for a generator whose draws are known: below any probability, or above."""

    def __init__(self, kept: tuple[bool, ...]) -> None:
        self.draws = [0.0 if keep else 0.999999 for keep in kept]

    def random(self) -> float:
        return self.draws.pop(0)


def randomized(size: int, probability: float, kept: tuple[bool, ...]) -> RandomizedWindows:
    scheme = RandomizedWindows(size, probability, seed=1)
    scheme._generator = Planned(kept)  # type: ignore[assignment]
    return scheme


def randomized_updates(size: int, probability: float, kept: tuple[bool, ...]) -> list[Update]:
    boundaries = {size * (i + 1): keep for i, keep in enumerate(kept)}
    starts = [0, *(row for row, keep in boundaries.items() if not keep), ROWS]

    def gate(t: int) -> float:
        return 1 / probability if t in boundaries else 1.0

    return [
        Update(first, range(first, stop), gate, set(boundaries), stop, set(boundaries))
        for first, stop in pairwise(starts)
    ]


def full_updates(size: int) -> list[Update]:
    return [Update(0, range(ROWS), whole, set(range(size, ROWS, size)), ROWS)]


def assert_same_epoch(
    trainer: SmallTrainer,
    updates: list[Update],
    make_cell: Callable[[Noise, Window], Cell] = lambda noise, window: lstm_cell,
) -> None:
    """Run an epoch's windows and these updates side by side.

    make_cell: the layers' equations, for a window with this noise.
    """
    reference = Reference(trainer)
    windows = trainer.scheme.windows(ROWS)
    for number, (window, update) in enumerate(zip(windows, updates, strict=True)):
        noise = trainer.fix_noise()
        trainer.update(window)
        reference.cell = make_cell(noise, window)
        loss = reference.run(update, noise)
        n = len(update.counted) * BATCH
        assert float(trainer.tally.summed) == pytest.approx(loss * n, rel=1e-10)
        trainer.tally.summed.zero_()
        weights = {n: p.detach() for n, p in trainer.model.named_parameters()}
        torch.testing.assert_close(weights, reference.weights, rtol=1e-8, atol=1e-11)
        if number < len(updates) - 1:
            states = [tuple(part[0] for part in state) for state in trainer.hidden]
            torch.testing.assert_close(states, reference.hidden, rtol=1e-9, atol=1e-11)
    assert trainer.at.row == ROWS
    assert trainer.at.tokens == ROWS * BATCH
    for mine, theirs in zip(filters_of(trainer.model), reference.filters, strict=True):
        torch.testing.assert_close(mine.statistics, theirs.statistics)
        assert mine.statistics[0] > 0
