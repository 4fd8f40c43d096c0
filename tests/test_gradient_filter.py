"""The gradient filter against its equations, in float64 and in loops."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, Result, read_events
from torch import Tensor

from gradient_filter import GradientFilter, inverse_mask

Run = Callable[..., Result]


def by_hand(
    g: Tensor, param_grads: list[Tensor], threshold: float, normalize: bool = False
) -> tuple[Tensor, list[Tensor], list[float]]:
    """Filtered gradients of x, (T, B, F), and of the parameters, and inv_mask."""
    norms = []
    for b in range(g.size(1)):
        values = [float(v) ** 2 for v in g[:, b].flatten()]
        norms.append(math.sqrt(sum(values) / len(values)))
    median = statistics.median_low(norms)
    cutoff = threshold * median
    inverse = [(cutoff + n) / (cutoff + 1e-20) for n in norms]
    if normalize:
        ordinary = inverse[norms.index(median)]
        inverse = [i / ordinary for i in inverse]
    x_grad = torch.stack([g[:, b] / inverse[b] for b in range(g.size(1))], dim=1)
    mean = sum(inverse) / len(inverse)
    return x_grad, [p / mean for p in param_grads], inverse


def filtered(
    g: Tensor,
    param_grads: list[Tensor],
    threshold: float = 10.0,
    normalize: bool = False,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], GradientFilter]:
    """What the filter makes of these gradients."""
    gate = GradientFilter(batch_dim=1, threshold=threshold, normalize=normalize).to(g.device)
    gate.gather = gather
    inputs = [torch.randn_like(t).requires_grad_() for t in (g, *param_grads)]
    outputs = gate(*inputs)
    for before, after in zip(inputs, outputs, strict=True):
        assert torch.equal(before, after)
    torch.autograd.backward(outputs, [g, *param_grads])
    return [t.grad for t in inputs if t.grad is not None], gate


@pytest.mark.parametrize(("batch", "threshold"), [(1, 2.0), (2, 10.0), (5, 0.5), (8, 2.0)])
@pytest.mark.parametrize("normalize", [False, True])
def test_equations(batch: int, threshold: float, normalize: bool, device: torch.device) -> None:
    g = torch.randn(6, batch, 3, dtype=torch.float64) * torch.logspace(-2, 2, batch)[:, None]
    params = [torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    x_grad, param_grads, inverse = by_hand(g, params, threshold, normalize)
    if not normalize:
        alone = inverse_mask(g, 1, threshold)
        assert alone.shape == (1, batch, 1)
        assert alone.flatten().tolist() == pytest.approx(inverse, rel=1e-12)
    found, gate = filtered(g.to(device), [p.to(device) for p in params], threshold, normalize)
    for one, other in zip(found, [x_grad, *param_grads], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=1e-15)
    masks = [1 / v for v in inverse]
    summary = gate.summary()
    ordinary = statistics.median_high(masks)  # of the sequence whose norm is the lower median
    assert summary["scale"] == pytest.approx(ordinary)
    assert summary["scale"] == pytest.approx(1 if normalize else threshold / (threshold + 1))
    assert summary["singled_out"] == sum(m < 0.9 * ordinary for m in masks) / batch
    assert summary["smallest"] == pytest.approx(min(masks))
    assert summary["params"] == pytest.approx(batch / sum(inverse))


@pytest.mark.parametrize("normalize", [False, True])
def test_who_is_singled_out_does_not_depend_on_the_scale(normalize: bool) -> None:
    """(2 + 1.5) / (2 + 1) times the median's divisor is above 1 / 0.9, 3.2 / 3 is not."""
    g = torch.ones(6, 5, 3)
    g[:, 2] *= 1.5
    g[:, 3] *= 1.2
    _, gate = filtered(g, [torch.ones(2)], 2.0, normalize)
    assert gate.summary()["singled_out"] == 1 / 5


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_columns_of_several_processes_are_filtered_as_one_batch(
    size: float, normalize: bool
) -> None:
    g = torch.randn(6, 8, 3, dtype=torch.float64) * size
    g *= torch.logspace(-2, 2, 8, dtype=torch.float64)[:, None]
    param = torch.randn(4, dtype=torch.float64)
    norms = g.square().mean((0, 2)).sqrt()
    (x_grad, param_grad), whole = filtered(g, [param], 2.0, normalize)
    for columns in (slice(0, 3), slice(3, 8)):

        def gather(own: Tensor, columns: slice = columns) -> Tensor:
            torch.testing.assert_close(own, norms[columns], rtol=1e-12, atol=0)
            return norms

        found, gate = filtered(g[:, columns], [param], 2.0, normalize, gather)
        torch.testing.assert_close(found, [x_grad[:, columns], param_grad], rtol=1e-12, atol=0)
        assert gate.summary() == pytest.approx(whole.summary(), rel=1e-12)


