"""Each scheme against text unrolled row by row, in float64: whole epochs, weights and losses."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from row_by_row import (
    BATCH,
    BETA,
    LR,
    RATES,
    ROWS,
    Reference,
    Update,
    assert_same_epoch,
    build_trainer,
    full_updates,
    randomized,
    randomized_updates,
    truncated,
    whole,
)
from small_trainer import SmallTrainer
from torch import Tensor

from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, Window
from decoders.linear import Linear
from kernels.choose import install
from kernels.linear_cross_entropy import FastLinear
from kernels.lstm_cpu import CpuLSTM
from noise import Noise

MakeTrainer = Callable[..., SmallTrainer]


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    return partial(build_trainer, tmp_path)


@pytest.mark.parametrize(
    ("k1", "k2", "grad_filter"),
    [
        (1, 1, 0), (40, 40, 0), (5, 5, 1.5), (1, 4, 1.5), (2, 5, 0), (4, 8, 1.5), (4, 40, 0),
        (7, 3, 1.5), (3, 1, 0),
    ],
)  # fmt: skip
def test_truncated(make_trainer: MakeTrainer, k1: int, k2: int, grad_filter: float) -> None:
    trainer = make_trainer(FixedWindows(k2, k1), k2, grad_filter=grad_filter)
    assert_same_epoch(trainer, truncated(k1, k2))


ALL_OFF: dict[str, Any] = dict.fromkeys((*RATES, "alpha", "beta", "wdecay", "clip"), 0)


@pytest.mark.parametrize("kernels", ["plain", "fast", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "changes",
    [
        dict(nlayers=3),
        dict(nlayers=1, tie_weights=False),
        dict(dict.fromkeys(RATES, 0.0), nlayers=1),
        dict(alpha=0, beta=0, wdecay=0, clip=0),
        dict(ALL_OFF, tie_weights=False),
    ],
    ids=str,
)
def test_sizes_kernels_and_everything_off(
    make_trainer: MakeTrainer, changes: dict[str, Any], kernels: str
) -> None:
    """fast: kernels that are chosen for bfloat16 alone, in float64."""
    device = torch.device("cuda" if kernels == "cuda" else "cpu")
    trainer = make_trainer(FixedWindows(6), 6, device=device, **changes)
    decoder = trainer.model.decoder
    assert isinstance(decoder, Linear)
    if kernels == "fast":
        for layer in trainer.model.layers:
            layer.kernel = CpuLSTM(torch.float64)
        decoder.kernel = FastLinear(decoder, None)
    elif kernels == "cuda":
        assert install(trainer.model, None, device)["layers"].kernel == "cudnn"
    assert_same_epoch(trainer, truncated(6, 6))


@pytest.mark.parametrize(
    ("kept", "grad_filter"),
    [
        ((True, True, True, True, True, True, True), 1.5),  # 8 segments: 4 are run a second time
        ((False, True, True, True, True, False, True), 0),
        ((False,) * 7, 0),
        ((True, False, True, False, False, True, True), 1.5),
    ],
    ids=str,
)
def test_randomized(make_trainer: MakeTrainer, kept: tuple[bool, ...], grad_filter: float) -> None:
    trainer = make_trainer(randomized(3, 0.7, kept), 3, grad_filter=grad_filter)
    assert_same_epoch(trainer, randomized_updates(3, 0.7, kept))


def test_a_normalized_filter(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(FixedWindows(5, 2), 5, grad_filter=1.5, grad_filter_normalize=True)
    assert_same_epoch(trainer, truncated(2, 5))


@pytest.mark.parametrize(("size", "grad_filter"), [(1, 0), (4, 0), (4, 1.5), (ROWS, 1.5), (50, 0)])
def test_full(make_trainer: MakeTrainer, size: int, grad_filter: float) -> None:
    trainer = make_trainer(FullWindows(size), size, grad_filter=grad_filter)
    assert_same_epoch(trainer, full_updates(size))


@pytest.mark.parametrize(
    "window",
    [
        Window(0, 9, 5, (2, 7), kept=2, advance=2),
        Window(0, 9, 0, (4, 4, 1), crossing=0.0),
        Window(0, 20, 0, (3, 3, 3, 3, 3, 3, 2), crossing=1.5, kept=4),
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
        noise = Noise(torch.Generator().manual_seed(6))
        rows = trainer.updater.rows[: window.length + 1]
        loss, _ = trainer.updater.gradient(window, rows, trainer.hidden, noise, scale)
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        results.append([loss, *(g / scale for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
def test_on_a_gpu_as_on_a_cpu(make_trainer: MakeTrainer, scheme: Callable[[], Scheme]) -> None:
    results: list[dict[str, Tensor]] = []
    factors: dict[str, Tensor] = {}
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        trainer = make_trainer(scheme(), 5, device=device, grad_filter=2.0)
        noise = trainer.fix_noise()
        noise._factors.update({name: f.to(device) for name, f in factors.items()})
        trainer.train_epoch()
        assert math.isfinite(trainer.validate())
        trainer.load_state_dict(trainer.state_dict())
        assert all(part.device == device for state in trainer.hidden for part in state)
        factors = noise._factors
        results.append({n: p.detach().cpu() for n, p in trainer.model.named_parameters()})
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def epoch_displacement(trainer: SmallTrainer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
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
    make_trainer: MakeTrainer, beta: float
) -> None:
    """The mean over all patterns of cuts, weighted by their probabilities; no sampling.

    For fixed weights and masks, without clipping, and with the learning rate as it is scaled.
    """
    size, probability = 5, 0.6
    num_boundaries = (ROWS - 1) // size
    trainer = make_trainer(FullWindows(size), size, beta=beta, wdecay=0, clip=0)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    noise = trainer.fix_noise()

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
    _, objective, w = Reference(trainer).objective(update, noise)
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
    for rows in (100, 200):
        [full] = FullWindows(20).windows(rows)
        assert peak(full, rows) <= 1.3 * one
        [kept] = randomized(20, 0.5, (True,) * (rows // 20 - 1)).windows(rows)
        assert 3 * one < peak(kept, rows) <= 4.6 * one
        [cut] = FixedWindows(20, rows).windows(rows)
        assert peak(cut, rows) <= 1.3 * one
    assert peak(Window(0, 100), 100) > 4 * one
