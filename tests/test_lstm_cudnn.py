"""The layer over its own buffer against torch.nn.LSTM with a masked weight, cuDNN stood in for."""

import pytest
import torch
from lstm_cudnn import CudnnLSTM
from torch import Tensor, nn

from engine.precision import allow_products

# E, H: padded both, one of them, neither.
SIZES = [(5, 7), (8, 11), (6, 16), (16, 8), (1, 1)]
NAMES = ["output", "h_n", "c_n", "x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"]


pytestmark = pytest.mark.usefixtures("with_cudnn")


def arguments(width: int, units: int, device: torch.device) -> list[Tensor]:
    """x, h0, c0 and an LSTM's weights, float64."""
    lstm = nn.LSTM(width, units, dtype=torch.float64, device=device)
    shapes = [(6, 3, width), (1, 3, units), (1, 3, units)]
    values = [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]
    return [v.detach().requires_grad_() for v in (*values, *lstm.parameters())]


def results(
    found: tuple[Tensor, tuple[Tensor, Tensor]], values: list[Tensor], units: int
) -> list[Tensor]:
    """Outputs, states and the gradients of a loss that uses each of them."""
    output, (h_n, c_n) = found
    assert not output[..., units:].any()
    output = output[..., :units]
    like = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    loss = (output.double() * like.view(output.shape)).sum()
    loss = loss + h_n.double().square().sum() + c_n.double().sin().sum()
    grads = torch.autograd.grad(loss, values)
    assert [g.dtype for g in grads] == [v.dtype for v in values]
    return [output.detach(), h_n.detach(), c_n.detach(), *grads]


def by_torch(values: list[Tensor], mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x, h, c, w_ih, w_hh, b_ih, b_hh = values
    weights = [w_ih, w_hh if mask is None else w_hh * mask, b_ih, b_hh]
    lstm: nn.LSTM = nn.LSTM(x.size(-1), h.size(-1), dtype=x.dtype, device=x.device)
    named = dict(zip((n for n, _ in lstm.named_parameters()), weights, strict=True))
    found: tuple[Tensor, tuple[Tensor, Tensor]]
    found = torch.func.functional_call(lstm, named, (x, (h, c)))
    return found


@pytest.mark.parametrize("masked", ["weights", "rows", "not"])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_torchs_lstm_with_a_masked_weight(
    sizes: tuple[int, int], masked: str, device: torch.device
) -> None:
    values = arguments(*sizes, device)
    shapes = dict(weights=values[4].shape, rows=(4 * sizes[1], 1))
    mask = None
    if masked in shapes:
        mask = torch.empty(shapes[masked], dtype=torch.float64, device=device).bernoulli_(0.5) * 2
    layer = CudnnLSTM(*sizes, torch.float64, device)
    theirs = results(by_torch(values, mask), values, sizes[1])
    for _ in range(2):  # the second call finds the buffer filled
        ours = results(layer(values[0], (values[1], values[2]), values[3:], mask), values, sizes[1])
        for name, a, b in zip(NAMES, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_stay_float32_and_errors_are_those_of_the_dtype(
    dtype: torch.dtype, device: torch.device
) -> None:
    allow_products({2: "bf16", 4: "fp32"}[dtype.itemsize], device)
    exact = arguments(24, 30, device)
    mask = torch.empty_like(exact[4]).bernoulli_(0.5) * 2
    values = [v.detach().float().requires_grad_() for v in exact]
    layer = CudnnLSTM(24, 30, dtype, device)
    output, states = layer(values[0], (values[1], values[2]), values[3:], mask.float())
    assert output.dtype == dtype
    ours = results((output, states), values, 30)
    theirs = results(by_torch(exact, mask), exact, 30)
    bound = 16 * torch.finfo(dtype).eps
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < bound, name


def test_padded_input_and_a_gradient_for_some_only(device: torch.device) -> None:
    values = arguments(5, 7, device)
    layer = CudnnLSTM(5, 7, torch.float64, device)
    padded = torch.nn.functional.pad(values[0].detach(), (0, 3)).requires_grad_()
    hidden = (values[1].detach(), values[2].detach())
    output, _ = layer(
        padded, hidden, [values[3], values[4].detach(), values[5], values[6].detach()]
    )
    output.square().sum().backward()
    same, _ = by_torch(values, None)
    same.square().sum().backward()
    assert values[0].grad is not None
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad[..., :5], values[0].grad)
    assert not padded.grad[..., 5:].any()
    assert values[4].grad is not None  # from by_torch alone
    with pytest.raises(ValueError, match="its last dimension must be 5"):
        layer(padded[..., :6], hidden, values[3:])


def test_states_outlive_the_window(device: torch.device) -> None:
    """They are no views of what cuDNN returned, which holds the padding, too."""
    values = arguments(5, 7, device)
    _, (h_n, c_n) = CudnnLSTM(5, 7, torch.float64, device)(
        values[0], (values[1], values[2]), values[3:]
    )
    assert h_n.is_contiguous()
    assert h_n.untyped_storage().nbytes() == h_n.nbytes
    assert c_n.is_contiguous()
    assert c_n.untyped_storage().nbytes() == c_n.nbytes
