"""DCT-AdamW, arXiv:2505.17967, with the whole cosine basis as a matrix and moments moved by a product with it."""

from __future__ import annotations

import math

import torch

from tests.reference.fira import FiraReference


class DctAdamWReference(FiraReference):
    def __init__(self, params, *, residual="scaled", refresh_every=1, on_refresh="rotate", **settings):
        super().__init__(params, refresh_every=refresh_every, on_refresh=on_refresh, **settings)
        self.residual = residual

    def basis(self, G):
        return strongest_cosines(G, self.rank)

    def rest(self, G, P, R, N):
        return super().rest(G, P, R, N) if self.residual == "scaled" else torch.zeros_like(G)


def strongest_cosines(G, rank):
    """The vectors of the cosine basis that hold most of G (m, n), as columns."""
    m = len(G)
    Q = torch.tensor(
        [[math.cos(math.pi * k * (2 * j + 1) / (2 * m)) for k in range(m)] for j in range(m)],
        dtype=torch.float64,
    )
    Q = (Q / Q.norm(dim=0)).to(G.dtype)
    energies = (Q.T @ G).square().sum(dim=1)
    return Q[:, energies.topk(rank).indices.sort().values]


reference = DctAdamWReference
