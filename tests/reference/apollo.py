"""APOLLO, arXiv:2412.05270, with its projection as a whole matrix."""

from __future__ import annotations

import hashlib

import torch


class ApolloReference:
    def __init__(
        self,
        params,
        *,
        lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        rank=128,
        scaling="channel",
        scale=None,
        growth_limit=1.01,
        refresh_every=200,
        seed=0,
    ):
        self.params, self.lr, self.betas, self.eps, self.weight_decay = params, lr, betas, eps, weight_decay
        self.rank, self.scaling, self.scale, self.growth = rank, scaling, scale, growth_limit
        self.every, self.seed = refresh_every, seed
        self.t = [0] * len(params)
        self.state = [None] * len(params)

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.t[i] += 1
            t = self.t[i]
            if w.dim() < 2 or min(w.shape[-2:]) <= self.rank:
                m, v = self.state[i] or (torch.zeros_like(g), torch.zeros_like(g))
                u, m, v = self.adam(g, m, v, t)
                self.state[i] = m, v
            else:
                first = t - (t - 1) % self.every
                P = self.projection(f"0.{i}", first, g)
                batch = g if w.dim() == 3 else g[None]
                states = self.state[i] or [None] * len(batch)
                steps = [self.scaled(G, P_e, s, t) for G, P_e, s in zip(batch, P, states, strict=True)]
                self.state[i] = [state for _, state in steps]
                u = torch.stack([step for step, _ in steps]).view_as(g)
            w.copy_(w - self.lr * (u + self.weight_decay * w))

    def projection(self, name, step, g):
        """One for each matrix, drawn together."""
        text = "\x1f".join(map(str, (self.seed, name, step, "projection")))
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") // 2
        shape = (len(g) if g.dim() == 3 else 1, min(g.shape[-2:]), self.rank)
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        return (draw / self.rank**0.5).to(g.dtype)

    def scaled(self, g, P, state, t):
        tall = g.shape[0] >= g.shape[1]
        G = g.T if tall else g
        R = P.T @ G
        m, v, before = state or (torch.zeros_like(R), torch.zeros_like(R), 0.0)
        N, m, v = self.adam(R, m, v, t)
        if self.scaling == "tensor":
            phi = N.norm() / R.norm()
        else:
            phi = torch.stack([N[:, j].norm() / R[:, j].norm() for j in range(G.shape[1])])
        S = G * phi
        if self.growth is not None and before > 0 and S.norm() > self.growth * before:
            S = S * (self.growth * before / S.norm())
        scale = len(G) / self.rank if self.scale is None else self.scale
        u = scale**0.5 * S
        return u.T if tall else u, (m, v, S.norm().item())

    def adam(self, g, m, v, t):
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps), m, v


reference = ApolloReference
