"""Lion, arXiv:2302.06675 algorithm 2."""

from __future__ import annotations

import torch


class LionReference:
    def __init__(self, params, *, lr, betas=(0.9, 0.99), weight_decay=0.0):
        self.params, self.lr, self.betas, self.weight_decay = params, lr, betas, weight_decay
        self.m = [torch.zeros_like(p) for p in params]

    def step(self, grads):
        b1, b2 = self.betas
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            sign = (b1 * self.m[i] + (1 - b1) * g).sign()
            self.m[i] = b2 * self.m[i] + (1 - b2) * g
            w.copy_(w - self.lr * (sign + self.weight_decay * w))


reference = LionReference
