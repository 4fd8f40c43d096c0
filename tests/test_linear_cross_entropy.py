"""Decoder and loss in one against the two written out, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import kernels.linear_cross_entropy as module
from kernels.linear_cross_entropy import linear_cross_entropy

# Half the distance of two neighbours.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def arguments(rows: int, width: int, words: int, size: float = 1.0) -> tuple[list[Tensor], Tensor]:
    values = [torch.randn(rows, width), size * torch.randn(words, width), torch.randn(words)]
    return [v.double().requires_grad_() for v in values], torch.randint(words, (rows,))


def fused(values: Sequence[Tensor], targets: Tensor) -> Tensor:
    hidden, weight, bias = values
    return linear_cross_entropy(hidden, weight, bias, targets)


def by_rows(values: Sequence[Tensor], targets: Tensor) -> Tensor:
    hidden, weight, bias = values
    losses = []
    for h, target in zip(hidden, targets, strict=True):
        scores = weight @ h + bias
        losses.append(torch.log((scores - scores[target]).exp().sum()))
    return torch.stack(losses).mean()


def results(loss: Tensor, values: list[Tensor], factor: float) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(factor * loss, values)]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def caches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to a softmax."""
    monkeypatch.setattr(module, "_has_caches", lambda x: request.param == "as on a CPU")


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize(("block", "softmax_rows"), [(2**26, 64), (3 * 13 * 8, 2), (1, 1)])
def test_loss_and_gradients_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, block: int, softmax_rows: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    monkeypatch.setattr(module, "SOFTMAX_ROWS", softmax_rows)
    for rows in (11, 39):  # 39 are padded
        values, targets = arguments(rows, 5, 13)
        ours = results(fused(values, targets), values, 3.5)
        theirs = results(by_rows(values, targets), values, 3.5)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_sixteen_bits_are_within_their_error_and_the_loss_is_float32s(dtype: torch.dtype) -> None:
    values, targets = arguments(300, 64, 1000, 0.1)
    exact = results(by_rows(values, targets), values, 1.0)
    leaves = [v.detach().float().requires_grad_() for v in values]
    leaves[0] = leaves[0].detach().to(dtype).requires_grad_()
    # As large as a loss scale may make it, else hidden's gradient in float16 has too few bits.
    factor = 2.0**10 if dtype == torch.float16 else 1.0
    exact[1:] = [factor * e for e in exact[1:]]
    found = results(fused(leaves, targets), leaves, factor)
    assert [f.dtype for f in found] == [torch.float32, dtype, *[torch.float32] * 2]
    # The roundings of 300 losses go either way.
    assert float((found[0] - exact[0]).abs() / exact[0]) < ROUNDING[dtype] / 10
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_that_overflow_or_underflow_a_softmax(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0], [1.0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([1, 0])
    loss = linear_cross_entropy(hidden, weight, torch.zeros(3), targets)
    assert loss.item() == 1000.0  # (2000 + 0) / 2
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [0.5, -0.5, 0.0]
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [1000.0, 0.0]


def test_evaluation_makes_no_gradient_and_what_is_not_finite_stays_so() -> None:
    values, targets = arguments(4, 3, 7)
    trained = fused(values, targets)
    with torch.no_grad():
        loss = fused(values, targets)
        assert not loss.requires_grad
        assert torch.equal(loss, trained)
        values[0][1, 0] = float("nan")
        assert fused(values, targets).isnan()
    frozen = [v.detach() for v in values[:2]]
    loss = fused([*frozen, values[2]], targets)
    loss.backward()
    assert values[2].grad is not None
    assert values[0].grad is None
