"""SGD-SaI, arXiv:2412.11768 algorithm 1; "paper" divides by the largest ratio, "code" does not."""

from __future__ import annotations

import torch


class SGDSaIReference:
    def __init__(
        self, params, *, lr, momentum=0.9, weight_decay=1e-2, gsnr="code", momentum_start="gradient"
    ):
        self.params, self.lr, self.mu, self.weight_decay, self.gsnr = params, lr, momentum, weight_decay, gsnr
        self.m = [torch.zeros_like(p) if momentum_start == "zero" else None for p in params]
        self.s = [None] * len(params)

    def step(self, grads):
        for i, g in enumerate(grads):
            if g is not None and self.s[i] is None and g.abs().sum() > 0 and torch.isfinite(g).all():
                self.s[i] = ratio(g)
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.m[i] = g.clone() if self.m[i] is None else self.mu * self.m[i] + (1 - self.mu) * g
            s = 0.0 if self.s[i] is None else self.s[i] / self.largest()
            w.copy_(w - self.lr * (s * self.m[i] + self.weight_decay * w))

    def largest(self):
        """The ratio of the largest tensor is sqrt(numel), to a thousandth (what algorithm 1 divides by)."""
        return max(p.numel() for p in self.params) ** 0.5 if self.gsnr == "paper" else 1.0


def ratio(g):
    """||g|| / std(g), sqrt(numel) where there is no spread, within [0.5, 4] sqrt(numel)."""
    usual = g.numel() ** 0.5
    if g.numel() == 1 or g.double().std() <= 1e-6 * g.double().norm() / usual:
        return usual
    return min(max((g.double().norm() / g.double().std()).item(), 0.5 * usual), 4 * usual)


reference = SGDSaIReference
