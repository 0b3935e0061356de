"""bitsandbytes' own 8-bit steps as rules: the library's kernel gives the direction, the engine does the rest.

The library's update of a weight of zeros at the learning rate -1 and without decay is the direction itself. So learning
rate, decay, rounding, int8 weights and pieces of weights are the engine's, and a step needs a few tiles and not a copy
of the weight.

On a CPU the library finds codes to 2^-15 of the scale only, so that the smallest values of a block are not the nearest
code, and zeros beside larger values do not stay zeros; and its kernel makes float32 copies of the moments of a tile,
which no count of tensors sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.library_codes import code_levels
from lowmem.optim.rule import Context, Direction, Rule, Shape, Slot, State


@dataclass(frozen=True, kw_only=True)
class BlockwiseAdam(Rule):
    """Adam as in `rules.adam`, its moments kept as the library keeps them.

        m, v <- the values that the codes stand for
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        U <- m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        exp_avg, exp_avg_sq <- the nearest codes of m and v

    State: two codes of a byte a value, and two float32 scales for every 256 values, the largest magnitude of a block.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape, "moment_codes"), "exp_avg_sq": Slot(shape, "variance_codes")}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        moments = [_moment(state, "exp_avg", signed=True), _moment(state, "exp_avg_sq", signed=False)]
        return _direction_of("adam", grad, moments, betas=self.betas, eps=self.eps, step=ctx.step), {}


@dataclass(frozen=True, kw_only=True)
class BlockwiseLion(Rule):
    """Lion as in `rules.lion`, its mean kept as the library keeps it: a byte a value, and a float32 scale for 256.

        m <- the values that the codes stand for
        U <- sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g
        exp_avg <- the nearest codes of m

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2, and for the
    codes arXiv:2110.02861.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape, "moment_codes")}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        moments = [_moment(state, "exp_avg", signed=True)]
        return _direction_of("lion", grad, moments, betas=self.betas, eps=0.0, step=ctx.step), {}


_Moment = tuple[Tensor, Tensor, Tensor]
"""Codes (n) and scales (n / 256) as they lie in memory, and the levels (256) of the codes."""


def _moment(state: State, name: str, *, signed: bool) -> _Moment:
    codes, scales = state.codes(name)
    return codes, scales, code_levels(codes.device, signed=signed)


def _direction_of(
    name: str,
    grad: Tensor,  # (n), or the parameter's shape; float32
    moments: list[_Moment],
    *,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> Tensor:  # as grad
    """The library's update `name` of a weight of zeros; codes and scales are new afterwards."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    codes1, scales1, levels1 = moments[0]
    codes2, scales2, levels2 = moments[1] if len(moments) > 1 else (None, None, None)
    flat = grad.reshape(-1)  # codes are counted in the order of a contiguous tensor
    direction = torch.zeros_like(flat)
    optimizer_update_8bit_blockwise(
        name,
        flat,
        direction,
        codes1,
        codes2,
        *betas,
        0.0,  # beta3 and alpha are of another optimizer
        0.0,
        eps,
        step,
        -1.0,
        levels1,
        levels2,
        scales1,
        scales2,
        weight_decay=0.0,
    )
    return direction.view(grad.shape)
