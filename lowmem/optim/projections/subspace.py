"""The cheap subspace: randomised at first, warm-started from the previous basis later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.numerics.linalg import leading_subspace
from lowmem.optim.projections.projection import KeptVectors


@dataclass(frozen=True)
class Subspace(KeptVectors):
    """Block power iteration on the gradient; the previous basis, where there is one, is the start.

    A warm start needs one iteration and turns the basis as little as the new gradient asks for, so
    that moments kept across the refresh stay meaningful.
    """

    def fit(self, G: Tensor, rank: int, *, start: Tensor | None, generator: torch.Generator) -> Tensor:
        return leading_subspace(G, rank, start=start, generator=generator)
