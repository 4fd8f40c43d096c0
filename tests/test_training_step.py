"""One whole update against everything written out per time step, in float64.

Only the random factors are the code's: they are read from the Noise that drew them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import write_corpus
from small_trainer import SmallTrainer
from torch import Tensor

from bptt import FixedWindows, VariableWindows, Window
from data.corpus import load_corpus
from decoders.linear import Linear
from engine.interrupt import StopRequested
from kernels.choose import install
from kernels.linear_cross_entropy import FastLinear
from kernels.lstm_cpu import CpuLSTM
from model import RNNModel
from noise import Noise
from training.callback import Callback, UpdateStart
from training.objective import Objective, paper_penalties


class Setting(NamedTuple):
    """What is switched on."""

    nlayers: int = 3
    tied: bool = True
    dropout: float = 0.4
    dropouth: float = 0.25
    dropouti: float = 0.3
    dropoute: float = 0.1
    wdrop: float = 0.5
    clip: float = 0.05
    alpha: float = 2.0
    beta: float = 1.0
    wdecay: float = 0.01


BATCH, STEPS, BPTT, LR = 4, 6, 10, 3.0


def locked(x: Tensor, p: float, noise: Noise) -> Tensor:
    """x (T, B, F) under one mask, applied step by step."""
    if not p:
        return x
    mask = noise.drop("output", (1, x.size(1), x.size(2)), p, like=x)
    return torch.stack([x_t * mask[0] for x_t in x])


def lstm_by_steps(
    x: Tensor, h: Tensor, c: Tensor, w: dict[str, Tensor], w_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = []
    for x_t in x:
        gates = x_t @ w["weight_ih_l0"].T + w["bias_ih_l0"] + h @ w_hh.T + w["bias_hh_l0"]
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def update_by_hand(
    weights: dict[str, Tensor], rows: Tensor, hidden: list, setting: Setting, noise: Noise
) -> tuple[float, float, list, dict[str, Tensor]]:
    """The update's loss, gradient norm, new states and new weights, from the equations."""
    w = {name: value.clone().requires_grad_() for name, value in weights.items()}
    embedding = w["encoder.weight"]
    inputs, targets = rows[:-1], rows[1:]
    x = torch.stack([torch.stack([embedding[i] for i in row]) for row in inputs])
    if setting.dropoute:
        keep = noise.drop("words", (len(embedding), 1), setting.dropoute, like=embedding)
        x = torch.stack(
            [
                torch.stack([x[t, b] * keep[inputs[t, b]] for b in range(BATCH)])
                for t in range(len(inputs))
            ]
        )
    x = locked(x, setting.dropouti, noise.of("input"))
    states = []
    for layer in range(setting.nlayers):
        prefix = f"rnns.{layer}." + ("module." if setting.wdrop else "")
        own = {name.removeprefix(prefix): v for name, v in w.items() if name.startswith(prefix)}
        factors = noise.of(f"layer {layer}")
        if setting.wdrop:
            w_hh = own["weight_hh_l0_raw"]
            w_hh = w_hh * factors.drop("weight_hh_l0", tuple(w_hh.shape), setting.wdrop, like=w_hh)
        else:
            w_hh = own["weight_hh_l0"]
        raw, h, c = lstm_by_steps(x, hidden[layer][0][0], hidden[layer][1][0], own, w_hh)
        states.append((h, c))
        last = layer == setting.nlayers - 1
        x = locked(raw, setting.dropout if last else setting.dropouth, factors)
    decoder = embedding if setting.tied else w["decoder.weight"]
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(len(inputs)):
        for b in range(BATCH):
            scores = decoder @ x[t, b] + w["decoder.bias"]
            loss = loss - (scores[targets[t, b]] - scores.exp().sum().log())
    loss = loss / targets.numel()
    ar = setting.alpha * sum((v**2).sum() for v in x) / x.numel()
    tar = setting.beta * sum(((raw[t + 1] - raw[t]) ** 2).sum() for t in range(len(raw) - 1))
    (loss + ar + tar / max(1, raw[1:].numel())).backward()
    gradients = {name: v.grad for name, v in w.items() if v.grad is not None}
    norm = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
    # 1e-6 is torch.nn.utils.clip_grad_norm_'s guard against a norm of zero.
    factor = min(1.0, setting.clip / (norm + 1e-6)) if setting.clip else 1.0
    lr = LR * len(inputs) / BPTT
    new = {
        name: (v - lr * (factor * gradients[name] + setting.wdecay * v)).detach()
        for name, v in w.items()
    }
    return float(loss.detach()), norm, states, new


def make_trainer(
    folder: Path, setting: Setting, device: torch.device | None = None
) -> SmallTrainer:
    corpus = load_corpus(write_corpus(folder / "corpus", lines=300))
    rates = {n: v for n, v in setting._asdict().items() if "drop" in n}
    model = RNNModel(
        "LSTM", len(corpus.vocabulary), 5, 7, setting.nlayers, **rates, tie_weights=setting.tied
    )
    return SmallTrainer(
        folder,
        model.to(device, torch.float64),
        FixedWindows(BPTT),
        corpus,
        paper_penalties(setting.alpha, setting.beta),
        batch_size=BATCH,
        bptt=BPTT,
        lr=LR,
        wdecay=setting.wdecay,
        clip=setting.clip,
    )


def install_fast(model: RNNModel) -> None:
    """Kernels that choose takes for bfloat16 alone, in float64."""
    for layer in model.layers:
        layer.kernel = CpuLSTM(torch.float64)
    assert isinstance(model.decoder, Linear)
    model.decoder.kernel = FastLinear(model.decoder, None)


def no(name: str) -> dict[str, Any]:
    """The change that switches a regulariser off."""
    return {name: 0}


