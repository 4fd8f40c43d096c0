"""Random factors (dropout masks) of one update, drawn on first request and cached by name."""

from copy import copy

import torch
from torch import Tensor


class Noise:
    """The random factors of one update.

    The first request for a name draws its factors; later requests return the same tensor, so that
    all pieces of a window and a recomputed piece share their masks. With several processes each
    draws the factors of the whole batch and takes its own columns, so that the factors do not
    depend on the number of processes.

    Args:
        generator: random generator on the factors' device; None: torch's default generator.
        rank: number of this process.
        ranks: processes that share the columns of the batch equally.
    """

    def __init__(
        self, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> None:
        self._generator = generator
        self._rank = rank
        self._ranks = ranks
        self._factors: dict[str, Tensor] = {}  # by name; all views share them
        self._prefix = ""
        self._row = 0

    def of(self, name: str) -> "Noise":
        """A view that prefixes all names with this one, for one part of the model."""
        view = copy(self)
        view._prefix = f"{self._prefix}{name}."
        return view

    def at(self, row: int) -> "Noise":
        """A view for the piece of the window that starts at this row; see drop_by_step."""
        view = copy(self)
        view._row = row
        return view

    def drop(
        self,
        name: str,
        shape: tuple[int, ...],
        dropout: float,
        like: Tensor,
        batch_dim: int | None = None,
    ) -> Tensor:
        """Dropout factors: 0 with probability dropout, else 1 / (1 - dropout).

        Args:
            name: cache key; a later call with it returns the same tensor.
            shape: shape of the factors, with this process's columns only.
            dropout: probability of dropping, in [0, 1).
            like: gives the device, and the dtype if it is wider than float32.
            batch_dim: dimension of the batch's columns; None: the factors have no batch dimension.
        """
        name = self._prefix + name
        if name not in self._factors:
            self._factors[name] = self._draw(shape, dropout, like, batch_dim)
        return self._factors[name]

    def drop_by_step(
        self,
        name: str,
        shape: tuple[int, ...],
        dropout: float,
        like: Tensor,
        batch_dim: int | None = None,
    ) -> Tensor:
        """Dropout factors that differ from time step to time step; see drop.

        Args:
            shape: (T, …), where the piece has T rows.
        """
        return self.drop(f"{name} from row {self._row}", shape, dropout, like, batch_dim)

    def _draw(
        self, shape: tuple[int, ...], dropout: float, like: Tensor, batch_dim: int | None
    ) -> Tensor:
        whole = list(shape)
        if batch_dim is not None:
            whole[batch_dim] *= self._ranks
        dtype = torch.promote_types(like.dtype, torch.float32)
        factors = drop_factors(torch.Size(whole), dropout, dtype, like.device, self._generator)
        if batch_dim is None or self._ranks == 1:
            return factors
        width = shape[batch_dim]
        return factors.narrow(batch_dim, self._rank * width, width)


def drop_factors(
    shape: torch.Size,
    dropout: float,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dropout factors: 0 with probability dropout, else a constant such that the mean is 1.

    Each factor takes 16 random bits. Tensor.bernoulli_ draws 64, one factor at a time on many CPUs;
    masks as large as the weights then take a tenth of an update. The probability of keeping is
    rounded to a multiple of 2**-16, at least 2**-16, and kept values are scaled by its inverse.

    Args:
        shape: shape of the factors.
        dropout: probability of dropping, in [0, 1).
        dtype: dtype of the factors.
        device: device of the factors.
        generator: random generator; None: torch's default generator.
    """
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device)
    # The full range of int64, so that all 64 bits are random.
    bits = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: shape.numel()]
    kept = max(1, round((1 - dropout) * 2**16))
    if kept == 2**16:
        return torch.ones(shape, dtype=dtype, device=device)
    factors = (bits < kept - 2**15).to(dtype)
    return factors.mul_(2**16 / kept).view(shape)
