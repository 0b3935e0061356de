"""SWAN on singular values: every way of whitening is a function of them, so a float64 SVD is all it takes."""

from __future__ import annotations

import torch

RIDGE = 4 * 2.0**-23
"""Added to squared singular values of norm 1, as `lowmem.numerics.whitening` does and says why."""


def newton_schulz(s, iterations=None, beta=0.8):
    y = s**2 / (s**4).sum().sqrt() + RIDGE
    z = torch.ones_like(s)
    for _ in range(iterations or 10):
        y = beta * y * (3 - z * y)
        z = beta * (3 - z * y) * z
    return s * z / (s**4).sum() ** 0.25


def quintic(s, iterations=None):
    s = s / s.norm()
    x = (s**2 + RIDGE).sqrt()
    start = x
    for _ in range(iterations or 5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return s * x / start


def exact(s, iterations=None):
    return torch.where(s > 1e-6 * s.max(), 1.0, 0.0).to(s.dtype)


WHITENINGS = {"newton_schulz": newton_schulz, "quintic": quintic, "eigh": exact}


def whitened(x, whitening="quintic", iterations=None):
    if not x.any():
        return x
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    return U * WHITENINGS[whitening](S, iterations) @ Vh


def standardised(x):
    x = x - x.mean(1, keepdim=True)
    deviation = (x * x).mean(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, x / deviation, 0.0)


class SwanReference:
    def __init__(
        self,
        params,
        *,
        lr,
        whitening="quintic",
        iterations=None,
        standardize=True,
        scale=0.2,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    ):
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.whitening, self.iterations = whitening, iterations
        self.standardize, self.scale = standardize, scale
        self.betas, self.eps = betas, eps
        self.t = [0] * len(params)
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.t[i] += 1
            u = self.adam(i, g) if w.dim() < 2 or min(w.shape[-2:]) == 1 else self.direction(g)
            w.copy_(w - self.lr * (u + self.weight_decay * w))

    def direction(self, g):
        if g.dim() == 3:
            return torch.stack([self.direction(each) for each in g])
        u = whitened(standardised(g) if self.standardize else g, self.whitening, self.iterations)
        return self.scale * u * u.numel() ** 0.5 / u.norm() if u.any() else u

    def adam(self, i, g):
        b1, b2 = self.betas
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        return (self.m[i] / (1 - b1 ** self.t[i])) / ((self.v[i] / (1 - b2 ** self.t[i])).sqrt() + self.eps)


reference = SwanReference