EVERYTHING = Setting()
SETTINGS = [
    EVERYTHING,
    EVERYTHING._replace(nlayers=1),
    EVERYTHING._replace(tied=False, nlayers=2),
    Setting(2, True, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    *[EVERYTHING._replace(**no(name)) for name in Setting._fields[2:]],
]


@pytest.mark.parametrize("kernels", ["plain", "fast", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_updates_equal_the_equations(tmp_path: Path, setting: Setting, kernels: str) -> None:
    device = torch.device("cuda" if kernels == "cuda" else "cpu")
    trainer = make_trainer(tmp_path, setting, device)
    if kernels == "fast":
        install_fast(trainer.model)
    elif kernels == "cuda":
        chosen = install(trainer.model, None, device)
        assert chosen["layers"].kernel == "cudnn"
    hidden = trainer.hidden
    for start in (0, STEPS):
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        rows = trainer.updater.rows[start : start + STEPS + 1].long()
        noise = trainer.fix_noise()
        trainer.update(Window(start, STEPS))
        loss, norm, states, new = update_by_hand(weights, rows, hidden, setting, noise)
        assert float(trainer.tally.summed) == pytest.approx(loss * STEPS * BATCH, rel=1e-10)
        if setting.clip:
            assert float(trainer.tally.grad_norm) == pytest.approx(norm, rel=1e-9)
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), new[name], rtol=1e-9, atol=1e-11)
        for (h, c), (h2, c2) in zip(trainer.hidden, states, strict=True):
            torch.testing.assert_close(h[0], h2, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(c[0], c2, rtol=1e-9, atol=1e-11)
        hidden = [(h.detach()[None], c.detach()[None]) for h, c in states]
        trainer.tally.summed.zero_()


def test_runs_on_the_device_and_learns_there(tmp_path: Path, device: torch.device) -> None:
    setting = Setting(1, True, 0.05, 0, 0.05, 0.02, 0.1, 0.25, 0.1, 0.1, 1e-6)
    trainer = make_trainer(tmp_path, setting, device)
    trainer.scheme = VariableWindows(BPTT, 1)
    trainer.optimizer.param_groups[0]["lr"] = 20.0
    before = trainer.validate()
    with trainer.writer:
        for _ in range(3):
            trainer.train_epoch()
            trainer.end_epoch()
    assert trainer.validate() < before - 0.4
    trainer.load_state_dict(trainer.state_dict())
    assert all(p.device.type == device.type for p in trainer.model.parameters())
    assert all(s.device.type == device.type for state in trainer.hidden for s in state)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_window_in_pieces_under_the_same_noise_is_the_window(kind: str) -> None:
    rates: dict[str, Any] = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5)
    model = RNNModel(kind, 9, 5, 7, 3, **rates, tie_weights=True).double()
    words, noise = torch.randint(0, 9, (8, BATCH)), Noise()
    whole, after = model(words, model.init_hidden(BATCH), noise=noise)
    hidden, parts = model.init_hidden(BATCH), []
    for start, piece in zip((0, 5, 6), words.split([5, 1, 2]), strict=True):
        output, hidden = model(piece, hidden, noise=noise.at(start))
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden, after, rtol=1e-12, atol=1e-12)


def test_a_callback_is_told_of_an_update_before_it(tmp_path: Path) -> None:
    """Its number, and the part of all epochs' text that training has seen by then."""
    trainer, starts = make_trainer(tmp_path, EVERYTHING), []

    class Watching(Callback):
        def update_begins(self, start: UpdateStart) -> None:
            starts.append((start.update, start.progress))

    trainer.callbacks = [Watching()]
    trainer.options = replace(trainer.options, epochs=2)
    with trainer.writer:
        for _ in range(2):
            trainer.train_epoch()
            trainer.end_epoch()
    rows = trainer.num_steps
    seen = [epoch / 2 + row / rows / 2 for epoch in (0, 1) for row in range(0, rows, BPTT)]
    assert [update for update, _ in starts] == list(range(1, len(seen) + 1))
    assert [progress for _, progress in starts] == pytest.approx(seen, abs=1e-12)


def test_a_learning_rate_is_put_back_where_an_update_is_given_up(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EVERYTHING)

    class Falling(Callback):
        def update_begins(self, start: UpdateStart) -> None:
            for group in start.optimizer.param_groups:
                group["lr"] *= 0.5

    trainer.callbacks = [Falling()]
    before = trainer.optimizer.param_groups[0]["lr"]
    trainer.interrupt.requested = True
    window = next(trainer.undo.watch(trainer.scheme.windows(trainer.num_steps)))
    with pytest.raises(StopRequested):
        trainer.update(window)
    assert trainer.optimizer.param_groups[0]["lr"] == before
    assert trainer.at.update == 0
    trainer.interrupt.requested = False
    trainer.update(window)
    assert trainer.optimizer.param_groups[0]["lr"] == before / 2


def test_a_decoder_gets_the_update_s_noise() -> None:
    """The same factors for each piece, under a name of the decoder's own."""
    model = RNNModel("LSTM", 9, 4, 5, 1).train()
    seen: list[Tensor] = []

    class Dropping(Linear):
        def forward(self, output: Tensor, noise: Noise | None = None) -> Tensor:
            assert noise is not None
            seen.append(noise.drop("experts", (1, 5), 0.5, like=output))
            return super().forward(output * seen[-1])

    model.decoder = Dropping(5, 9)
    objective, noise = Objective(model, []), Noise(torch.Generator().manual_seed(1))
    words = torch.randint(9, (4, 2))
    for piece in range(2):
        objective(words[:-1], words[1:], model.init_hidden(2), noise.at(3 * piece))
    assert seen[0] is seen[1]
    assert seen[0] is noise.drop("decoder.experts", (1, 5), 0.5, like=seen[0])
