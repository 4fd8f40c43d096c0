"""A whole training run by hand: the paper's equations in float64, without a line of the project.

Plain torch, one time step after the other, autograd for the gradient. No dropout, so that nothing
is drawn but windows. The settings have the names of main.py's flags, the results those of the
fields of metrics.jsonl.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]
State = list[tuple[Tensor, Tensor]]  # (h, c) of each layer, (B, units)


@dataclass
class ByHand:
    """What a run should leave.

    events: lines of metrics.jsonl; best: weights of the best epoch, averaged where averaging ran;
    valid: validation loss after each update.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    best_epoch: int = 0
    valid: list[float] = field(default_factory=list)

    def log(self, event: str, **values: Any) -> None:
        self.events.append(dict(event=event, **values))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line["event"] == event]


def read_ids(folder: Path) -> dict[str, Tensor]:
    """Word ids by first appearance in train, valid and test, <eos> after each line; (N,) each."""
    index: dict[str, int] = {}
    ids = {}
    for split in ("train", "valid", "test"):
        lines = (folder / f"{split}.txt").read_text().splitlines()
        words = [word for line in lines for word in [*line.split(), "<eos>"]]
        ids[split] = torch.tensor([index.setdefault(word, len(index)) for word in words])
    return ids


@dataclass(frozen=True)
class Window:
    """An update: run from row first, the loss of rows start, …, stop - 1 counts.

    At each of cuts the gradient to the row before is multiplied by crossing.
    """

    first: int
    start: int
    stop: int
    cuts: Collection[int] = ()
    crossing: float = 0.0


def windows(flags: dict[str, Any], rows: int, draw: np.random.Generator) -> Iterator[Window]:
    """The updates of an epoch."""
    bptt, k1 = flags["bptt"], flags.get("k1") or flags["bptt"]
    start = 0
    while start < rows:
        first, crossing = start, 0.0
        match flags["bptt_scheme"]:
            case "variable":
                base = bptt if draw.random() < 0.95 else bptt / 2
                stop = start + min(max(5, int(draw.normal(base, 5))), bptt + 20)
            case "fixed":
                stop = start + k1
                first = min(start, max(0, stop - bptt))
            case "randomized":
                stop, crossing = start + bptt, 1 / flags["keep_prob"]
                while stop < rows and draw.random() < flags["keep_prob"]:
                    stop += bptt
            case "full":
                stop, crossing = rows, 1.0
        stop = min(stop, rows)
        cut = flags["bptt_scheme"] in ("randomized", "fixed") and first == start
        yield Window(first, start, stop, range(start + bptt, stop, bptt) if cut else (), crossing)
        start = stop


