"""Adafactor, arXiv:1804.04235 algorithms 4 and 5, with a given learning rate."""

from __future__ import annotations


class AdafactorReference:
    def __init__(
        self,
        params,
        *,
        lr,
        beta1=0.0,
        beta2=None,
        beta2_power=0.8,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        relative=False,
        weight_decay=0.0,
    ):
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.beta1, self.beta2, self.power = beta1, beta2, beta2_power
        self.eps, self.d, self.relative = eps, clip_threshold, relative
        self.t = [0] * len(params)
        self.R = [0.0] * len(params)
        self.C = [0.0] * len(params)
        self.V = [0.0] * len(params)
        self.m = [0.0] * len(params)

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.t[i] += 1
            t = self.t[i]
            squares = g * g + self.eps[0]
            if self.beta2 is None:
                new = t**-self.power
            else:
                new = (1 - self.beta2) / (1 - self.beta2**t)
            if w.dim() in (2, 3):
                self.R[i] = (1 - new) * self.R[i] + new * squares.mean(-1, keepdim=True)
                self.C[i] = (1 - new) * self.C[i] + new * squares.mean(-2, keepdim=True)
                V = self.R[i] * self.C[i] / self.R[i].mean(-2, keepdim=True)
            else:
                V = self.V[i] = (1 - new) * self.V[i] + new * squares
            U = g / V.sqrt()
            if self.d is not None:
                U = U / max(1.0, rms(U) / self.d)
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * U
            alpha = max(self.eps[1], rms(w)) if self.relative else 1.0
            w.copy_(w - self.lr * (alpha * self.m[i] + self.weight_decay * w))


def rms(x):
    return (x * x).mean().sqrt().item()


reference = AdafactorReference
