"""AR and TAR against sums written out in loops."""

import pytest
import torch

from activation_regularize import activation_regularization, temporal_activation_regularization


def test_activation_regularization() -> None:
    h = torch.randn(4, 3, 5, dtype=torch.float64)
    total = sum(float(v) ** 2 for v in h.flatten()) / h.numel()
    assert float(activation_regularization(h, 2.0)) == pytest.approx(2 * total, rel=1e-12)


def test_temporal_activation_regularization() -> None:
    h = torch.randn(4, 3, 5, dtype=torch.float64)
    total = 0.0
    for t in range(3):
        for b in range(3):
            for e in range(5):
                total += (float(h[t + 1, b, e]) - float(h[t, b, e])) ** 2
    expected = 1.5 * total / (3 * 3 * 5)
    assert float(temporal_activation_regularization(h, 1.5)) == pytest.approx(expected, rel=1e-12)


def test_one_step_has_no_slowness_and_no_nan() -> None:
    h = torch.randn(1, 3, 5, requires_grad=True)
    assert float(temporal_activation_regularization(h, 1.0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    h = torch.full((2, 3, 5), 300.0, dtype=dtype)  # squares overflow float16
    h[1] = -300
    for loss in (activation_regularization(h, 1.0), temporal_activation_regularization(h, 1.0)):
        assert loss.dtype == torch.float32
    exact = float(h[0, 0, 0]) ** 2
    assert float(activation_regularization(h, 1.0)) == pytest.approx(exact)
    assert float(temporal_activation_regularization(h, 1.0)) == pytest.approx(4 * exact)
