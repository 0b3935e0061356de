"""SGD as torch writes it, with decoupled weight decay."""

from __future__ import annotations


class SGDReference:
    def __init__(self, params, *, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
        self.params, self.lr, self.mu, self.dampening = params, lr, momentum, dampening
        self.nesterov, self.weight_decay = nesterov, weight_decay
        self.b = [None] * len(params)

    def step(self, grads):
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.b[i] = g.clone() if self.b[i] is None else self.mu * self.b[i] + (1 - self.dampening) * g
            if self.mu == 0:
                u = g
            elif self.nesterov:
                u = g + self.mu * self.b[i]
            else:
                u = self.b[i]
            w.copy_(w - self.lr * (u + self.weight_decay * w))


reference = SGDReference
