"""Heavy-ball and Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowmem.optim.rule import Context, Direction, Rule, Shape, Slot, State

BUFFER = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class Momentum(Rule):
    """The direction of `torch.optim.SGD`, without learning rate and weight decay.

        b <- g                                  first step
        b <- momentum b + (1 - dampening) g     later
        U <- b,   or   g + momentum b  with Nesterov

    State: one tensor of the parameter's shape, none when momentum is 0.
    b is linear in g, so a sum over micro-batches g = sum g_k may be made in it: `add_to_momentum_`. Nesterov's
    form needs g by itself.
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
        return {BUFFER: Slot(shape)} if self.momentum else {}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        if not self.momentum:
            return grad, {}
        changed = self.accumulate(grad, state, ctx, is_first=True)
        b = changed[BUFFER]
        return grad.add(b, alpha=self.momentum) if self.nesterov else b, changed

    @property
    def accumulates_in(self) -> str | None:
        return BUFFER if self.momentum and not self.nesterov else None

    def accumulate(self, grad: Tensor, state: State, ctx: Context, *, is_first: bool) -> dict[str, Tensor]:
        b = add_to_momentum_(
            state[BUFFER],
            grad,
            step=ctx.step,
            is_first=is_first,
            momentum=self.momentum,
            dampening=self.dampening,
        )
        return {BUFFER: b}

    def direction_of(self, accumulated: Tensor, state: State) -> Direction:
        return accumulated

    def change_basis(self, state: State, C: Tensor, ctx: Context) -> dict[str, Tensor]:
        return {BUFFER: C @ state[BUFFER]} if self.momentum else {}


def add_to_momentum_(
    b: Tensor,
    grad: Tensor,
    *,
    step: int,
    is_first: bool,
    momentum: float,
    dampening: float,
    starts_whole: bool = True,
) -> Tensor:
    """b <- momentum b + (1 - dampening) g for the first gradient of a step, b + (1 - dampening) g for more of it.

    In step 1 b is the gradient itself, where it `starts_whole`.
    """
    if step == 1 and starts_whole:
        return b.copy_(grad) if is_first else b.add_(grad)
    if is_first:
        b.mul_(momentum)
    return b.add_(grad, alpha=1 - dampening)
