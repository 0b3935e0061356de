"""What every way of choosing a subspace has in common."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Projection(Protocol):
    """Chooses the subspace. G is (m, n) with m <= n, in any float dtype; the result is float32."""

    def fit(self, G: Tensor, rank: int, *, start: Tensor | None, generator: torch.Generator) -> Tensor:
        """An orthonormal, sign-canonical basis (m, rank); `start` is the previous one."""
        ...
