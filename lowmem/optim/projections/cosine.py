"""Vectors of the cosine basis, chosen by the gradient: no decomposition, and r numbers to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.numerics.dct import cosine_energies, cosine_vectors
from lowmem.numerics.tiles import largest_magnitude
from lowmem.optim.rule import Shape, Slot


@dataclass(frozen=True)
class Cosine:
    """The r vectors of the discrete cosine transform (DCT-II) that hold most of the gradient's energy.

    The basis is orthonormal and the same for every matrix, so what is kept is which of its vectors are used, in
    ascending order, and these are made when they are needed. A fit is a fast Fourier transform of the gradient and asks
    nothing of the device, so it may be made at every step. It holds less of a gradient than a basis fitted to it:
    what is left out should be used, too (Fira), or the basis changed often.

    Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    arXiv:2505.17967.
    """

    always_fits: ClassVar[bool] = True
    may_be_repeated: ClassVar[bool] = True

    def slot(self, batch: Shape, m: int, rank: int) -> Slot:
        return Slot((*batch, rank), "factor")  # exact: numbers below 2^24

    def vectors(self, kept: Tensor, m: int) -> Tensor:
        return cosine_vectors(kept, m)

    def fit(self, G: Tensor, rank: int, *, start: Tensor | None, generator: torch.Generator) -> Tensor:
        energies = cosine_energies(G, 1.0 / largest_magnitude(G).float())
        chosen = energies.topk(rank).indices.sort().values.float()
        if start is None:
            start = torch.arange(rank, device=G.device, dtype=torch.float32)
        return torch.where(energies.isfinite().all(), chosen, start)  # of zeros the energies are 0 / 0

    def old_numbers(self, old: Tensor, new: Tensor) -> Tensor | None:
        same = new.unsqueeze(-1) == old.unsqueeze(-2)  # (..., rank, rank)
        return torch.where(same.any(-1), same.float().argmax(-1), -1)
