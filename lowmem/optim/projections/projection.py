"""What every way of choosing a subspace has in common."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowmem.optim.rule import Shape, Slot


class Projection(Protocol):
    """Chooses the subspace. G is (m, n) with m <= n, in any float dtype; the basis is orthonormal and float32."""

    always_fits: ClassVar[bool]
    """Whether any gradient gives a basis: one that is zero or not finite keeps `start`."""

    may_be_repeated: ClassVar[bool]
    """Whether a fit is quick enough for every process to make the same one."""

    def slot(self, batch: Shape, m: int, rank: int) -> Slot:
        """What is kept of the bases of a batch of matrices."""
        ...

    def vectors(self, kept: Tensor, m: int) -> Tensor:  # (..., m, rank)
        """The bases, given what is kept of them."""
        ...

    def fit(self, G: Tensor, rank: int, *, start: Tensor | None, generator: torch.Generator) -> Tensor:
        """What is kept of a new basis; `start` is what is kept of the previous one."""
        ...

    def old_numbers(self, old: Tensor, new: Tensor) -> Tensor | None:  # (..., rank)
        """Which vector of the old basis each of the new one is, -1 for none; None where vectors do not recur."""
        ...


class KeptVectors:
    """A basis that is kept as it is, and is another one each time."""

    always_fits: ClassVar[bool] = False
    may_be_repeated: ClassVar[bool] = True

    def slot(self, batch: Shape, m: int, rank: int) -> Slot:
        return Slot((*batch, m, rank), "basis")

    def vectors(self, kept: Tensor, m: int) -> Tensor:
        return kept

    def old_numbers(self, old: Tensor, new: Tensor) -> Tensor | None:
        return None
