"""Each scheme against text unrolled row by row, in float64: whole epochs, weights and losses.

The reference knows nothing of windows or pieces. It is told which rows' losses count in an update
and what the gradient is multiplied by before each row; it builds one graph of single steps and
lets autograd take its gradient. Only the masks, and the gradient filter's equations, which have
tests of their own, are the code's.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import write_corpus
from engine.trainer import Trainer
from engine.training_state import TrainingOptions
from torch import Tensor

from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, VariableWindows, Window
from data.corpus import load_corpus
from engine.interrupt import Interrupt
from engine.run_folder import RunFolder
from engine.tracking import Tracker, WandbOptions
from gradient_filter import GradientFilter
from model import Masks, RNNModel, repackage_hidden
from nt_asgd import NTASGD

BATCH, LR, WDECAY, ALPHA, BETA = 3, 2.0, 0.01, 2.0, 1.0
ROWS = 23
States = list[tuple[Tensor, Tensor]]
Gate = Callable[[int], float]
MakeTrainer = Callable[..., Trainer]


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


class Reference:
    """Weights, states and gradients, row by row."""

    def __init__(self, trainer: Trainer, alpha: float = ALPHA, beta: float = BETA) -> None:
        self.model = trainer.model
        self.rows = trainer.rows
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.hidden = [(h[0], c[0]) for h, c in trainer.hidden]
        self.clip = trainer.options.clip
        self.bptt = trainer.options.bptt
        self.alpha, self.beta = alpha, beta
        threshold = self.model.grad_filter
        self.filters = [GradientFilter(threshold=threshold) for _ in self.model.filters]

    def objective(self, update: Update, masks: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Mean loss, what the gradient is taken of, and the weights in it."""
        w = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        last = update.counted[-1]
        x = {
            t: torch.stack([w["encoder.weight"][i] * masks.words[i] for i in self.rows[t].long()])
            * masks.locked[0][0]
            for t in range(update.first, last + 1)
        }
        self.states = {update.first: self.hidden}
        for layer in range(self.model.nlayers):
            x, raw = self._layer(layer, x, w, update, masks)
        total = torch.zeros((), dtype=torch.float64)
        for t in update.counted:
            scores = x[t] @ w["encoder.weight"].T + w["decoder.bias"]
            for b in range(BATCH):
                total = total - scores[b].log_softmax(0)[self.rows[t + 1, b].long()]
        n = len(update.counted)
        loss = total / (n * BATCH)
        units = BATCH * self.model.ninp
        ar = sum(((x[t] ** 2).sum() for t in update.counted), torch.zeros(())) / (n * units)
        return loss, loss + self.alpha * ar + self.beta * self._slowness(raw, update), w

    def _layer(
        self, layer: int, x: dict[int, Tensor], w: dict[str, Tensor], update: Update, masks: Any
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Dropped and raw outputs of a layer, by row."""
        prefix = f"rnns.{layer}.module."
        own = {n.removeprefix(prefix): v for n, v in w.items() if n.startswith(prefix)}
        own["hh"] = own.pop("weight_hh_l0_raw") * masks.weights[layer]["weight_hh_l0"]
        h, c = self.hidden[layer]
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
                h, c = crossed(h, update.gate(t)), crossed(c, update.gate(t))
            gates = x[t] @ used["weight_ih_l0"].T + used["bias_ih_l0"] + used["bias_hh_l0"]
            i, f, g, o = (gates + h @ used["hh"].T).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            raw[t] = h
            states = self.states.setdefault(t + 1, [])
            self.states[t + 1] = [*states, (h.detach(), c.detach())]
        return {t: raw[t] * masks.locked[layer + 1][0] for t in raw}, raw

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

    def run(self, update: Update, masks: Any) -> float:
        """Do the update; returns the mean loss."""
        loss, objective, w = self.objective(update, masks)
        objective.backward()
        gradients = {name: v.grad for name, v in w.items() if v.grad is not None}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        lr = LR * len(update.counted) / self.bptt
        self.weights = {
            n: (v - lr * (factor * gradients[n] + WDECAY * v)).detach() for n, v in w.items()
        }
        self.hidden = self.states[update.next_first]
        return float(loss.detach())


@pytest.fixture
def make_trainer(tmp_path: Path) -> Iterator[MakeTrainer]:
    """make_trainer(scheme, bptt, …): a trainer in float64, everything on, ROWS rows an epoch."""
    corpus = load_corpus(write_corpus(tmp_path / "corpus", lines=200))
    short = replace(corpus, train=corpus.train[: (ROWS + 1) * BATCH])

    with ExitStack() as stack:

        def make(scheme: Scheme, bptt: int, **changes: Any) -> Trainer:
            rates = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5)
            options: dict[str, Any] = dict(clip=0.3, alpha=ALPHA, beta=BETA)
            options.update((k, changes.pop(k)) for k in options.keys() & changes.keys())
            dtype = changes.pop("dtype", torch.float64)
            device = changes.pop("device", torch.device("cpu"))
            torch.manual_seed(5)
            sizes = dict(ninp=4, nhid=5, nlayers=2, tie_weights=True)
            model = RNNModel("LSTM", len(corpus.vocabulary), **{**sizes, **rates, **changes})
            model.to(device, dtype).train()
            with torch.no_grad():  # larger weights, so that what crosses a boundary matters
                for p in model.parameters():
                    p.mul_(2)
            number = len(list(tmp_path.iterdir()))
            folder = stack.enter_context(RunFolder(tmp_path / f"run{number}.pt"))
            tracker = stack.enter_context(closing(Tracker(folder.folder, {}, WandbOptions())))
            trainer = Trainer(
                model,
                NTASGD(model.parameters(), LR, WDECAY),
                scheme,
                short,
                TrainingOptions(epochs=1, batch_size=BATCH, bptt=bptt, **options),
                folder,
                Interrupt(),
                identity={},
            )
            trainer.tracker = tracker
            assert trainer.num_steps == ROWS
            return trainer

        yield make


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


def assert_same_epoch(trainer: Trainer, updates: list[Update]) -> None:
    """Run an epoch's windows and these updates side by side."""
    reference = Reference(trainer)
    windows = trainer.scheme.windows(ROWS)
    for number, (window, update) in enumerate(zip(windows, updates, strict=True)):
        state = torch.get_rng_state()
        masks = trainer.model.draw_masks(BATCH)
        torch.set_rng_state(state)
        trainer.update(window)
        loss = reference.run(update, masks)
        n = len(update.counted) * BATCH
        assert float(trainer.tally.summed) == pytest.approx(loss * n, rel=1e-10)
        trainer.tally.summed.zero_()
        weights = {n: p.detach() for n, p in trainer.model.named_parameters()}
        torch.testing.assert_close(weights, reference.weights, rtol=1e-8, atol=1e-11)
        if number < len(updates) - 1:
            for (h, c), (h2, c2) in zip(trainer.hidden, reference.hidden, strict=True):
                torch.testing.assert_close((h[0], c[0]), (h2, c2), rtol=1e-9, atol=1e-11)
    assert trainer.at.row == ROWS
    assert trainer.at.tokens == ROWS * BATCH
    for mine, theirs in zip(trainer.model.gradient_filters, reference.filters, strict=True):
        torch.testing.assert_close(mine.statistics, theirs.statistics)
        assert mine.statistics[0] > 0


@pytest.mark.parametrize("grad_filter", [0, 1.5], ids=["", "filter"])
@pytest.mark.parametrize(
    ("k1", "k2"), [(1, 1), (5, 5), (1, 4), (2, 5), (3, 4), (4, 8), (7, 3), (6, 2), (3, 1), (4, 40)]
)
def test_truncated(make_trainer: MakeTrainer, k1: int, k2: int, grad_filter: float) -> None:
    trainer = make_trainer(FixedWindows(k2, k1), k2, grad_filter=grad_filter)
    assert_same_epoch(trainer, truncated(k1, k2))


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


@pytest.mark.parametrize("grad_filter", [0, 1.5], ids=["", "filter"])
@pytest.mark.parametrize(
    "kept",
    [
        (True, True, True, True, True, True, True),  # 8 segments: 4 are run a second time
        (False, True, True, True, True, False, True),
        (False,) * 7,
        (True, False, True, False, False, True, True),
    ],
    ids=str,
)
def test_randomized(make_trainer: MakeTrainer, kept: tuple[bool, ...], grad_filter: float) -> None:
    trainer = make_trainer(randomized(3, 0.7, kept), 3, grad_filter=grad_filter)
    assert_same_epoch(trainer, randomized_updates(3, 0.7, kept))


@pytest.mark.parametrize("grad_filter", [0, 1.5], ids=["", "filter"])
@pytest.mark.parametrize("size", [1, 4, ROWS, 50])
def test_full(make_trainer: MakeTrainer, size: int, grad_filter: float) -> None:
    filtered = set(range(size, ROWS, size))
    trainer = make_trainer(FullWindows(size), size, grad_filter=grad_filter)
    assert_same_epoch(trainer, [Update(0, range(ROWS), whole, filtered, ROWS)])


def test_full_is_one_giant_window(make_trainer: MakeTrainer) -> None:
    results = []
    for scheme in (FullWindows(4), FixedWindows(ROWS), FixedWindows(ROWS + 9)):
        trainer = make_trainer(scheme, 10)
        trainer.train_epoch()
        results.append([p.detach() for p in trainer.model.parameters()])
        assert trainer.at.update == 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


@pytest.mark.parametrize(
    "window",
    [
        Window(0, 9),
        Window(0, 9, 5, (2, 7), kept=2, advance=2),
        Window(0, 9, 0, (4, 4, 1), crossing=0.0),
        Window(0, 20, 0, (3, 3, 3, 3, 3, 3, 2), crossing=1.5, kept=4),
        Window(0, 20, 0, (6, 6, 6, 2)),
    ],
)
def test_a_factor_on_the_loss_is_one_on_the_gradient(
    make_trainer: MakeTrainer, window: Window
) -> None:
    """Through all pieces, and exactly so for a power of two."""
    trainer = make_trainer(FixedWindows(9), 9, grad_filter=2.0)
    results = []
    for scale in (1.0, 1024.0):
        trainer.optimizer.zero_grad()
        torch.manual_seed(6)
        rows = trainer.rows[: window.length + 1]
        loss, _ = trainer.updater.gradient(window, rows, trainer.hidden, scale)
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        results.append([loss, *(g / scale for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def to(masks: Masks, device: torch.device) -> Masks:
    words = None if masks.words is None else masks.words.to(device)
    locked = [None if mask is None else mask.to(device) for mask in masks.locked]
    weights = [{n: mask.to(device) for n, mask in one.items()} for one in masks.weights]
    return Masks(words, locked, weights)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "scheme",
    [
        lambda: FixedWindows(5, 2),
        lambda: FixedWindows(2, 7),
        lambda: RandomizedWindows(2, 0.8, 1),
        lambda: FullWindows(4),
    ],
    ids=["overlapping", "in pieces", "randomized", "full"],
)
def test_on_a_gpu_as_on_a_cpu(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, scheme: Callable[[], Scheme]
) -> None:
    results: list[dict[str, Tensor]] = []
    drawn = Masks(None, [], [])
    for device in (torch.device("cpu"), torch.device("cuda")):
        trainer = make_trainer(scheme(), 5, device=device, grad_filter=2.0)
        drawn = trainer.model.draw_masks(BATCH) if not results else drawn
        masks = to(drawn, device)
        monkeypatch.setattr(trainer.model, "draw_masks", lambda _, masks=masks: masks)
        trainer.train_epoch()
        results.append({n: p.detach().cpu() for n, p in trainer.model.named_parameters()})
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def epoch_displacement(trainer: Trainer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far the updates of an epoch would move these weights, each taken at them, in sum."""
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    trainer.hidden = trainer.model.init_hidden(BATCH)
    for window in trainer.scheme.windows(ROWS):
        trainer.update(window)
        for name, parameter in trainer.model.named_parameters():
            total[name] += parameter.detach() - weights[name]
            parameter.data.copy_(weights[name])
    return total


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_the_expected_update_of_randomized_truncation_is_the_full_one(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    """The mean over all patterns of cuts, weighted by their probabilities; no sampling.

    For fixed weights and masks, without clipping, and with the learning rate as it is scaled.
    """
    size, probability = 5, 0.6
    num_boundaries = (ROWS - 1) // size
    trainer = make_trainer(FullWindows(size), size, beta=beta, clip=0)
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.0
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    masks = trainer.model.draw_masks(BATCH)
    monkeypatch.setattr(trainer.model, "draw_masks", lambda _: masks)

    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    patterns: dict[tuple[bool, ...], dict[str, Tensor]] = {}
    certainty = 0.0
    for kept in product((False, True), repeat=num_boundaries):
        trainer.scheme = randomized(size, probability, kept)
        patterns[kept] = epoch_displacement(trainer, weights)
        chance = probability ** sum(kept) * (1 - probability) ** (num_boundaries - sum(kept))
        certainty += chance
        for name, value in patterns[kept].items():
            mean[name] += chance * value
    assert certainty == pytest.approx(1)

    # Full, from its definition: the summed loss of all rows, with TAR within segments.
    trainer.hidden = trainer.model.init_hidden(BATCH)
    apart = set(range(0, ROWS, size))
    update = Update(0, range(ROWS), whole, set(), ROWS, apart)
    _, objective, w = Reference(trainer, beta=beta).objective(update, masks)
    (objective * ROWS / size).backward()
    for name, value in w.items():
        assert value.grad is not None
        torch.testing.assert_close(mean[name], -LR * value.grad, rtol=1e-9, atol=1e-11)

    # No single pattern gives it, so the mean is over something.
    never, always = patterns[(False,) * num_boundaries], patterns[(True,) * num_boundaries]
    for pattern in (never, always):
        name = "rnns.0.module.weight_hh_l0_raw"
        assert float((pattern[name] - mean[name]).norm() / mean[name].norm()) > 1e-3
    if not beta:
        trainer.scheme = FullWindows(size)
        full = epoch_displacement(trainer, weights)
        for name, value in full.items():
            torch.testing.assert_close(mean[name], value, rtol=1e-9, atol=1e-11)


def test_randomized_is_fixed_where_all_is_cut(make_trainer: MakeTrainer) -> None:
    results = []
    for scheme in (FixedWindows(5), FixedWindows(5, 5), randomized(5, 0.5, (False,) * 4)):
        trainer = make_trainer(scheme, 5, grad_filter=2.0)
        trainer.train_epoch()
        results.append([p.detach().clone() for p in trainer.model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scheme", [lambda: FixedWindows(6), lambda: VariableWindows(6, 3)])
def test_fixed_and_variable_are_the_plain_loop_bit_for_bit(
    make_trainer: MakeTrainer, scheme: Callable[[], Scheme]
) -> None:
    """In float32, against a loop that knows only how to run a whole window at once."""
    trainers = [make_trainer(scheme(), 6, dtype=torch.float32, grad_filter=3.0) for _ in range(2)]
    total = torch.zeros((), dtype=torch.float64)
    torch.manual_seed(8)
    one = trainers[0]
    norms = []
    for window in one.scheme.windows(ROWS):
        rows = one.rows[window.start : window.start + window.length + 1].long()
        one.optimizer.zero_grad()
        result, one.hidden, raws, outputs = one.model(
            rows[:-1], repackage_hidden(one.hidden), return_h=True
        )
        loss = F.cross_entropy(one.model.decoder(result), rows[1:].flatten())
        objective = loss + ALPHA * outputs[-1].square().mean()
        if window.length > 1:
            objective = objective + BETA * (raws[-1][1:] - raws[-1][:-1]).square().mean()
        objective.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(one.model.parameters(), 0.3))
        one.optimizer.param_groups[0]["lr"] = LR * window.length / 6
        one.optimizer.step()
        total += loss.detach().double() * rows[1:].numel()
    torch.manual_seed(8)
    other = trainers[1]
    for window in other.scheme.windows(ROWS):
        other.update(window)
    assert float(other.tally.summed) == float(total)
    assert torch.equal(other.tally.grad_norm, norms[-1])
    assert len(norms) == other.at.update
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for mine, theirs in zip(other.model.gradient_filters, one.model.gradient_filters, strict=True):
        assert torch.equal(mine.statistics, theirs.statistics)


def test_activations_of_one_segment_are_held_at_a_time(make_trainer: MakeTrainer) -> None:
    """What autograd keeps alive at once, counted by its own hooks on saved tensors."""

    def peak(window: Window, rows: int) -> int:
        trainer = make_trainer(FixedWindows(ROWS), ROWS)
        trainer.num_steps = rows
        updater = trainer.updater
        alive, most = 0, 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, most
                self.tensor = tensor
                alive += tensor.numel()
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.tensor.numel()

        updater.rows = torch.randint(0, trainer.model.ntoken, (rows + 1, BATCH))
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            updater(window, trainer.hidden)
        assert most > 0
        return most

    one = peak(Window(0, 20), 20)
    for rows in (100, 400):
        [full] = FullWindows(20).windows(rows)
        assert peak(full, rows) <= 1.3 * one
        [kept] = randomized(20, 0.5, (True,) * (rows // 20 - 1)).windows(rows)
        assert 3 * one < peak(kept, rows) <= 4.6 * one
        [cut] = FixedWindows(20, rows).windows(rows)
        assert peak(cut, rows) <= 1.3 * one
    assert peak(Window(0, 100), 100) > 4 * one
