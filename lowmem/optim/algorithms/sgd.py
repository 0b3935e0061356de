"""Stochastic gradient descent, with or without momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.momentum import Momentum
from lowmem.optim.settings import LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class SGD(LowMemOptimizer):
    """SGD with momentum, dampening and Nesterov's form.

    What it costs: one tensor of the parameter's shape, nothing with `momentum=0`.

    Same update as `torch.optim.SGD`, except that weight decay is decoupled as in AdamW:
    w <- w - lr * weight_decay * w, where torch adds weight_decay * w to the gradient. Without momentum
    the two are equal.

    Source: Robbins and Monro, 1951; Sutskever et al., "On the importance of initialization and
    momentum in deep learning", 2013, for the momentum form torch uses.
    """

    algorithm = "sgd"

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-3,
        *,
        momentum: Annotated[
            float, Range(at_least=0, below=1), "decay of the running gradient; 0 keeps no state"
        ] = 0.0,
        dampening: Annotated[float, Range(at_least=0, at_most=1), "part of a new gradient left out"] = 0.0,
        nesterov: Annotated[bool, "look ahead by one momentum step"] = False,
        weight_decay: WeightDecay = 0.0,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        return Momentum(momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"])
