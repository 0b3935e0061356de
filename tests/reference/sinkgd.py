"""SinkGD as its paper writes it, arXiv:2502.06742: the matrix itself is normalised, rows and columns in turn."""

from __future__ import annotations

import torch


class SinkGDReference:
    def __init__(
        self,
        params,
        *,
        lr,
        normalize="sinkhorn",
        iterations=5,
        scale=0.2,
        momentum=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    ):
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.normalize, self.iterations, self.scale, self.momentum = normalize, iterations, scale, momentum
        self.betas, self.eps = betas, eps
        self.t = [0] * len(params)
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.t[i] += 1
            if w.dim() < 2 or min(w.shape[-2:]) == 1:
                u = self.adam(i, g)
            else:
                self.m[i] = self.momentum * self.m[i] + (1 - self.momentum) * g
                u = self.scale * self.normalized(self.m[i])
            w.copy_(w - self.lr * (u + self.weight_decay * w))

    def normalized(self, x):
        if x.dim() == 3:
            return torch.stack([self.normalized(each) for each in x])
        if self.normalize in ("row", "column"):
            return x * inverse_rms(x, 1 if self.normalize == "row" else 0)
        for _ in range(self.iterations):
            x = x * inverse_rms(x, 1)
            x = x * inverse_rms(x, 0)
        return x

    def adam(self, i, g):
        b1, b2 = self.betas
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        return (self.m[i] / (1 - b1 ** self.t[i])) / ((self.v[i] / (1 - b2 ** self.t[i])).sqrt() + self.eps)


def inverse_rms(x, dim):
    rms = (x * x).mean(dim, keepdim=True).sqrt()
    return torch.where(rms > 0, 1 / rms, 0.0)


reference = SinkGDReference
