"""AdamW, arXiv:1711.05101 algorithm 2, with the schedule multiplier 1."""

from __future__ import annotations

import torch


class AdamWReference:
    def __init__(self, params, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        self.params, self.lr, self.betas, self.eps, self.weight_decay = params, lr, betas, eps, weight_decay
        self.t = [0] * len(params)
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]

    def step(self, grads):
        b1, b2 = self.betas
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.t[i] += 1
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            m_hat = self.m[i] / (1 - b1 ** self.t[i])
            v_hat = self.v[i] / (1 - b2 ** self.t[i])
            w.copy_(w - self.lr * (m_hat / (v_hat.sqrt() + self.eps) + self.weight_decay * w))


reference = AdamWReference
