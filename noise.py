"""An update's random factors: drawn by name when first asked for, and fixed from then on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Drawn:
    """What an update has drawn so far, and what it draws with."""

    generator: torch.Generator | None
    rank: int
    ranks: int
    factors: dict[str, Tensor] = field(default_factory=dict)


class Noise:
    """The random factors of one update.

    Whoever drops something asks for its factors by a name. The first request draws them; every
    later one gets the same: another piece of the update's window, and a piece that is run a second
    time. Where several processes share the batch, each draws for all of its columns and takes
    those of its own, so that the factors do not depend on the number of processes.

    Args:
        generator: to draw from, of the device of the factors; None: torch's default one.
        rank: number of this process.
        ranks: processes that share the columns of the batch equally.
    """

    def __init__(
        self, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> None:
        self._drawn = _Drawn(generator, rank, ranks)
        self._prefix = ""
        self._row = 0

    def of(self, name: str) -> "Noise":
        """The same factors under names of their own, for one part of the model."""
        return self._view(f"{self._prefix}{name}.", self._row)

    def at(self, row: int) -> "Noise":
        """The same factors, for a piece of the window that starts at this row."""
        return self._view(self._prefix, row)

    def _view(self, prefix: str, row: int) -> "Noise":
        view = Noise.__new__(Noise)
        view._drawn, view._prefix, view._row = self._drawn, prefix, row
        return view

    def drop(
        self,
        name: str,
        shape: tuple[int, ...],
        dropout: float,
        like: Tensor,
        batch_dim: int | None = None,
    ) -> Tensor:
        """Factors that drop: 0 with probability dropout, else 1 / (1 - dropout).

        Args:
            name: of these factors.
            shape: of the factors.
            dropout: probability of dropping, in [0, 1).
            like: gives the device, and the dtype where it is wider than float32.
            batch_dim: dimension of the batch's columns, which the processes share; None: none is.
        """
        name = self._prefix + name
        factors = self._drawn.factors
        if name not in factors:
            factors[name] = self._draw(shape, dropout, like, batch_dim)
        return factors[name]

    def drop_by_step(
        self,
        name: str,
        shape: tuple[int, ...],
        dropout: float,
        like: Tensor,
        batch_dim: int | None = None,
    ) -> Tensor:
        """As drop, but for the rows of one piece, whose factors differ from row to row.

        Args:
            shape: of the factors, (T, …), where the piece has T rows.
        """
        return self.drop(f"{name} from row {self._row}", shape, dropout, like, batch_dim)

    def _draw(
        self, shape: tuple[int, ...], dropout: float, like: Tensor, batch_dim: int | None
    ) -> Tensor:
        drawn = self._drawn
        whole = list(shape)
        if batch_dim is not None:
            whole[batch_dim] *= drawn.ranks
        dtype = torch.promote_types(like.dtype, torch.float32)
        factors = drop_factors(torch.Size(whole), dropout, dtype, like.device, drawn.generator)
        if batch_dim is None or drawn.ranks == 1:
            return factors
        width = shape[batch_dim]
        return factors.narrow(batch_dim, drawn.rank * width, width)


def drop_factors(
    shape: torch.Size,
    dropout: float,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Factors that drop: 0 with probability dropout, else what keeps the expectation at 1.

    Made from 16 random bits each. Tensor.bernoulli_ draws 64 and on many CPUs handles them one at
    a time; masks as large as the weights then take a tenth of an update. The probability is
    rounded to a multiple of 2**-16, and what is kept is scaled by the inverse of the rounded one.

    Args:
        shape: of the factors.
        dropout: probability of dropping, in [0, 1); at most 1 - 2**-16 is dropped.
        dtype: of the factors.
        device: of the factors.
        generator: to draw from; None: torch's default one.
    """
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device)
    # From the lowest number up without a bound: all 64 bits.
    bits = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: shape.numel()]
    kept = max(1, round((1 - dropout) * 2**16))
    if kept == 2**16:
        return torch.ones(shape, dtype=dtype, device=device)
    factors = (bits < kept - 2**15).to(dtype)
    return factors.mul_(2**16 / kept).view(shape)
