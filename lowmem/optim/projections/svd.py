"""The exact subspace: a full singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.numerics.linalg import top_singular_vectors
from lowmem.optim.projections.projection import KeptVectors


@dataclass(frozen=True)
class Svd(KeptVectors):
    """The leading left singular vectors of the gradient, as GaLore's authors compute them.

    Exact, and slow: minutes per refresh for a 7B model, with the whole gradient's float32 factors as
    workspace. `Subspace` captures nearly the same energy for about a hundredth of the time.
    """

    may_be_repeated: ClassVar[bool] = False

    def fit(self, G: Tensor, rank: int, *, start: Tensor | None, generator: torch.Generator) -> Tensor:
        return top_singular_vectors(G, rank)
