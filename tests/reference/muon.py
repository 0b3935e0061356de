"""Muon on singular values, in the dtype of the weights."""

from __future__ import annotations

import torch

from tests.reference.swan import SwanReference, whitened


class MuonReference(SwanReference):
    def __init__(
        self,
        params,
        *,
        lr,
        momentum=0.95,
        nesterov=True,
        whitening="quintic",
        adjust_lr="match_rms_adamw",
        weight_decay=0.0,
    ):
        super().__init__(params, lr=lr, whitening=whitening, weight_decay=weight_decay)
        self.momentum, self.nesterov, self.adjust_lr = momentum, nesterov, adjust_lr
        self.buffers = [torch.zeros_like(p) for p in params]

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            self.t[i] += 1
            if w.dim() < 2 or min(w.shape[-2:]) == 1:
                u = self.adam(i, g)
            else:
                self.buffers[i] = self.momentum * self.buffers[i] + (1 - self.momentum) * g
                b = self.buffers[i]
                u = self.orthogonal((1 - self.momentum) * g + self.momentum * b if self.nesterov else b)
            w.copy_(w - self.lr * (u + self.weight_decay * w))

    def orthogonal(self, x):
        if x.dim() == 3:
            return torch.stack([self.orthogonal(each) for each in x])
        m, n = x.shape
        factor = 0.2 * max(m, n) ** 0.5 if self.adjust_lr == "match_rms_adamw" else max(1, m / n) ** 0.5
        return factor * whitened(x, self.whitening)


reference = MuonReference
