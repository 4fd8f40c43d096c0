"""The layer against its equations per step, torch.nn.LSTM and its own float64, in each dtype."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import lstm_cpu
from kernels.lstm_cpu import lstm_layer

NAMES = ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"]
# T, B, E, H: nothing a multiple of anything, one step, one sequence, one unit.
SHAPES = [(6, 3, 5, 7), (1, 3, 5, 7), (4, 1, 5, 3), (3, 2, 1, 1), (5, 4, 3, 13)]
BF16 = 2.0**-9  # half the distance of two neighbours


def arguments(steps: int, batch: int, width: int, units: int) -> list[Tensor]:
    shapes = [(steps, batch, width), (batch, units), (batch, units)]
    shapes += [(4 * units, width), (4 * units, units), (4 * units,), (4 * units,)]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    scaled = [v / units**0.5 if v.size(0) == 4 * units else v for v in values]
    return [v.requires_grad_() for v in scaled]


def by_steps(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = []
    for x_t in x:
        i, f, g, o = (x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh).split(h.size(1), dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def by_torch(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.nn.LSTM's own kernel, everything in the dtype of x."""
    weights = [w.to(x.dtype) for w in (w_ih, w_hh, b_ih, b_hh)]
    states = (h[None].to(x.dtype), c[None].to(x.dtype))
    output, h_n, c_n = torch._VF.lstm(x, states, weights, True, 1, 0.0, True, False, False)  # type: ignore[attr-defined]
    return output, h_n[0], c_n[0]


Layer = Callable[..., tuple[Tensor, Tensor, Tensor]]


def results(layer: Layer, values: list[Tensor], dtype: torch.dtype, like: Tensor) -> list[Tensor]:
    """Outputs, states and all gradients of a loss that uses each of them; weights float32."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    cast = [v.detach().to(master) for v in values]
    cast[0] = cast[0].to(dtype)
    leaves = [v.requires_grad_() for v in cast]
    output, h_n, c_n = layer(*leaves)
    objective = (output.double() * like).sum() + (h_n.double() * like[0]).sum()
    (objective + (c_n.double() * like[0].flip(0)).sum()).backward()
    grads = [v.grad for v in leaves if v.grad is not None]
    assert len(grads) == len(leaves)
    return [output.detach(), h_n.detach(), c_n.detach(), *grads]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_states_and_every_gradient_equal_the_equations(shape: tuple[int, ...]) -> None:
    values = arguments(*shape)
    like = torch.randn(shape[0], shape[1], shape[3], dtype=torch.float64)
    for ours, theirs in zip(
        results(lstm_layer, values, torch.float64, like),
        results(by_steps, values, torch.float64, like),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(35, 20, 31, 57), (1, 1, 3, 5), (12, 3, 64, 128)])
def test_bfloat16_is_within_its_error_of_float64_and_no_worse_than_torchs(
    shape: tuple[int, ...],
) -> None:
    values = arguments(*shape)
    like = torch.randn(shape[0], shape[1], shape[3], dtype=torch.float64)
    exact = results(by_steps, values, torch.float64, like)

    def errors(layer: Layer) -> list[float]:
        found = results(layer, values, torch.bfloat16, like)
        pairs = zip(found, exact, strict=True)
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    ours, theirs = errors(lstm_layer), errors(by_torch)
    for name, mine, torchs in zip(["output", "h_n", "c_n", *NAMES], ours, theirs, strict=True):
        assert mine < 8 * BF16, name
        assert mine < 1.25 * torchs + BF16, name


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_dtypes_of_results_and_gradients(dtypes: tuple[str, str]) -> None:
    h_dtype, c_dtype = (getattr(torch, name) for name in dtypes)
    values = [v.detach().float() for v in arguments(3, 2, 4, 5)]
    values[:3] = [values[0].bfloat16(), values[1].to(h_dtype), values[2].to(c_dtype)]
    leaves = [v.requires_grad_() for v in values]
    output, h_n, c_n = lstm_layer(*leaves)
    assert [output.dtype, h_n.dtype, c_n.dtype] == [torch.bfloat16, h_dtype, c_dtype]
    (output.float().square().sum() + h_n.float().sum() + c_n.float().sum()).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype


def test_biases_gradients_are_summed_in_float32() -> None:
    """A sum in bfloat16 over 4,000 equal rows would stop growing long before its end."""
    steps, batch = 2000, 2
    x = torch.zeros(steps, batch, 1, dtype=torch.bfloat16)
    state, zero = torch.zeros(batch, 1), torch.zeros(4, 1)
    bias = torch.zeros(4, requires_grad=True)
    output, _, _ = lstm_layer(x, state, state, zero, zero, bias, torch.zeros(4))
    output.backward(torch.ones_like(output))
    assert bias.grad is not None
    wide = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    x, state, zero = x.double(), state.double(), zero.double()
    by_steps(x, state, state, zero, zero, wide, wide.detach())[0].sum().backward()
    torch.testing.assert_close(bias.grad.double(), wide.grad, rtol=1e-3, atol=1e-6)


def test_only_what_is_wanted_gets_a_gradient_and_strange_strides_do_not_matter() -> None:
    values = arguments(4, 3, 5, 6)
    like = torch.randn(4, 3, 6, dtype=torch.float64)
    plain = results(lstm_layer, values, torch.float64, like)
    x = values[0].detach().transpose(0, 2).contiguous().transpose(0, 2)
    w_hh = values[4].detach().t().contiguous().t().requires_grad_()
    others = [v.detach() for v in values]
    others[0], others[4] = x, w_hh
    output, h_n, c_n = lstm_layer(*others)
    grad = like.transpose(0, 1).contiguous().transpose(0, 1)
    torch.autograd.backward([output, h_n, c_n], [grad, like[0], like[0].flip(0)])
    torch.testing.assert_close(output, plain[0])
    torch.testing.assert_close(w_hh.grad, plain[3 + 4])
    assert x.grad is None


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_without_memory_of_their_own_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Expanded and transposed ones, which stay as they are; with and without packed weights."""
    if not packed:
        monkeypatch.setattr(lstm_cpu, "can_pack", lambda dtype: False)
    values = [v.detach().float() for v in arguments(4, 3, 5, 6)]
    values[0] = values[0].bfloat16().requires_grad_()
    strange = torch.randn(6, 3, 4).bfloat16().permute(2, 1, 0)
    for grad in (strange, torch.ones(()).bfloat16().expand(4, 3, 6)):
        before = grad.clone()
        (found,) = torch.autograd.grad(lstm_layer(*values)[0], values[0], grad)
        assert torch.equal(grad, before)
        wide = [v.detach().double() for v in values]
        wide[0].requires_grad_()
        (exact,) = torch.autograd.grad(by_steps(*wide)[0], wide[0], grad.double())
        assert float((found.double() - exact).norm() / exact.norm()) < 8 * BF16
