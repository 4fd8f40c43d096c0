"""The fast LSTM layers against the equations per step: a CPU's, and cuDNN's with a stand-in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import lstm_cpu
from kernels.lstm_cpu import CpuLSTM
from kernels.lstm_cudnn import CudnnLSTM
from kernels.padding import pad_rows, padded_length
from kernels.precision import set_products
from layers.layer import Compute
from layers.lstm import WEIGHTS
from noise import Noise

pytestmark = pytest.mark.usefixtures("with_cudnn")

NAMES = ["output", "h_n", "c_n", "x", "h0", "c0", *WEIGHTS]
# T, B, E, H: nothing a multiple of anything, one step, one sequence, one unit; padded or not.
SHAPES = [(6, 3, 5, 7), (1, 3, 8, 11), (4, 1, 5, 16), (3, 2, 1, 1), (5, 4, 16, 8), (23, 3, 5, 7)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Makes the kernel of a layer of E and H.
Make = Callable[[int, int, torch.dtype], Compute]
MAKERS: dict[str, tuple[Make, torch.device]] = {
    "cpu": (lambda e, h, dtype: CpuLSTM(dtype), CPU),
    "cudnn on a CPU": (lambda e, h, dtype: CudnnLSTM(e, h, dtype, CPU), CPU),
    "cudnn": (lambda e, h, dtype: CudnnLSTM(e, h, dtype, CUDA), CUDA),
}
KERNELS = ["cpu", "cudnn on a CPU", pytest.param("cudnn", marks=pytest.mark.gpu)]


def arguments(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x (T, B, E), h0 and c0 (1, B, H), and the weights, as large as those of a layer."""
    steps, batch, width, units = shape
    shapes: list[tuple[int, ...]] = [(steps, batch, width), (1, batch, units), (1, batch, units)]
    shapes += [(4 * units, width), (4 * units, units), (4 * units,), (4 * units,)]
    values = [torch.randn(s, dtype=torch.float64) for s in shapes]
    values[3:] = [v / units**0.5 for v in values[3:]]
    return [v.to(device, dtype).requires_grad_() for v in values]


