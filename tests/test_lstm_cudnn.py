"""The layer over its own buffer against torch.nn.LSTM with a masked weight, cuDNN stood in for."""

import pytest
import torch
from torch import Tensor, nn

from kernels.lstm_cudnn import CudnnLSTM
from kernels.precision import set_products
from layers.lstm import WEIGHTS
from noise import Noise

# E, H: padded both, one of them, neither.
SIZES = [(5, 7), (8, 11), (6, 16), (16, 8), (1, 1)]
NAMES = ["output", "h_n", "c_n", "x", "h0", "c0", *WEIGHTS]
Found = tuple[Tensor, tuple[Tensor, ...]]

pytestmark = pytest.mark.usefixtures("with_cudnn")


def arguments(width: int, units: int, device: torch.device) -> list[Tensor]:
    """x, h0, c0 and an LSTM's weights, float64."""
    lstm = nn.LSTM(width, units, dtype=torch.float64, device=device)
    shapes = [(6, 3, width), (1, 3, units), (1, 3, units)]
    values = [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]
    return [v.detach().requires_grad_() for v in (*values, *lstm.parameters())]


def results(found: Found, values: list[Tensor]) -> list[Tensor]:
    """Outputs, states and the gradients of a loss that uses each of them."""
    output, (h_n, c_n) = found
    like = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    loss = (output.double() * like.view(output.shape)).sum()
    loss = loss + h_n.double().square().sum() + c_n.double().sin().sum()
    grads = torch.autograd.grad(loss, values)
    assert [g.dtype for g in grads] == [v.dtype for v in values]
    return [output.detach(), h_n.detach(), c_n.detach(), *grads]


def by_cudnn(layer: CudnnLSTM, values: list[Tensor], mask: Tensor | None = None) -> Found:
    x, h, c, *weights = values
    named = dict(zip(WEIGHTS, weights, strict=True))
    if mask is not None:
        named["weight_hh_l0"] = named["weight_hh_l0"] * mask
    return layer(x, (h, c), named, Noise())


def by_torch(values: list[Tensor], mask: Tensor | None = None) -> Found:
    x, h, c, w_ih, w_hh, b_ih, b_hh = values
    weights = [w_ih, w_hh if mask is None else w_hh * mask, b_ih, b_hh]
    lstm: nn.LSTM = nn.LSTM(x.size(-1), h.size(-1), dtype=x.dtype, device=x.device)
    named = dict(zip((n for n, _ in lstm.named_parameters()), weights, strict=True))
    found: Found = torch.func.functional_call(lstm, named, (x, (h, c)))
    return found


@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_torchs_lstm_with_a_masked_weight(
    sizes: tuple[int, int], device: torch.device
) -> None:
    values = arguments(*sizes, device)
    mask = torch.empty_like(values[4]).bernoulli_(0.5) * 2
    layer = CudnnLSTM(*sizes, torch.float64, device)
    theirs = results(by_torch(values, mask), values)
    for _ in range(2):  # the second call finds the buffer filled
        ours = results(by_cudnn(layer, values, mask), values)
        for name, a, b in zip(NAMES, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_stay_float32_and_errors_are_those_of_the_dtype(
    dtype: torch.dtype, device: torch.device
) -> None:
    set_products({2: "bf16", 4: "fp32"}[dtype.itemsize], device)
    exact = arguments(24, 30, device)
    mask = torch.empty_like(exact[4]).bernoulli_(0.5) * 2
    values = [v.detach().float().requires_grad_() for v in exact]
    output, states = by_cudnn(CudnnLSTM(24, 30, dtype, device), values, mask.float())
    assert output.dtype == dtype
    ours = results((output, states), values)
    theirs = results(by_torch(exact, mask), exact)
    bound = 16 * torch.finfo(dtype).eps
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < bound, name


def test_only_what_is_wanted_gets_a_gradient(device: torch.device) -> None:
    values = arguments(5, 7, device)
    some = [v if k in (0, 3, 5) else v.detach() for k, v in enumerate(values)]
    layer = CudnnLSTM(5, 7, torch.float64, device)
    wanted = [some[k] for k in (0, 3, 5)]
    ours = torch.autograd.grad(by_cudnn(layer, some)[0].square().sum(), wanted)
    theirs = torch.autograd.grad(by_torch(values)[0].square().sum(), wanted)
    torch.testing.assert_close(ours, theirs)


def test_states_outlive_the_window(device: torch.device) -> None:
    """They are no views of what cuDNN returned, which holds the padding, too."""
    _, states = by_cudnn(CudnnLSTM(5, 7, torch.float64, device), arguments(5, 7, device))
    for state in states:
        assert state.is_contiguous()
        assert state.untyped_storage().nbytes() == state.nbytes