def step(w: Weights, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """One time step of the stack: word ids (B,) to the last layer's output (B, E)."""
    x, after = w["encoder.weight"][ids], []
    for layer, (h, c) in enumerate(state):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_ih, w_hh, b_ih, b_hh = (w[f"rnns.{layer}.{name}_l0"] for name in names)
        i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        x = h = o.sigmoid() * c.tanh()
        after.append((h, c))
    return x, after


def losses(w: Weights, output: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, nats; the decoder is the embedding unless it has a matrix."""
    scores = output @ w.get("decoder.weight", w["encoder.weight"]).T + w["decoder.bias"]
    return scores.logsumexp(-1) - scores.gather(-1, targets[..., None])[..., 0]


def zero_state(w: Weights, columns: int) -> State:
    units = [w[name].size(1) for name in w if name.endswith("weight_hh_l0")]
    return [(torch.zeros(columns, n).double(), torch.zeros(columns, n).double()) for n in units]


def evaluate(w: Weights, ids: Tensor, columns: int) -> float:
    """Mean loss of all N - 1 predictions, dealt out to stretches whose lengths differ by one."""
    total = 0.0
    parts = np.array_split(np.arange(len(ids) - 1), columns)  # the longer ones first
    state = zero_state(w, columns)
    for t in range(len(parts[0])):
        at = torch.tensor([part[t] for part in parts if t < len(part)])
        state = [(h[: len(at)], c[: len(at)]) for h, c in state]
        output, state = step(w, ids[at], state)
        total += float(losses(w, output, ids[at + 1]).sum())
    return total / (len(ids) - 1)


def objective(
    w: Weights, rows: Tensor, window: Window, states: dict[int, State], flags: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Mean loss of a window, and that with AR and TAR; leaves the states before each row."""
    state, outputs = states[window.first], []
    for t in range(window.first, window.stop):
        if t in window.cuts:
            state = [
                tuple(s.detach() + window.crossing * (s - s.detach()) for s in pair)  # type: ignore[misc]
                for pair in state
            ]
        output, state = step(w, rows[t], state)
        outputs.append(output)
        states[t + 1] = [(h.detach(), c.detach()) for h, c in state]
    counted = torch.stack(outputs[window.start - window.first :])  # (T, B, E)
    loss = losses(w, counted, rows[window.start + 1 : window.stop + 1]).mean()
    total = loss + flags["alpha"] * (counted**2).mean()
    ends = [0, *(t - window.start for t in window.cuts), len(counted)]
    for a, b in pairwise(ends):
        if b - a > 1:  # TAR compares no row with one beyond a cut
            slow = ((counted[a + 1 : b] - counted[a : b - 1]) ** 2).mean()
            total = total + flags["beta"] * slow * (b - a) / len(counted)
    return loss.detach(), total


class Optimizer:
    """SGD or Adam with L2 decay; once averaging, the mean of the iterates beside them."""

    def __init__(self, flags: dict[str, Any], initial: Weights) -> None:
        self.flags, self.lr = flags, flags["lr"]
        self.w = {name: value.double() for name, value in initial.items()}
        self.adam = flags["optimizer"] == "adam"
        self.steps, self.first, self.second = 0, dict[str, Any](), dict[str, Any]()
        self.averaging, self.averaged, self.summed = False, 0, dict[str, Any]()
        self.history: list[float] = []

    def step(self, gradients: Weights, share: float) -> float:
        """Clip and step with lr * share; returns the norm before clipping."""
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        # 1e-6 is torch.nn.utils.clip_grad_norm_'s guard against a norm of zero
        clip = min(1, self.flags["clip"] / (norm + 1e-6)) if self.flags["clip"] else 1
        self.steps += 1
        for name, w in self.w.items():
            g = clip * gradients[name] + self.flags["wdecay"] * w
            if self.adam:
                self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * g
                self.second[name] = 0.999 * self.second.get(name, 0) + 0.001 * g**2
                variance = self.second[name] / (1 - 0.999**self.steps)
                g = self.first[name] / (1 - 0.9**self.steps) / (variance.sqrt() + 1e-8)
            self.w[name] = w - self.lr * share * g
        if self.averaging:
            self.averaged += 1
            self.summed = {name: self.summed.get(name, 0) + w for name, w in self.w.items()}
        return norm

    def evaluated(self) -> Weights:
        """The weights that count."""
        if not self.averaged:
            return dict(self.w)
        return {name: total / self.averaged for name, total in self.summed.items()}

    def end_epoch(self, epoch: int, valid: float) -> bool:
        """The trigger and --when; returns whether averaging starts."""
        earlier = self.history[: max(0, len(self.history) - self.flags["nonmono"])]
        self.history.append(valid)
        worse = bool(earlier) and valid > min(earlier) and not self.averaging and not self.adam
        if worse and self.flags.get("nonmono_decay"):
            self.lr, self.history = self.lr / self.flags["nonmono_decay"], []
        elif worse and not self.flags.get("no_asgd"):
            self.averaging = True
        if epoch in self.flags.get("when", ()):
            self.lr /= 10
        return self.averaging and worse


def train(
    folder: Path,
    initial: Weights,
    flags: dict[str, Any],
    skipped: Collection[int] = (),
    fine_tuning: bool = False,
) -> ByHand:
    """Train, validate, keep the best, test.

    Args:
        folder: of the corpus.
        initial: weights to start from, by the names of plain LSTMs.
        flags: main.py's, all that matter here.
        skipped: numbers of the updates whose gradients overflow.
        fine_tuning: average all iterates, keep the initial weights unless an epoch is better, and
            stop at the first epoch whose loss is above the best of more than nonmono epochs ago.
    """
    ids, result, optimizer = read_ids(folder), ByHand(), Optimizer(flags, initial)
    length = len(ids["train"]) // flags["batch_size"]
    rows = ids["train"][: length * flags["batch_size"]].view(-1, length).T  # (N // B, B)
    draw = np.random.Generator(np.random.PCG64(flags["seed"]))
    update, norm, best = 0, 0.0, math.inf
    if fine_tuning:
        optimizer.averaging = True
        result.best = {name: value.double() for name, value in initial.items()}
        best = evaluate(result.best, ids["valid"], flags["eval_batch_size"])
        result.log("valid", step=0, epoch=0, loss=best, ppl=math.exp(best), averaged=False)
    for epoch in range(1, flags["epochs"] + 1):
        states = {0: zero_state(initial, flags["batch_size"])}
        interval: list[tuple[float, int]] = []
        for batch, window in enumerate(windows(flags, length - 1, draw), 1):
            update, count = update + 1, window.stop - window.start
            w = {name: value.clone().requires_grad_() for name, value in optimizer.w.items()}
            loss, total = objective(w, rows, window, states, flags)
            if update not in skipped:
                gradients = torch.autograd.grad(total, list(w.values()))
                share = count / flags["bptt"]
                norm = optimizer.step(dict(zip(w, gradients, strict=True)), share)
                interval.append((float(loss), count))
            at = dict(step=update, epoch=epoch)
            if batch % flags["log_interval"] == 0 or window.stop == length - 1:
                tokens = sum(n for _, n in interval)
                mean = sum(x * n for x, n in interval) / tokens if tokens else None
                ppl = None if mean is None else math.exp(mean)
                result.log("train", **at, loss=mean, ppl=ppl, lr=optimizer.lr, grad_norm=norm)
                interval = []
            valid = evaluate(optimizer.evaluated(), ids["valid"], flags["eval_batch_size"])
            result.valid.append(valid)
        averaged = optimizer.averaged > 0
        result.log("valid", **at, loss=valid, ppl=math.exp(valid), averaged=averaged)
        if valid < best:
            best, result.best, result.best_epoch = valid, optimizer.evaluated(), epoch
        if optimizer.end_epoch(epoch, valid):
            result.log("averaging", **at)
        losses_so_far = [line["loss"] for line in result.of("valid")[1:]]
        if fine_tuning and valid > min(losses_so_far[: -1 - flags["nonmono"]], default=math.inf):
            result.log("trigger", **at)
            break
    test = evaluate(result.best, ids["test"], flags["test_batch_size"])
    result.log("test", step=update, loss=test, ppl=math.exp(test), bpc=test / math.log(2))
    return result
