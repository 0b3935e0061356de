"""FRUGAL, arXiv:2411.07837 algorithm 1, splitting along columns, rows, whole tensors or a subspace."""

from __future__ import annotations

import hashlib
import random

import torch

from tests.reference.dct_adamw import strongest_cosines


class FRUGALReference:
    def __init__(
        self,
        params,
        *,
        lr,
        density=0.25,
        projection="columns",
        order="random",
        refresh_every=200,
        inner="adam",
        residual="sign",
        residual_scale=0.1,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
    ):
        self.params, self.lr, self.weight_decay, self.seed = params, lr, weight_decay, seed
        self.density, self.projection, self.every = density, projection, refresh_every
        self.order = order
        self.inner, self.residual, self.residual_scale = inner, residual, residual_scale
        self.betas, self.eps = betas, eps
        self.t = [0] * len(params)
        self.chosen, self.m, self.v = ([None] * len(params) for _ in range(3))

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.t[i] += 1
            if self.projection == "block":
                u = self.in_turn(i, g)
            elif w.dim() >= 2 and min(w.shape[-2:]) > 1:
                u = self.split(i, g)
            else:
                u = self.whole(i, g)
            w.copy_(w - self.lr * (u + self.weight_decay * w))

    def whole(self, i, g):
        if self.t[i] == 1:
            self.m[i], self.v[i] = torch.zeros_like(g), torch.zeros_like(g)
        u, self.m[i], self.v[i] = self.with_state(g, self.m[i], self.v[i], self.t[i])
        return u

    def in_turn(self, i, g):
        turn, done = divmod(self.t[i] - 1, self.every)
        if i not in self.active(turn):
            return self.without_state(g)
        if done == 0:
            self.m[i], self.v[i] = torch.zeros_like(g), torch.zeros_like(g)
        u, self.m[i], self.v[i] = self.with_state(g, self.m[i], self.v[i], done + 1)
        return u

    def active(self, turn):
        n = len(self.params)
        k = max(1, round(self.density * n))
        if self.order == "random":
            return choice(k, n, self.seed, "turn", turn)
        windows = [list(range(first, min(first + k, n))) for first in range(0, n, k)]
        if self.order == "mirror":
            path = windows + windows[-2:0:-1]
            return path[turn % len(path)]
        upwards = [each % n for each in range(turn * k, turn * k + k)]
        return upwards if self.order == "ascending" else [n - 1 - each for each in upwards]

    def split(self, i, g):
        if self.density == 1:
            return self.whole(i, g)
        rest = self.without_state(g)
        if self.density == 0:
            return rest
        if self.projection in ("svd", "subspace", "random", "dct"):
            return self.along_a_subspace(i, g)
        if (self.t[i] - 1) % self.every == 0:
            self.chosen[i] = self.mask(f"0.{i}", self.t[i], g)
            self.m[i], self.v[i] = torch.zeros_like(g), torch.zeros_like(g)
        k = (self.t[i] - 1) % self.every + 1
        u, self.m[i], self.v[i] = self.with_state(g, self.m[i], self.v[i], k)
        return torch.where(self.chosen[i], u, rest)

    def along_a_subspace(self, i, g):
        k = (self.t[i] - 1) % self.every + 1
        G = g.mT if g.shape[-2] >= g.shape[-1] else g
        if k == 1:
            self.chosen[i] = self.basis(f"0.{i}", self.t[i], G)
        P = self.chosen[i]
        R = P.mT @ G
        if k == 1:
            self.m[i], self.v[i] = torch.zeros_like(R), torch.zeros_like(R)
        N, self.m[i], self.v[i] = self.with_state(R, self.m[i], self.v[i], k)
        u = P @ N + self.without_state(G - P @ R)
        return u.mT if g.shape[-2] >= g.shape[-1] else u

    def basis(self, name, step, G):
        side = G.shape[-2]
        r = min(max(1, round(self.density * side)), side - 1)
        if self.projection == "dct":
            each = [strongest_cosines(matrix, r) for matrix in (G if G.dim() == 3 else [G])]
            return torch.stack(each).view(*G.shape[:-1], r)
        if self.projection == "random":
            generator = torch.Generator().manual_seed(seed_of(self.seed, name, step, "basis"))
            drawn = [torch.randn(side, r, generator=generator) for _ in range(len(G) if G.dim() == 3 else 1)]
            P = torch.linalg.qr(torch.stack(drawn).to(G.dtype)).Q.view(*G.shape[:-1], -1)
        else:
            P = torch.linalg.svd(G, full_matrices=False).U[..., :r]
        largest = P.gather(-2, P.abs().argmax(-2, keepdim=True))
        return P * largest.sign()

    def mask(self, name, step, g):
        """True in the chosen columns or rows of each matrix."""
        dim = -1 if self.projection == "columns" else -2
        mask = torch.zeros(g.shape, dtype=torch.bool)
        for index, each in enumerate(mask if g.dim() == 3 else [mask]):
            side = g.shape[dim]
            count = max(1, round(self.density * side))
            for number in choice(count, side, self.seed, name, step, "chosen", index):
                each.select(dim, number).fill_(True)
        return mask

    def with_state(self, g, m, v, t):
        b1, b2 = self.betas
        if self.inner == "sign":
            return g.sign(), m, v
        if self.inner == "momentum":
            m = g if t == 1 else b1 * m + (1 - b1) * g
            return m, m, v
        if self.inner == "lion":
            return (b1 * m + (1 - b1) * g).sign(), b2 * m + (1 - b2) * g, v
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps), m, v

    def without_state(self, g):
        return self.residual_scale * {"sign": g.sign(), "sgd": g, "none": 0 * g}[self.residual]


def choice(count, among, *parts):
    """`count` of the numbers below `among`: the first of a shuffle whose swaps are drawn from the hash of `parts`."""
    draw, numbers = random.Random(seed_of(*parts)), list(range(among))
    for i in range(count):
        j = i + int(draw.random() * (among - i))
        numbers[i], numbers[j] = numbers[j], numbers[i]
    return numbers[:count]


def seed_of(*parts):
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") // 2


reference = FRUGALReference
