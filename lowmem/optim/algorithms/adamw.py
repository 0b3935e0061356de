"""AdamW: the baseline that everything here is measured against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.settings import Betas, Eps, LearningRate, Rounding, Seed, StorageSetting, WeightDecay


class AdamW(LowMemOptimizer):
    """Adam with decoupled weight decay.

    What it costs: two tensors of the parameter's shape. Same update as `torch.optim.AdamW`, through
    torch's own fused kernel where state is plain; bfloat16 weights are rounded stochastically unless
    `rounding="nearest"`.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101,
    algorithm 2. Defaults are torch's.
    """

    algorithm = "adamw"

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-3,
        *,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 1e-2,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        return Adam(betas=tuple(group["betas"]), eps=group["eps"])
