"""The objective with penalties of a user's own, put together from pieces, by hand in float64."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from row_by_row import BATCH, crossed, lstm_cell
from torch import Tensor

from bptt import Window
from diagnostics.gradients import window_gradient
from model import RNNModel
from noise import Noise
from training.gradient import WindowGradient
from training.objective import Objective, Penalty, Share, Trace

NTOKEN, NINP, NHID = 9, 4, 5
WEIGHTS = dict(cells=0.7, spread=0.3, jumps=0.2)


def cells(trace: Trace, weight: float) -> Tensor:
    """On the cells that a piece leaves in the first layer, and on those it finds there."""
    found, left = trace.before[0][1], trace.after[0][1]
    return weight * ((left**2).mean() + (left * found.detach()).mean())


def spread(trace: Trace, weight: float) -> Tensor:
    """On what dropout makes of the first layer's outputs."""
    return weight * (trace.outputs[0] - trace.raw_outputs[0]).abs().mean()


def jumps(trace: Trace, weight: float) -> Tensor:
    return weight * (trace.raw_outputs[-1][1:] - trace.raw_outputs[-1][:-1]).abs().mean()


def unwanted(trace: Trace, weight: float) -> Tensor:
    raise AssertionError("its weight is 0")


PENALTIES = [
    Penalty(cells, WEIGHTS["cells"]),
    Penalty(spread, WEIGHTS["spread"]),
    Penalty(jumps, WEIGHTS["jumps"], over_pairs=True),
    Penalty(unwanted, 0.0),
]


def build_model() -> RNNModel:
    rates: dict[str, Any] = dict(dropout=0.3, dropouth=0.4, dropouti=0.0, dropoute=0.0)
    model = RNNModel("LSTM", NTOKEN, NINP, NHID, 2, **rates, tie_weights=True).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model.train()


def by_hand(
    model: RNNModel, window: Window, text: Tensor, hidden: list[list[Tensor]], noise: Noise
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Mean loss, objective and the weights in it, row by row in one graph."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    own = [
        {n.split(".")[-1]: v for n, v in w.items() if n.startswith(f"rnns.{layer}.")}
        for layer in (0, 1)
    ]
    masks = [
        noise.of(f"layer {layer}").drop("output", (1, BATCH, units), p, like=text.double())[0]
        for layer, units, p in ((0, NHID, 0.4), (1, NINP, 0.3))
    ]
    ends = list(accumulate(window.pieces or (window.length,)))
    states: list[tuple[Tensor, ...]] = [(h, c) for h, c in hidden]
    found: dict[int, Tensor] = {0: states[0][1]}  # the first layer's cells before each row
    raws: list[list[Tensor]] = [[], []]
    losses: list[Tensor] = []
    for t in range(window.length):
        x = w["encoder.weight"][text[t]]
        for layer in (0, 1):
            if t in ends:
                states[layer] = tuple(crossed(part, window.crossing) for part in states[layer])
            states[layer] = lstm_cell(x, states[layer], own[layer], layer, t)
            raws[layer].append(states[layer][0])
            x = raws[layer][-1] * masks[layer]
        found[t + 1] = states[0][1]
        scores = (x @ w["encoder.weight"].T + w["decoder.bias"]).log_softmax(1)
        losses.append(-scores[range(BATCH), text[t + 1]].mean())
    counted = range(window.warmup, window.length)
    loss = sum((losses[t] for t in counted), torch.zeros(())) / window.counted
    objective = loss
    for start, stop in pairwise([0, *ends]):
        rows = [t for t in counted if start <= t < stop]
        share = len(rows) / window.counted
        left, before = found[stop], found[start].detach()
        if rows:
            penalty = (left**2).mean() + (left * before).mean()
            objective = objective + share * WEIGHTS["cells"] * penalty
        steps = [(raws[1][t + 1] - raws[1][t]).abs().mean() for t in rows[:-1]]
        if window.crossing != 1 and steps:
            objective = objective + share * WEIGHTS["jumps"] * sum(steps) / len(steps)
    if window.crossing == 1:
        steps = [(raws[1][t + 1] - raws[1][t]).abs().mean() for t in counted[:-1]]
        objective = objective + WEIGHTS["jumps"] * sum(steps) / len(steps)
    apart = [(raws[0][t] * masks[0] - raws[0][t]).abs().mean() for t in counted]
    return loss, objective + WEIGHTS["spread"] * sum(apart) / len(apart), w


@pytest.mark.parametrize(
    "window",
    [
        Window(0, 8),
        Window(0, 7, pieces=(3, 3, 1), crossing=0.0),  # k1 = 7, k2 = 3
        Window(0, 9, 5, (2, 7), kept=2, advance=2),
        Window(0, 9, 4, (6, 3), kept=2, advance=6),
        Window(0, 10, pieces=(4, 4, 2)),
        Window(0, 10, pieces=(4, 4, 2), crossing=1.5, kept=2),
    ],
    ids=["whole", "in pieces", "overlapping", "counted in both", "full", "randomized"],
)
def test_penalties_of_one_s_own_over_pieces(window: Window) -> None:
    model, noise = build_model(), Noise()
    text = torch.randint(0, NTOKEN, (window.length + 1, BATCH))
    hidden = [tuple(torch.randn_like(s) for s in state) for state in model.init_hidden(BATCH)]
    gradient = WindowGradient(Objective(model, PENALTIES))
    loss, _ = gradient(window, text, hidden, noise)
    by_rows = [[part[0] for part in state] for state in hidden]
    expected, objective, w = by_hand(model, window, text, by_rows, noise)
    objective.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-9, atol=1e-12)


def test_training_and_diagnosis_have_one_objective() -> None:
    model, noise = build_model(), Noise()
    text, hidden = torch.randint(0, NTOKEN, (9, BATCH)), model.init_hidden(BATCH)
    objective = Objective(model, PENALTIES)
    seen = window_gradient(objective, text, hidden, noise)
    WindowGradient(objective)(Window(0, 8), text, hidden, noise)
    norms = {
        name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None
    }
    assert seen.norms == norms
    by_rows = [[part[0] for part in state] for state in hidden]
    loss, total, _ = by_hand(model, Window(0, 8), text, by_rows, noise)
    found = objective(text[:-1], text[1:], hidden, noise)
    assert float(found[0]) == seen.loss == pytest.approx(loss.item(), rel=1e-12)
    assert found[1].item() == pytest.approx(total.item(), rel=1e-12)


def test_the_decoder_draws_factors_under_a_name_of_its_own() -> None:
    """And is given the last layer's output at the rows that count."""
    model = build_model()
    text, hidden, noise = torch.randint(0, NTOKEN, (9, BATCH)), model.init_hidden(BATCH), Noise()
    received: list[Noise | None] = []

    def kernel(output: Tensor, targets: Tensor, factors: Noise | None) -> Tensor:
        received.append(factors)
        assert output.shape == (5 * BATCH, NINP)
        assert torch.equal(targets, text[4:].flatten())
        return model.decoder.plain_loss(output, targets, factors)

    model.decoder.kernel = kernel
    Objective(model, [])(text[:-1], text[1:], hidden, noise, Share(skipped=3))
    [factors] = received
    assert factors is not None
    drawn = factors.drop("any", (2,), 0.5, like=text)
    assert noise.of("decoder").drop("any", (2,), 0.5, like=text) is drawn