def test_other_batch_dimensions() -> None:
    g = torch.randn(4, 6, 3, dtype=torch.float64)
    expected, _, _ = by_hand(g.transpose(0, 1), [], 2.0)
    x = torch.zeros_like(g).requires_grad_()
    GradientFilter(batch_dim=0, threshold=2.0)(x)[0].backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.transpose(0, 1))
    x.grad = None
    GradientFilter(batch_dim=-3, threshold=2.0)(x)[0].backward(g)
    torch.testing.assert_close(x.grad, expected.transpose(0, 1))


def test_gradients_of_zero_stay_zero_and_infinite_ones_stay_visible() -> None:
    (x_grad, weight_grad), gate = filtered(torch.zeros(3, 4, 2), [torch.zeros(2)])
    assert not x_grad.any()
    assert not weight_grad.any()
    assert gate.summary() == dict(singled_out=0.0, scale=10 / 11, smallest=1.0, params=1.0)

    g = torch.randn(3, 4, 2)
    g[:, :3] = 0  # the median is 0: what is not 0 is suppressed
    for normalize in (False, True):
        (x_grad, _), _ = filtered(g, [torch.ones(2)], normalize=normalize)
        assert x_grad.isfinite().all()
        assert x_grad.abs().max() < 1e-15
        assert torch.equal(x_grad.sign(), g.sign())

    for value in (math.inf, math.nan):
        g = torch.randn(3, 4, 2)
        g[1, 2, 0] = value
        (x_grad, weight_grad), _ = filtered(g, [torch.ones(2)])
        assert not x_grad.isfinite().all()
        assert not weight_grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_a_factor_on_the_loss_changes_no_mask(scale: float) -> None:
    g = torch.randn(6, 5, 3) * torch.logspace(-2, 2, 5)[:, None]
    (x_grad, weight_grad), _ = filtered(g, [torch.ones(2)])
    (scaled, scaled_weight), _ = filtered(g * scale, [torch.full((2,), scale)])
    torch.testing.assert_close(scaled / scale, x_grad, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(scaled_weight / scale, weight_grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_underflows(dtype: torch.dtype) -> None:
    for size in (1e-6, 300.0):  # squares of these are 0 and infinity in float16
        g = (torch.randn(6, 5, 3) * size).to(dtype)
        (x_grad, _), _ = filtered(g, [torch.ones(2, dtype=dtype)])
        expected, _, _ = by_hand(g.double(), [], 10.0)
        assert x_grad.dtype == dtype
        masks = [inverse_mask(one, 1, 10.0) for one in (g, g.double())]
        torch.testing.assert_close(masks[0], masks[1].float(), rtol=1e-5, atol=0)
        tolerance = 0.02 * float(expected.abs().max())
        torch.testing.assert_close(x_grad.double(), expected, rtol=0.02, atol=tolerance)


def test_statistics_without_a_backward_pass() -> None:
    expected = dict(singled_out=0, scale=0.75, smallest=1, params=1)
    assert GradientFilter(threshold=3.0).summary() == expected


def test_threshold_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="threshold is 0"):
        GradientFilter(threshold=0)


def test_runs_log_it_and_resume_it(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", corpus_folder, "--resume", "auto", "--epochs", 2, "--grad-filter"]
    whole, parts, off = (tmp_path / f"{n}.pt" for n in ("whole", "parts", "off"))
    assert run(*flags, "--save", whole).code == 0
    assert run(*flags, "--save", parts, "--max-updates", 4).code == 0
    assert run(*flags, "--save", parts).code == 0
    assert run(*flags, 0, "--save", off).code == 0

    assert read_events(whole) == read_events(parts)
    assert read_events(off) != read_events(whole)
    train = [line for line in read_events(whole) if line["event"] == "train"]
    for layer in (0, 1):
        for line in train:
            assert 0 <= line[f"grad_filter_singled_out_l{layer}"] <= 1
            assert line[f"grad_filter_scale_l{layer}"] == 10 / 11
            assert 0 < line[f"grad_filter_smallest_l{layer}"] < 1
            assert 0 < line[f"grad_filter_params_l{layer}"] < 1


def test_what_overflowed_is_not_counted() -> None:
    gate = GradientFilter(threshold=1.0)
    for factor in (1.0, math.inf, 1.0):
        x = torch.randn(4, 3, 2, requires_grad=True)
        gate(x)[0].backward(torch.ones(4, 3, 2) * factor)
    assert gate.statistics[0] == 2
    assert all(math.isfinite(value) for value in gate.summary().values())
