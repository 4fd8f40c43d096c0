"""One whole update against everything written out per time step, in float64, same masks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import write_corpus
from engine.trainer import Trainer
from engine.training_state import TrainingOptions
from torch import Tensor

from bptt import FixedWindows, VariableWindows, Window
from data.corpus import load_corpus
from engine.interrupt import Interrupt
from engine.run_folder import RunFolder
from engine.tracking import Tracker, WandbOptions
from model import RNNModel
from nt_asgd import NTASGD


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


def locked(x: Tensor, p: float) -> Tensor:
    """x (T, B, F) with one mask, drawn as LockedDropout draws it, applied step by step."""
    if not p:
        return x
    mask = x.new_empty(1, x.size(1), x.size(2)).bernoulli_(1 - p) / (1 - p)
    return torch.stack([x_t * mask[0] for x_t in x])


def weight_mask(w_hh: Tensor, p: float) -> Tensor:
    """A mask drawn as WeightDrop draws it: 16 random bits a weight, four of them at a time."""
    draws = torch.empty(-(-w_hh.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = np.frombuffer(draws.numpy().tobytes(), dtype=np.int16)[: w_hh.numel()]
    kept = round((1 - p) * 65536)
    factors = [65536 / kept if int(b) + 32768 < kept else 0.0 for b in bits]
    return torch.tensor(factors, dtype=w_hh.dtype).view_as(w_hh)


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
    weights: dict[str, Tensor], rows: Tensor, hidden: list, setting: Setting, scale: float
) -> tuple[float, float, list, dict[str, Tensor]]:
    """The update's loss, gradient norm, new states and new weights, from the equations."""
    w = {name: value.clone().requires_grad_() for name, value in weights.items()}
    embedding = w["encoder.weight"]
    inputs, targets = rows[:-1], rows[1:]
    x = torch.stack([torch.stack([embedding[i] for i in row]) for row in inputs])
    if setting.dropoute:
        keep = embedding.new_empty(len(embedding), 1).bernoulli_(1 - setting.dropoute)
        keep = keep / (1 - setting.dropoute)
        x = torch.stack(
            [
                torch.stack([x[t, b] * keep[inputs[t, b]] for b in range(BATCH)])
                for t in range(len(inputs))
            ]
        )
    x = locked(x, setting.dropouti)
    states = []
    for layer in range(setting.nlayers):
        prefix = f"rnns.{layer}." + ("module." if setting.wdrop else "")
        own = {name.removeprefix(prefix): v for name, v in w.items() if name.startswith(prefix)}
        if setting.wdrop:
            w_hh = own["weight_hh_l0_raw"]
            w_hh = w_hh * weight_mask(w_hh, setting.wdrop)
        else:
            w_hh = own["weight_hh_l0"]
        raw, h, c = lstm_by_steps(x, hidden[layer][0][0], hidden[layer][1][0], own, w_hh)
        states.append((h, c))
        x = locked(raw, setting.dropout if layer == setting.nlayers - 1 else setting.dropouth)
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
    new = {
        name: (v - LR * scale * (factor * gradients[name] + setting.wdecay * v)).detach()
        for name, v in w.items()
    }
    return float(loss.detach()), norm, states, new


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Iterator[MakeTrainer]:
    """make_trainer(setting, device): a trainer in float64 on a small corpus."""
    with ExitStack() as stack:
        yield lambda *args: build_trainer(tmp_path, stack, *args)


def build_trainer(
    tmp_path: Path, stack: ExitStack, setting: Setting, device: torch.device
) -> Trainer:
    corpus = load_corpus(write_corpus(tmp_path / "corpus", lines=300))
    model = RNNModel(
        "LSTM", len(corpus.vocabulary), 5, 7, setting.nlayers, setting.dropout, setting.dropouth,
        setting.dropouti, setting.dropoute, setting.wdrop, setting.tied,
    ).double().to(device)  # fmt: skip
    folder = stack.enter_context(RunFolder(tmp_path / "run.pt"))
    tracker = stack.enter_context(closing(Tracker(folder.folder, {}, WandbOptions())))
    trainer = Trainer(
        model,
        NTASGD(model.parameters(), LR, setting.wdecay),
        FixedWindows(BPTT),
        corpus,
        TrainingOptions(
            epochs=1, batch_size=BATCH, bptt=BPTT, clip=setting.clip, alpha=setting.alpha,
            beta=setting.beta,
        ),
        folder,
        Interrupt(),
        identity={},
    )  # fmt: skip
    trainer.tracker = tracker
    return trainer


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


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("kernel", ["plain", "cpu", "cudnn"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_updates_equal_the_equations(
    make_trainer: MakeTrainer, setting: Setting, kernel: str
) -> None:
    trainer = make_trainer(setting, torch.device("cpu"))
    trainer.model.compute_in(None if kernel == "plain" else torch.float64, kernel)
    trainer.model.train()
    hidden = [tuple(s.clone() for s in pair) for pair in trainer.hidden]
    for start in (0, STEPS):
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        rows = trainer.rows[start : start + STEPS + 1].long()
        random_state = torch.get_rng_state()
        trainer.update(Window(start, STEPS))
        torch.set_rng_state(random_state)
        loss, norm, states, new = update_by_hand(weights, rows, hidden, setting, STEPS / BPTT)
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


def test_gradients_of_a_window_do_not_reach_the_one_before(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(EVERYTHING, torch.device("cpu"))
    trainer.model.train()
    trainer.update(Window(0, 3))
    assert all(s.grad_fn is not None for pair in trainer.hidden for s in pair)
    before = trainer.hidden
    trainer.update(Window(3, 3))  # would fail with "backward through the graph a second time"
    assert before is not trainer.hidden


def test_runs_on_the_device_and_learns_there(
    make_trainer: MakeTrainer, device: torch.device
) -> None:
    setting = Setting(2, True, 0.1, 0.1, 0.1, 0.05, 0.1, 0.25, 0.1, 0.1, 1e-6)
    trainer = make_trainer(setting, device)
    trainer.scheme = VariableWindows(BPTT, 1)
    trainer.optimizer.param_groups[0]["lr"] = 10.0
    before = trainer.validate()
    for _ in range(14):
        trainer.train_epoch()
        trainer.end_epoch()
    assert trainer.validate() < before - 0.5
    trainer.load_state_dict(trainer.state_dict())
    assert all(p.device.type == device.type for p in trainer.model.parameters())
    assert all(s.device.type == device.type for pair in trainer.hidden for s in pair)


@pytest.mark.parametrize("setting", [EVERYTHING, EVERYTHING._replace(wdrop=0, dropoute=0)])
def test_a_window_in_pieces_under_the_same_masks_is_the_window(setting: Setting) -> None:
    rates = dict(setting._asdict(), nlayers=3)
    names = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
    model = RNNModel("LSTM", 9, 5, 7, 3, **{n: rates[n] for n in names}, tie_weights=True).double()
    words = torch.randint(0, 9, (8, BATCH))
    torch.manual_seed(3)
    whole, after = model(words, model.init_hidden(BATCH))
    torch.manual_seed(3)
    masks, hidden, parts = model.draw_masks(BATCH), model.init_hidden(BATCH), []
    for piece in words.split([5, 1, 2]):
        output, hidden = model(piece, hidden, masks=masks)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden, after, rtol=1e-12, atol=1e-12)
