"""Heavy-ball and Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowmem.optim.rule import Context, Direction, Rule, Shape, Slot, State


@dataclass(frozen=True, kw_only=True)
class Momentum(Rule):
    """The direction of `torch.optim.SGD`, without learning rate and weight decay.

        b <- g                                  first step
        b <- momentum b + (1 - dampening) g     later
        U <- b,   or   g + momentum b  with Nesterov

    State: one tensor of the parameter's shape, none when momentum is 0.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs momentum > 0 and dampening 0, found momentum={self.momentum}, "
                f"dampening={self.dampening}. Set nesterov=False or change those."
            )

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape)} if self.momentum else {}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        if not self.momentum:
            return grad, {}
        b = state["momentum_buffer"]
        if ctx.step == 1:
            b.copy_(grad)
        else:
            b.mul_(self.momentum).add_(grad, alpha=1 - self.dampening)
        U = grad.add(b, alpha=self.momentum) if self.nesterov else b
        return U, {"momentum_buffer": b}

    def change_basis(self, state: State, C: Tensor, ctx: Context) -> dict[str, Tensor]:
        return {"momentum_buffer": C @ state["momentum_buffer"]} if self.momentum else {}