def by_steps(values: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The equations."""
    x, h, c, w_ih, w_hh, b_ih, b_hh = values
    outputs = []
    for x_t in x:
        i, f, g, o = (x_t @ w_ih.T + b_ih + h[0] @ w_hh.T + b_hh).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h[0])
    return torch.stack(outputs), (h, c)


def by_kernel(kernel: Compute, values: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, h, c, *weights = values
    return kernel(x, (h, c), dict(zip(WEIGHTS, weights, strict=True)), Noise())


def results(found: tuple[Tensor, tuple[Tensor, ...]], values: list[Tensor]) -> list[Tensor]:
    """Outputs, states and the gradients of a loss that uses each of them."""
    output, (h_n, c_n) = found
    like = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    loss = (output.double() * like.view(output.shape)).sum()
    loss = loss + h_n.double().square().sum() + c_n.double().sin().sum()
    grads = torch.autograd.grad(loss, values)
    assert [g.dtype for g in grads] == [v.dtype for v in values]
    return [output.detach(), h_n.detach(), c_n.detach(), *grads]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_outputs_states_and_every_gradient_equal_the_equations(
    shape: tuple[int, ...], name: str
) -> None:
    make, device = MAKERS[name]
    values, kernel = arguments(shape, device), make(shape[2], shape[3], torch.float64)
    expected = results(by_steps(values), values)
    for _ in range(2):  # the second call finds cuDNN's buffer filled
        found = results(by_kernel(kernel, values), values)
        for part, a, b in zip(NAMES, found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=part)


def test_products_of_windows_of_many_lengths_have_few_shapes() -> None:
    padded = [padded_length(rows) for rows in range(1, 5000)]
    assert padded == sorted(padded)
    assert all(rows <= n <= rows + rows / 16 for rows, n in enumerate(padded, start=1))
    assert len({padded_length(20 * steps) for steps in range(55, 86)}) <= 12
    x = torch.randn(39, 2)
    assert torch.equal(pad_rows(x), torch.cat([x, torch.zeros(1, 2)]))


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        ("cpu", torch.bfloat16, 2),
        *(("cudnn on a CPU", d, 16) for d in (torch.bfloat16, torch.float16, torch.float32)),
        *(
            # cuDNN's exponentials are approximate in float32; TF32 would be 8,000 eps off.
            pytest.param("cudnn", dtype, bound, marks=pytest.mark.gpu)
            for dtype, bound in ((torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 128))
        ),
    ],
)
@pytest.mark.parametrize("shape", [(35, 20, 31, 57), (1, 1, 3, 5), (12, 3, 64, 128)])
def test_weights_stay_float32_and_errors_are_those_of_the_dtype(
    name: str, dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    make, device = MAKERS[name]
    set_products({2: "bf16", 4: "fp32"}[dtype.itemsize], device)
    exact = arguments(shape, device)
    values = [v.detach().float().requires_grad_() for v in exact]
    output, states = by_kernel(make(shape[2], shape[3], dtype), values)
    assert [output.dtype, *(s.dtype for s in states)] == [dtype, torch.float32, torch.float32]
    found = results((output, states), values)
    for part, a, b in zip(NAMES, found, results(by_steps(exact), exact), strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error < bound * torch.finfo(dtype).eps, part


@pytest.mark.parametrize("name", KERNELS)
def test_only_what_is_wanted_gets_a_gradient_and_states_outlive_the_window(name: str) -> None:
    """The last states are no views of what holds a window's activations, or the padding."""
    make, device = MAKERS[name]
    values, kernel = arguments((4, 3, 5, 7), device), make(5, 7, torch.float64)
    some = [v if k in (0, 3, 5) else v.detach() for k, v in enumerate(values)]
    wanted = [some[k] for k in (0, 3, 5)]
    output, states = by_kernel(kernel, some)
    ours = torch.autograd.grad(output.square().sum(), wanted)
    theirs = torch.autograd.grad(by_steps(values)[0].square().sum(), wanted)
    torch.testing.assert_close(ours, theirs)
    for state in states:
        assert state.is_contiguous()
        assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_without_memory_of_their_own_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Expanded and transposed ones, which stay as they are; with and without packed weights."""
    if not packed:
        monkeypatch.setattr(lstm_cpu, "can_pack", lambda dtype: False)
    values = arguments((4, 3, 5, 6), CPU, torch.float32)
    exact = [v.detach().double().requires_grad_() for v in values]
    strange = torch.randn(6, 3, 4).bfloat16().permute(2, 1, 0)
    for grad in (strange, torch.ones(()).bfloat16().expand(4, 3, 6)):
        before = grad.clone()
        output, _ = by_kernel(CpuLSTM(torch.bfloat16), values)
        (found,) = torch.autograd.grad(output, values[0], grad)
        assert torch.equal(grad, before)
        (expected,) = torch.autograd.grad(by_steps(exact)[0], exact[0], grad.double())
        assert float((found.double() - expected).norm() / expected.norm()) < 2.0**-6


def test_biases_gradients_are_summed_in_float32() -> None:
    """A sum in bfloat16 over 4,000 equal rows would stop growing long before its end."""
    values = [torch.zeros_like(v) for v in arguments((2000, 2, 1, 1), CPU, torch.float32)]
    values[5].requires_grad_()
    output, _ = by_kernel(CpuLSTM(torch.bfloat16), values)
    (found,) = torch.autograd.grad(output.sum(), values[5])
    exact = [v.detach().double() for v in values]
    exact[5].requires_grad_()
    (expected,) = torch.autograd.grad(by_steps(exact)[0].sum(), exact[5])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_cells_go_from_window_to_window_in_float32() -> None:
    """An open forget gate and a closed input gate leave what bfloat16 would round."""
    x, h, _, *weights = (torch.zeros_like(v) for v in arguments((3, 4, 2, 5), CPU, torch.float32))
    weights[2] += torch.tensor([-1e3, 1e3, 0.0, 0.0]).repeat_interleave(5)
    c = torch.linspace(0.9, 1.1, 20).view(1, 4, 5)
    assert not torch.equal(c.bfloat16().float(), c)
    _, (_, after) = by_kernel(CpuLSTM(torch.bfloat16), [x, h, c, *weights])
    assert torch.equal(after, c)
