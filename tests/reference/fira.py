"""Fira, arXiv:2410.01623, with an exact singular value decomposition and the whole residual."""

from __future__ import annotations

import torch

from tests.reference.galore import GaLoreReference, top_left_singular_vectors


class FiraReference(GaLoreReference):
    def __init__(self, params, *, growth_limit=1.01, compat=False, **settings):
        super().__init__(params, **settings)
        self.growth, self.compat = growth_limit, compat

    def update(self, w, g, state, t):
        if w.dim() < 2 or min(w.shape) <= self.rank:
            return super().update(w, g, state, t)
        tall = g.shape[0] >= g.shape[1]
        G = g.T if tall else g
        zeros = torch.zeros_like(G[: self.rank])
        P, m, v, before = state or (torch.zeros(len(G), self.rank, dtype=G.dtype), zeros, zeros, 0.0)
        if self.is_due and G.abs().sum() > 0:
            P_new = self.basis(G)
            if self.on_refresh == "rotate" and t > 1:
                m, v = self.rotate(m, v, P_new.T @ P, t - 1)
            if self.on_refresh == "reset":
                m, v = zeros, zeros
            P = P_new
        R = P.T @ G
        N, m, v = self.adam(R, m, v, self.k if self.on_refresh == "reset" else t)
        S = self.rest(G, P, R, N)
        if self.growth is not None and before > 0 and S.norm() > self.growth * before:
            S = S * (self.growth * before / S.norm())
        u = self.scale * (P @ N) + S
        w.copy_(w - self.lr * ((u.T if tall else u) + self.weight_decay * w))
        return P, m, v, S.norm().item() if S.norm() > 0 else before

    def basis(self, G):
        return top_left_singular_vectors(G, self.rank)

    def rest(self, G, P, R, N):
        """The residual, column by column as much longer as N is than R."""
        phi = torch.zeros(G.shape[1], dtype=G.dtype)
        for j in range(G.shape[1]):
            if R[:, j].abs().sum() > 0:
                phi[j] = N[:, j].norm() / R[:, j].norm()
        return (G - (self.scale if self.compat else 1) * (P @ R)) * phi


reference = FiraReference
