"""GaLore, arXiv:2403.03507 algorithm 2, with an exact singular value decomposition."""

from __future__ import annotations

import torch


class GaLoreReference:
    def __init__(
        self,
        params,
        *,
        lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        rank=128,
        scale=1.0,
        refresh_every=200,
        on_refresh="keep",
        projection="svd",
        stagger=True,
    ):
        self.params, self.lr, self.betas, self.eps, self.weight_decay = params, lr, betas, eps, weight_decay
        self.rank, self.scale, self.every, self.on_refresh = rank, scale, refresh_every, on_refresh
        self.offset = [i * refresh_every // len(params) if stagger else 0 for i in range(len(params))]
        self.t = [0] * len(params)
        self.state = [None] * len(params)

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.t[i] += 1
            # Refreshed at its first step, and then when its turn comes.
            since = (self.t[i] - 1 - self.offset[i]) % self.every
            self.is_due = self.t[i] == 1 or since == 0
            self.k = since + 1 if self.t[i] > self.offset[i] else self.t[i]
            if w.dim() == 3:  # a batch of matrices, each on its own
                self.state[i] = self.state[i] or [None] * len(w)
                for e in range(len(w)):
                    self.state[i][e] = self.update(w[e], g[e], self.state[i][e], self.t[i])
            else:
                self.state[i] = self.update(w, g, self.state[i], self.t[i])

    def update(self, w, g, state, t):
        if w.dim() < 2 or min(w.shape) <= self.rank:
            P, m, v = state or (None, torch.zeros_like(g), torch.zeros_like(g))
            u, m, v = self.adam(g, m, v, t)
        else:
            tall = g.shape[0] >= g.shape[1]
            G = g.T if tall else g
            P, m, v = state or (None, torch.zeros_like(G[: self.rank]), torch.zeros_like(G[: self.rank]))
            if self.is_due and G.abs().sum() > 0:
                P_new = top_left_singular_vectors(G, self.rank)
                if P is not None and self.on_refresh == "rotate":
                    m, v = self.rotate(m, v, P_new.T @ P, t - 1)
                if self.on_refresh == "reset":
                    m, v = torch.zeros_like(m), torch.zeros_like(v)
                P = P_new
            k = self.k if self.on_refresh == "reset" else t
            R = P.T @ G if P is not None else torch.zeros_like(m)
            N, m, v = self.adam(R, m, v, k)
            u = self.scale * (P @ N) if P is not None else torch.zeros_like(G)
            u = u.T if tall else u
        w.copy_(w - self.lr * (u + self.weight_decay * w))
        return P, m, v

    def adam(self, g, m, v, t):
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps), m, v

    def rotate(self, m, v, C, t):
        """LDAdam's projection-aware moments, arXiv:2410.16103, after t updates."""
        b1, b2 = self.betas
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        return C @ m, (1 - b2**t) * ((C**2) @ (v_hat - m_hat**2) + (C @ m_hat) ** 2).abs()


def top_left_singular_vectors(G, rank):
    """Signs fixed so that each vector's largest entry is positive."""
    U = torch.linalg.svd(G, full_matrices=False)[0][:, :rank]
    for j in range(rank):
        if U[U[:, j].abs().argmax(), j] < 0:
            U[:, j] = -U[:, j]
    return U


reference = GaLoreReference
