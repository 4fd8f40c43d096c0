"""Locked and embedding dropout: shapes and rates of the masks, and their gradients, by loops."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout


def test_locked_mask_is_one_for_all_steps(device: torch.device) -> None:
    x = torch.randn(7, 3, 40, dtype=torch.float64, device=device, requires_grad=True)
    y = LockedDropout()(x, 0.3)
    factor = (y / x).detach()
    kept = torch.isclose(factor, torch.tensor(1 / 0.7, dtype=torch.float64, device=device))
    assert (kept | (factor == 0)).all()
    for t in range(7):
        assert torch.equal(kept[t], kept[0])
    assert not torch.equal(kept[0, 0], kept[0, 1])  # but each sequence has its own
    grad = torch.randn_like(x)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad * factor)


def test_locked_rate() -> None:
    y = LockedDropout()(torch.ones(1, 100, 1000), 0.65)
    assert abs((y == 0).double().mean() - 0.65) < 0.008  # 5 standard deviations
    assert abs(y.double().mean() - 1) < 0.022
    by_default = LockedDropout()(torch.ones(1, 100, 1000))
    assert abs((by_default == 0).double().mean() - 0.5) < 0.008


def test_locked_off_costs_nothing_and_draws_nothing() -> None:
    layer, x = LockedDropout(), torch.randn(2, 2, 2)
    before = torch.get_rng_state()
    assert layer(x, 0) is x
    assert layer.eval()(x, 0.9) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_embedding_drops_words_wherever_they_occur(device: torch.device) -> None:
    embed = nn.Embedding(50, 6).double().to(device)
    words = torch.randint(0, 50, (30, 4), device=device)
    y = embedded_dropout(embed, words, 0.375)
    grad = torch.randn_like(y)
    y.backward(grad)

    fates: dict[int, float] = {}
    expected = torch.zeros_like(embed.weight)
    for t in range(30):
        for b in range(4):
            word = int(words[t, b])
            ratios = (y[t, b] / embed.weight[word]).tolist()
            assert max(ratios) - min(ratios) < 1e-9
            fate = fates.setdefault(word, round(ratios[0], 9))
            assert fate == round(ratios[0], 9)  # the same at every occurrence
            expected[word] += fate * grad[t, b]
    assert set(fates.values()) == {0.0, 1.6}
    torch.testing.assert_close(embed.weight.grad, expected, rtol=1e-7, atol=1e-9)


def test_embedding_rate_over_the_vocabulary() -> None:
    embed = nn.Embedding(100_000, 1)
    nn.init.ones_(embed.weight)
    y = embedded_dropout(embed, torch.arange(100_000))  # 0.1 by default
    assert abs((y == 0).double().mean() - 0.1) < 0.005


def test_embedding_off_scale_and_last_word() -> None:
    embed = nn.Embedding(5, 2)
    words = torch.tensor([[4, 0], [4, 2]])
    before = torch.get_rng_state()
    torch.testing.assert_close(embedded_dropout(embed, words, 0), embed(words))
    assert torch.equal(torch.get_rng_state(), before)
    scale = torch.arange(5.0).reshape(5, 1)
    expected = embed(words) * torch.tensor([[4.0, 0], [4, 2]])[:, :, None]
    torch.testing.assert_close(embedded_dropout(embed, words, 0, scale), expected)
    embedded_dropout(embed, words, 0).sum().backward()
    assert embed.weight.grad is not None
    assert embed.weight.grad[4].tolist() == [2, 2]  # the original took it for padding


@pytest.mark.parametrize(
    "options",
    [
        dict(padding_idx=2, max_norm=1.0, norm_type=1.0, scale_grad_by_freq=True),
        dict(sparse=True),
    ],
)
def test_an_embedding_s_own_options_hold(options: dict[str, Any]) -> None:
    plain = nn.Embedding(5, 3, **options)
    embed, words, grad = copy.deepcopy(plain), torch.tensor([[4, 2], [4, 0]]), torch.randn(2, 2, 3)
    expected, found = plain(words), embedded_dropout(embed, words, 0)
    assert torch.equal(found, expected)
    expected.backward(grad)
    found.backward(grad)
    assert plain.weight.grad is not None
    assert embed.weight.grad is not None
    assert embed.weight.grad.is_sparse == plain.weight.grad.is_sparse
    assert torch.equal(embed.weight.grad.to_dense(), plain.weight.grad.to_dense())
