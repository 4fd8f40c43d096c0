"""WeightDrop against an LSTM written out per time step, in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weight_drop import WeightDrop, draw_weight_mask


def loop_lstm(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    units = w_hh.size(1)
    h = x.new_zeros(x.size(1), units)
    c = x.new_zeros(x.size(1), units)
    outputs = []
    for x_t in x:
        i, f, g, o = (x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh).split(units, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def test_one_mask_per_window_and_gradient_through_kept_weights_only(device: torch.device) -> None:
    lstm: Any = nn.LSTM(3, 4).double().to(device)
    dropped = WeightDrop(copy.deepcopy(lstm), ["weight_hh_l0"], dropout=0.4)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)

    torch.manual_seed(1)
    output, _ = dropped(x)
    output.square().sum().backward()

    torch.manual_seed(1)
    mask = draw_weight_mask(lstm.weight_hh_l0, lstm.weight_hh_l0.shape, 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()
    assert set(mask.unique().tolist()) == {0.0, 65536 / round(0.6 * 65536)}
    lstm.requires_grad_(True)
    weights = [lstm.weight_ih_l0, lstm.weight_hh_l0 * mask, lstm.bias_ih_l0, lstm.bias_hh_l0]
    expected = loop_lstm(x, *weights)
    expected.square().sum().backward()

    torch.testing.assert_close(output, expected)
    raw: Any = dropped.module.weight_hh_l0_raw
    torch.testing.assert_close(raw.grad, lstm.weight_hh_l0.grad)
    assert (raw.grad[mask == 0] == 0).all()
    torch.testing.assert_close(dropped.module.weight_ih_l0.grad, lstm.weight_ih_l0.grad)


def test_evaluation_uses_the_raw_weight_however_often(device: torch.device) -> None:
    lstm = nn.LSTM(3, 4).to(device)
    dropped = WeightDrop(copy.deepcopy(lstm), ["weight_hh_l0"], dropout=0.9)
    x = torch.randn(5, 2, 3, device=device)
    names = [name for name, _ in dropped.named_parameters()]
    for _ in range(2):  # train, evaluate, train again: the original failed at the second
        dropped.train()
        assert not torch.equal(dropped(x)[0][1:], dropped(x)[0][1:])
        dropped.eval()
        torch.testing.assert_close(dropped(x)[0], lstm(x)[0])
        assert [name for name, _ in dropped.named_parameters()] == names
    assert "module.weight_hh_l0_raw" in names
    assert "module.weight_hh_l0" not in names


def test_first_step_does_not_see_the_mask_and_each_call_draws_anew() -> None:
    dropped = WeightDrop(nn.LSTM(10, 10), ["weight_hh_l0"], dropout=0.9)
    x = torch.randn(3, 1, 10)
    first, second = dropped(x)[0], dropped(x)[0]
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_rate_and_scale() -> None:
    linear = WeightDrop(nn.Linear(300, 300, bias=False), ["weight"], dropout=0.3)
    nn.init.ones_(linear.get_parameter("module.weight_raw"))
    weight = linear(torch.eye(300))
    assert abs((weight == 0).float().mean() - 0.3) < 0.01  # 5 standard deviations are 0.0076
    assert torch.allclose(weight[weight != 0], torch.tensor(1 / 0.7))


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
    dropped = WeightDrop(nn.LSTM(3, 4), ["weight_hh_l0"], dropout=0.5)
    dropped(torch.randn(2, 1, 3))
    state = {name: torch.randn_like(value) for name, value in dropped.state_dict().items()}
    # The original registered the masked weight beside the raw one.
    dropped.load_state_dict({**state, "module.weight_hh_l0": torch.zeros(16, 4)})
    assert torch.equal(
        dropped.get_parameter("module.weight_hh_l0_raw"), state["module.weight_hh_l0_raw"]
    )
    twin = copy.deepcopy(dropped).eval()
    x = torch.randn(2, 1, 3)
    assert torch.equal(twin(x)[0], dropped.eval()(x)[0])


def test_double_and_back_keeps_working() -> None:
    dropped = WeightDrop(nn.LSTM(3, 4), ["weight_hh_l0"], dropout=0.5).double()
    assert dropped(torch.randn(2, 1, 3).double())[0].dtype == torch.float64
    with pytest.raises((ValueError, RuntimeError)):
        dropped(torch.randn(2, 1, 5).double())  # whatever the module raises passes through
    assert dropped(torch.randn(2, 1, 3).double())[0].shape == (2, 1, 4)


@pytest.mark.parametrize("dropout", [0.5, 0.3, 0.05, 0.9, 1 / 3])
def test_rate_and_scale_of_the_masks(dropout: float) -> None:
    n = 1_200_003
    mask = draw_weight_mask(torch.zeros((), dtype=torch.float64), torch.Size([n]), dropout)
    kept = round((1 - dropout) * 65536) / 65536
    assert set(mask.unique().tolist()) == {0.0, 1 / kept}
    error = 4.5 * (dropout * (1 - dropout) / n) ** 0.5
    assert abs(float((mask == 0).double().mean()) - dropout) < error + 2**-16
    # Each of the four factors that come from one draw has the rate, and no two go together.
    dropped = (mask[: n - 3] == 0).double().view(-1, 4)
    assert (dropped.mean(0) - dropout).abs().max() < 2 * error + 2**-16
    correlation = dropped.T.corrcoef()
    assert (correlation - torch.eye(4)).abs().max() < 4.5 * 2 / n**0.5
    later = (mask[1:] == 0).double(), (mask[:-1] == 0).double()
    assert abs(float(torch.corrcoef(torch.stack(later))[0, 1])) < 4.5 / n**0.5


def test_masks_at_the_edges() -> None:
    like = torch.zeros(())
    assert torch.equal(draw_weight_mask(like, torch.Size([3, 5]), 0.0), torch.ones(3, 5))
    assert torch.equal(draw_weight_mask(like, torch.Size([3, 5]), 1e-9), torch.ones(3, 5))
    assert (draw_weight_mask(like, torch.Size([1000]), 1 - 1e-9) != 0).sum() < 5
    assert draw_weight_mask(like, torch.Size([0, 5]), 0.5).shape == (0, 5)


def test_same_seed_same_mask_in_the_dtype_and_shape_asked_for() -> None:
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        masks.append(draw_weight_mask(torch.zeros((), dtype=dtype), torch.Size([2, 3, 7]), 0.5))
        assert masks[-1].dtype == dtype
        assert masks[-1].shape == torch.Size([2, 3, 7])
    assert torch.equal(masks[0], masks[1].float())
    assert not torch.equal(masks[0], draw_weight_mask(masks[0], torch.Size([2, 3, 7]), 0.5))
