"""SGD-SaI: momentum SGD whose learning rate is scaled per tensor once, at initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.numerics.held_weights import numel_of
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.snr_scaled import SnrScaledMomentum
from lowmem.optim.settings import LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class SGDSaI(LowMemOptimizer):
    """Momentum SGD scaled by each tensor's gradient signal-to-noise ratio (g-SNR).

        s <- ||g||_2 / std(g)                     once per tensor
        m <- g at first, then momentum m + (1 - momentum) g
        w <- w - lr (s m + weight_decay w)

    What it saves: Adam's second moment; one tensor of the parameter's shape and one number remain,
    only the number with `momentum=0`. The step is proportional to the gradient, so clip it.

    `gsnr`: "code" uses s as it is, like the authors' package; "paper" divides it by the largest ratio
    in the model as algorithm 1 does, which needs a learning rate larger by that factor (thousands).
    Since the ratio is sqrt(numel) for a gradient with mean near zero, the largest one is taken as
    sqrt(numel) of the largest tensor, which is known before the first gradient.

    `momentum_start`: with "gradient", as in the authors' package, the first gradient moves the weights
    1 / (1 - momentum) times as far as a later one would; with "zero" m begins with 0, and it weighs as
    much as any other. That needs no warm-up against it.

    Source: Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need",
    arXiv:2412.11768, algorithm 1. Differs from the authors' code (sgd-sai 1.0.3): s is taken at the
    first finite, non-zero gradient instead of at the first step, where LoRA's A has a zero gradient and
    would stay frozen for ever; s is part of the state and survives a resume; a tensor of one entry or
    of equal entries takes sqrt(numel), and s stays within [0.5, 4] sqrt(numel), where the code divides
    by 1e-8; momentum 0 works; m may begin with 0; the closure is evaluated once.
    """

    algorithm = "sgd_sai"

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-2,
        *,
        momentum: Annotated[
            float, Range(at_least=0, below=1), "decay of the running gradient; 0 keeps none"
        ] = 0.9,
        momentum_start: Annotated[
            Literal["gradient", "zero"], "zero has the first gradient weigh as much as any other"
        ] = "gradient",
        gsnr: Annotated[
            Literal["code", "paper"], "paper divides the ratios by the largest in the model"
        ] = "code",
        weight_decay: WeightDecay = 1e-2,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            momentum=momentum,
            momentum_start=momentum_start,
            gsnr=gsnr,
            weight_decay=weight_decay,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        normalizer = math.sqrt(group.get("largest_numel", 1)) if group["gsnr"] == "paper" else 1.0
        starts_whole = group["momentum_start"] == "gradient"
        return SnrScaledMomentum(momentum=group["momentum"], normalizer=normalizer, starts_whole=starts_whole)

    @staticmethod
    def settle_groups(groups: list[dict[str, Any]]) -> None:
        """Tell every group the size of the largest tensor, which "paper" normalises by."""
        mine = [group for group in groups if group["algorithm"] == SGDSaI.algorithm]
        largest = max((numel_of(param) for group in mine for param in group["params"]), default=1)
        for group in mine:
            group["largest_numel"] = largest
