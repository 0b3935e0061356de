"""BAdam, arXiv:2404.02827 algorithm 1, every tensor being a block."""

from __future__ import annotations

import hashlib
import random

import torch


class BlockAdamReference:
    def __init__(
        self,
        params,
        *,
        lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        refresh_every=100,
        order="shuffled",
        active=1,
        seed=0,
    ):
        self.params, self.lr, self.betas, self.eps, self.weight_decay = params, lr, betas, eps, weight_decay
        self.every, self.order, self.seed = refresh_every, order, seed
        self.k = min(active, len(params))
        self.t = 0

    def step(self, grads):
        turn, done = divmod(self.t, self.every)
        if done == 0:
            self.moments = {i: (torch.zeros_like(grads[i]),) * 2 for i in self.active(turn)}
        self.t += 1
        b1, b2 = self.betas
        for i, (m, v) in self.moments.items():
            w, g = self.params[i], grads[i]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            u = (m / (1 - b1 ** (done + 1))) / ((v / (1 - b2 ** (done + 1))).sqrt() + self.eps)
            w.copy_(w - self.lr * (u + self.weight_decay * w))
            self.moments[i] = m, v

    def active(self, turn):
        n, k = len(self.params), self.k
        if self.order == "shuffled":
            of_a_round = -(-n // k)
            order = shuffled(n, self.seed, "order", turn // of_a_round)
            return order[turn % of_a_round * k :][:k]
        windows = [list(range(first, min(first + k, n))) for first in range(0, n, k)]
        if self.order == "mirror":
            path = windows + windows[-2:0:-1]
            return path[turn % len(path)]
        upwards = [each % n for each in range(turn * k, turn * k + k)]
        return upwards if self.order == "ascending" else [n - 1 - each for each in upwards]


def shuffled(count, *parts):
    """Fisher and Yates' shuffle of the numbers below `count`, whose swaps are drawn from the hash of `parts`."""
    text = "\x1f".join(map(str, parts))
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") // 2
    draw, numbers = random.Random(seed), list(range(count))
    for i in range(count):
        j = i + int(draw.random() * (count - i))
        numbers[i], numbers[j] = numbers[j], numbers[i]
    return numbers


reference = BlockAdamReference
