"""Adam's direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.rule import Context, Direction, Rule, Shape, Slot, State


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam without learning rate and weight decay; with the engine's decoupled decay it is AdamW.

        m <- beta1 m + (1 - beta1) g                     exp_avg
        v <- beta2 v + (1 - beta2) g^2                   exp_avg_sq
        U <- m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    State: two tensors of the parameter's shape.

    Source: Kingma and Ba, "Adam", arXiv:1412.6980, algorithm 1; Loshchilov and Hutter, "Decoupled
    Weight Decay Regularization", arXiv:1711.05101, algorithm 2. Same order of operations as
    `torch.optim.AdamW`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape, "moment"), "exp_avg_sq": Slot(shape, "variance")}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        beta1, beta2 = self.betas
        m = state["exp_avg"].lerp_(grad, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1 = 1 - beta1**ctx.step
        correction2 = 1 - beta2**ctx.step
        U = v.sqrt().div_(math.sqrt(correction2)).add_(self.eps).mul_(correction1)
        torch.div(m, U, out=U)
        return U, {"exp_avg": m, "exp_avg_sq": v}

    def change_basis(self, state: State, C: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Rotate both moments by C (r, r), treating v - m^2 as the variance of independent coordinates.

            m' <- C m
            v' <- (1 - beta2^t) | C^2 (v_hat - m_hat^2) + (C m_hat)^2 |        squares are element-wise

        Source: Robert et al., "LDAdam", arXiv:2410.16103, projection-aware update.
        """
        correction1 = 1 - self.betas[0] ** ctx.step
        correction2 = 1 - self.betas[1] ** ctx.step
        m = state["exp_avg"]
        m_hat, v_hat = m / correction1, state["exp_avg_sq"] / correction2
        v_new = C.square() @ (v_hat - m_hat.square()) + (C @ m_hat).square()
        return {"exp_avg": C @ m, "exp_avg_sq": v_new.abs_().mul_(correction2)}
