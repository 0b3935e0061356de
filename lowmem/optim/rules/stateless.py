"""The gradient itself, or its signs: no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowmem.optim.rule import Context, Direction, Rule, State

Form = Literal["sign", "sgd", "none"]


@dataclass(frozen=True, kw_only=True)
class Stateless(Rule):
    """U <- scale sign(g)    "sign"
    U <- scale g          "sgd"
    U <- 0                "none"

    Source: Bernstein et al., "signSGD", arXiv:1802.04434, algorithm 1.
    """

    form: Form = "sign"
    scale: float = 1.0

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        return self.of(grad), {}

    def of(self, grad: Tensor) -> Tensor:
        """The direction in float32, a new tensor."""
        if self.form == "none":
            return torch.zeros_like(grad, dtype=torch.float32)
        return self.of_(grad.to(torch.float32, copy=True))

    def of_(self, grad: Tensor) -> Tensor:
        """The direction in the memory of a float32 gradient."""
        if self.form == "none":
            return grad.zero_()
        return (grad.sign_() if self.form == "sign" else grad).mul_(self.scale)
