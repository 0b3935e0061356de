"""Lion's direction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowmem.optim.rule import Context, Direction, Rule, Shape, Slot, State


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Signs of a mean of gradients.

        U <- sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g                     exp_avg

    State: one tensor of the parameter's shape.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape, "moment")}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        beta1, beta2 = self.betas
        m = state["exp_avg"]
        U = m.lerp(grad, 1 - beta1).sign_()
        return U, {"exp_avg": m.lerp_(grad, 1 - beta2)}
