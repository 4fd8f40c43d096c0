"""An update's random factors: their distribution, and what stays fixed once it is drawn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from noise import Noise, drop_factors


def seeded(seed: int = 0, rank: int = 0, ranks: int = 1) -> Noise:
    return Noise(torch.Generator().manual_seed(seed), rank, ranks)


def narrow(noise: Noise, name: str = "a") -> Tensor:
    return noise.drop(name, (4, 50), 0.5, like=torch.zeros(()))


@pytest.mark.parametrize("dropout", [0.5, 0.3, 0.05, 0.9, 1 / 3])
def test_rate_and_expectation(dropout: float) -> None:
    n = 1_200_003
    factors = seeded().drop("a", (n,), dropout, like=torch.zeros((), dtype=torch.float64))
    kept = round((1 - dropout) * 65536) / 65536  # 16 bits a factor
    assert set(factors.unique().tolist()) == {0.0, 1 / kept}
    error = 4.5 * (dropout * (1 - dropout) / n) ** 0.5
    assert abs(float((factors == 0).double().mean()) - dropout) < error + 2**-16
    assert abs(float(factors.mean()) - 1) < (error + 2**-16) / kept
    # Four factors come from one draw of 64 bits: each has the rate, and no two go together.
    dropped = (factors[: n - 3] == 0).double().view(-1, 4)
    assert (dropped.mean(0) - dropout).abs().max() < 2 * error + 2**-16
    correlation = dropped.T.corrcoef()
    assert (correlation - torch.eye(4)).abs().max() < 4.5 * 2 / n**0.5
    later = (factors[1:] == 0).double(), (factors[:-1] == 0).double()
    assert abs(float(torch.corrcoef(torch.stack(later))[0, 1])) < 4.5 / n**0.5


def test_factors_at_the_edges() -> None:
    def factors(dropout: float, *shape: int) -> Tensor:
        return drop_factors(torch.Size(shape), dropout, torch.float32, torch.device("cpu"))

    assert torch.equal(factors(0.0, 3, 5), torch.ones(3, 5))
    assert torch.equal(factors(1e-9, 3, 5), torch.ones(3, 5))
    assert (factors(1 - 1e-9, 1000) != 0).sum() < 5
    assert factors(0.5, 0, 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_factors_are_float32_or_wider_and_the_same_in_each(
    given: torch.dtype, expected: torch.dtype
) -> None:
    factors = seeded().drop("a", (3, 7), 0.5, like=torch.zeros((), dtype=given))
    assert factors.dtype == expected
    same = seeded().drop("a", (3, 7), 0.5, like=torch.zeros(()))
    assert torch.equal(factors.float(), same)


def test_a_generator_gives_the_same_again_and_the_default_one_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(narrow(seeded(1)), narrow(seeded(1)))
    assert not torch.equal(narrow(seeded(1)), narrow(seeded(2)))
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)  # the next update draws on from it
    assert not torch.equal(narrow(Noise(generator)), narrow(Noise(generator)))
    assert not torch.equal(narrow(Noise()), narrow(Noise()))
    assert not torch.equal(torch.get_rng_state(), before)


def test_factors_are_drawn_once_by_name() -> None:
    noise = seeded()
    first = narrow(noise)
    assert not torch.equal(narrow(noise, "b"), first)
    assert torch.equal(narrow(noise), first)
    assert torch.equal(narrow(noise.at(7)), first)  # another piece of the window
    part, other = noise.of("layer 0"), noise.of("layer 1")
    own = narrow(part)
    assert not torch.equal(own, first)
    assert not torch.equal(own, narrow(other))
    assert torch.equal(narrow(noise.at(3).of("layer 0")), own)
    assert torch.equal(narrow(part.at(3)), own)
    assert not torch.equal(narrow(part.of("layer 0")), own)


def test_factors_per_step_differ_by_row_and_are_fixed_for_a_piece() -> None:
    noise = seeded().of("layer 0")

    def steps(row: int, length: int, name: str = "cells") -> Tensor:
        shape = (length, 3, 50)
        return noise.at(row).drop_by_step(name, shape, 0.5, like=torch.zeros(()), batch_dim=1)

    first, second = steps(0, 6), steps(6, 4)
    rows = [row.flatten() for row in (*first, *second)]
    assert len(torch.stack(rows).unique(dim=0)) == 10
    assert torch.equal(steps(0, 6), first)  # the piece is run a second time
    assert torch.equal(steps(6, 4), second)
    assert not torch.equal(steps(0, 6, "hidden"), first)
    assert not torch.equal(noise.drop("cells", (6, 3, 50), 0.5, like=first), first)


@pytest.mark.parametrize(
    "draw",
    [
        lambda noise, b: noise.drop("a", (1, b, 5), 0.5, like=torch.zeros(()), batch_dim=1),
        lambda noise, b: noise.drop("a", (b, 5), 0.5, like=torch.zeros(()), batch_dim=0),
        lambda noise, b: noise.at(4).drop_by_step(
            "a", (7, b, 5), 0.5, like=torch.zeros(()), batch_dim=1
        ),
    ],
    ids=["locked", "first dimension", "by step"],
)
def test_each_rank_has_its_columns_of_the_whole_batch(
    draw: Callable[[Noise, int], Tensor],
) -> None:
    whole = draw(seeded(), 6)
    parts = [draw(seeded(0, rank, 3), 2) for rank in range(3)]
    dim = next(d for d in range(whole.dim()) if whole.size(d) != parts[0].size(d))
    assert torch.equal(torch.cat(parts, dim), whole)
