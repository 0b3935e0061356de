"""Q-GaLore, arXiv:2407.08296 algorithm 1, with exact decompositions and a lazy schedule for each matrix."""

from __future__ import annotations

import torch

from tests.reference.galore import GaLoreReference, top_left_singular_vectors
from tests.reference.lazy_refresh import LazySchedule


class QGaLoreReference(GaLoreReference):
    def __init__(
        self,
        params,
        *,
        similarity_threshold=0.4,
        similarity_window=5,
        growth=2.0,
        max_refresh_every=None,
        storage=None,
        **galore,
    ):
        super().__init__(params, **galore)
        self.schedules = [
            LazySchedule(
                gap=self.every,
                threshold=similarity_threshold,
                window=similarity_window,
                growth=growth,
                longest=max_refresh_every or 8 * self.every,
                offset=offset,
            )
            for offset in self.offset
        ]
        self.state = [{} for _ in params]

    def step(self, grads):
        for w, g, state, schedule in zip(self.params, grads, self.state, self.schedules, strict=True):
            t = state["t"] = state.get("t", 0) + 1
            if w.dim() < 2 or min(w.shape[-2:]) <= self.rank:
                u = self.moments(g, state, t)
            else:
                G = g.mT if g.shape[-2] >= g.shape[-1] else g
                if schedule.is_due(t):
                    self.refresh(G, state, schedule, t)
                P = state["P"]
                u = self.scale * (P @ self.moments(P.mT @ G, state, t))
                u = u.mT if g.shape[-2] >= g.shape[-1] else u
            w.copy_(w - self.lr * (u + self.weight_decay * w))

    def moments(self, g, state, t):
        zero = torch.zeros_like(g)
        u, state["m"], state["v"] = self.adam(g, state.get("m", zero), state.get("v", zero), t)
        return u

    def refresh(self, G, state, schedule, t):
        batch = G if G.dim() == 3 else G[None]
        P_new = torch.stack([top_left_singular_vectors(each, self.rank) for each in batch]).view(
            *G.shape[:-1], self.rank
        )
        similarity = None
        if "P" in state:
            c = self.rank / G.shape[-2] * (G**2).sum()
            old, new = (((P.mT @ G) ** 2).sum() - c for P in (state["P"], P_new))
            similarity = min(max((old / new).item(), 0.0), 1.0)
        schedule.refreshed(t, similarity)
        state["P"] = P_new


reference = QGaLoreReference
