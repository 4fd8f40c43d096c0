"""WeightDrop against an LSTM written out per time step, in float64."""

import copy
from typing import Any

import pytest
import torch
from test_lstm_kernels import by_steps
from torch import Tensor, nn

from layers.gru import GRU
from layers.layer import Layer
from layers.lstm import LSTM
from noise import Noise
from weight_drop import WeightDrop


@pytest.mark.parametrize("kind", [nn.LSTM, LSTM])
def test_one_mask_per_window_and_gradient_through_kept_weights_only(
    kind: Any, device: torch.device
) -> None:
    lstm: Any = kind(3, 4).double().to(device)
    dropped = WeightDrop(copy.deepcopy(lstm), ["weight_hh_l0"], dropout=0.4)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
    zeros = x.new_zeros(1, 2, 4)

    noise = Noise()
    output, _ = dropped(x, (zeros, zeros), noise=noise)
    output.square().sum().backward()

    mask = noise.drop("weight_hh_l0", (16, 4), 0.4, like=x)
    assert 0 < (mask == 0).sum() < mask.numel()
    weights = [lstm.weight_ih_l0, lstm.weight_hh_l0 * mask, lstm.bias_ih_l0, lstm.bias_hh_l0]
    expected, _ = by_steps([x, zeros, zeros, *weights])
    expected.square().sum().backward()

    torch.testing.assert_close(output, expected)
    raw: Any = dropped.module.weight_hh_l0_raw
    torch.testing.assert_close(raw.grad, lstm.weight_hh_l0.grad)
    assert (raw.grad[mask == 0] == 0).all()
    torch.testing.assert_close(dropped.module.weight_ih_l0.grad, lstm.weight_ih_l0.grad)


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_evaluation_uses_the_raw_weight_however_often(
    kind: type[Layer], device: torch.device
) -> None:
    layer = kind(3, 4).to(device)
    dropped = WeightDrop(copy.deepcopy(layer), layer.recurrent, dropout=0.9)
    x, state = torch.randn(5, 2, 3, device=device), layer.init_state(2)
    names = [name for name, _ in dropped.named_parameters()]
    for _ in range(2):  # train, evaluate, train again: the original failed at the second
        dropped.train()
        assert not torch.equal(dropped(x, state)[0][1:], dropped(x, state)[0][1:])
        dropped.eval()
        before = torch.get_rng_state()
        assert torch.equal(dropped(x, state)[0], layer.eval()(x, state)[0])
        assert torch.equal(torch.get_rng_state(), before)
        assert [name for name, _ in dropped.named_parameters()] == names
    assert "module.weight_hh_l0_raw" in names
    assert "module.weight_hh_l0" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masked_weights_for_a_kernel_of_another_dtype(dtype: torch.dtype) -> None:
    """The product is rounded once; its gradient is masked in float32, and not in place."""
    layer = LSTM(3, 4)
    layer.mask_dtype = dtype
    received: dict[str, Tensor] = {}

    def kernel(x: Tensor, state: Any, weights: dict[str, Tensor], own: Noise) -> Any:
        assert own is noise  # the layer draws its own factors from the same
        received.update(weights)
        return x, state

    layer.kernel = kernel
    noise = Noise()
    WeightDrop(layer, ["weight_hh_l0"], dropout=0.3)(torch.ones(1, 1, 3), (), noise=noise)
    raw, masked = layer.get_parameter("weight_hh_l0_raw"), received["weight_hh_l0"]
    mask = noise.drop("weight_hh_l0", (16, 4), 0.3, like=raw)
    assert masked.dtype == dtype
    assert torch.equal(masked, (raw * mask).to(dtype))
    grad = torch.randn(16, 4).to(dtype)
    before = grad.clone()
    masked.backward(grad)
    assert torch.equal(grad, before)
    assert raw.grad is not None
    assert torch.equal(raw.grad, before.float() * mask)


def test_variational_drops_rows_and_only_in_training() -> None:
    linear = WeightDrop(nn.Linear(8, 50, bias=False), ["weight"], dropout=0.5, variational=True)
    output = linear(torch.eye(8))
    whole = (output == 0).all(0) | (output != 0).all(0)
    assert whole.all()
    assert 0 < (output == 0).all(0).sum() < 50
    linear.eval()
    torch.testing.assert_close(linear(torch.eye(8)), linear.module.weight_raw.T)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_wraps_any_recurrent_module_as_a_black_box(kind: Any) -> None:
    plain = kind(3, 4, num_layers=2, bidirectional=True)
    names = ["weight_hh_l0", "weight_hh_l1_reverse"]
    dropped = WeightDrop(copy.deepcopy(plain), names, dropout=0.5)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    dropped(packed)[0].data.sum().backward()
    assert all(p.grad is not None for p in dropped.parameters())
    dropped.eval()
    torch.testing.assert_close(dropped(packed)[0].data, plain(packed)[0].data)


def test_state_dicts_of_the_original_load_and_copies_work() -> None:
    dropped = WeightDrop(LSTM(3, 4), ["weight_hh_l0"], dropout=0.5)
    x, zeros = torch.randn(2, 1, 3), (torch.zeros(1, 1, 4),) * 2
    dropped(x, zeros)
    state = {name: torch.randn_like(value) for name, value in dropped.state_dict().items()}
    # The original registered the masked weight beside the raw one.
    dropped.load_state_dict({**state, "module.weight_hh_l0": torch.zeros(16, 4)})
    assert torch.equal(
        dropped.get_parameter("module.weight_hh_l0_raw"), state["module.weight_hh_l0_raw"]
    )
    twin = copy.deepcopy(dropped).eval()
    assert torch.equal(twin(x, zeros)[0], dropped.eval()(x, zeros)[0])


def test_a_call_that_fails_leaves_the_weights_as_they_were() -> None:
    dropped = WeightDrop(nn.LSTM(3, 4), ["weight_hh_l0"], dropout=0.5).double()
    assert dropped(torch.randn(2, 1, 3).double())[0].dtype == torch.float64
    with pytest.raises((ValueError, RuntimeError)):
        dropped(torch.randn(2, 1, 5).double())  # whatever the module raises passes through
    assert dropped(torch.randn(2, 1, 3).double())[0].shape == (2, 1, 4)
