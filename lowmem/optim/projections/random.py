"""The subspace that asks nothing of the gradient: a random one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.numerics.linalg import canonical_signs
from lowmem.optim.projections.projection import KeptVectors


@dataclass(frozen=True)
class Random(KeptVectors):
    """The orthonormal basis of a Gaussian matrix: every subspace is equally likely, whatever the gradient is.

    It costs one QR decomposition of (m, rank), and holds rank / m of the gradient's energy on average.
    """

    def fit(self, G: Tensor, rank: int, *, start: Tensor | None, generator: torch.Generator) -> Tensor:
        gaussian = torch.randn(G.shape[0], rank, device=G.device, dtype=torch.float32, generator=generator)
        return canonical_signs(torch.linalg.qr(gaussian).Q)
