"""Adafactor: a second moment of m + n values for a matrix of m n."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.matrices import is_matrix
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.factored import Factored, Unfactored
from lowmem.optim.settings import LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class Adafactor(LowMemOptimizer):
    """Adaptive steps whose second moment is the outer product of its row and column means.

        b <- 1 - t^-beta2_power, or beta2 without its bias
        R <- b R + (1 - b) mean over columns of (G^2 + eps1)                     (m,)
        C <- b C + (1 - b) mean over rows of (G^2 + eps1)                        (n,)
        U <- G / sqrt(R C^T / mean(R))                                           (m, n)
        U <- U / max(1, RMS(U) / clip_threshold)
        M <- beta1 M + (1 - beta1) U              with beta1 > 0 only
        W <- W - lr (U or M + weight_decay W)

    What it saves: Adam's first moment and all but m + n values of its second, which are kept in float32 whatever
    the weight's dtype. `beta1` > 0 adds a tensor of the parameter's shape (`storage: {moment: ...}`). Norms and
    biases, and what else is no matrix, keep their second moment whole. 3-D parameters are batches of matrices. It
    suits embeddings and output heads, so it can be the `fallback` of an optimizer for matrices.

    The learning rate is absolute by default and near AdamW's or below it: the root mean square of a step is at
    most lr * clip_threshold. With `relative` it is multiplied by max(eps2, RMS(W)) as in the paper, so it should
    be larger, 1e-3 to 1e-2. `beta2` set to a number keeps an exponential mean instead of one that grows ever longer;
    with batches of a row or two it should be close to 1.

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    arXiv:1804.04235, algorithms 4 and 5; a constant beta2 as in section 7.1; its use with small batches: Marek et al.,
    "Small Batch Size Training for Language Models", arXiv:2507.07101. Differs from the paper: the learning rate is
    the one given, and its schedule the run's, where the paper takes min(0.01, 1 / sqrt(t)). From
    `torch.optim.Adafactor`: that caps lr at 1 / sqrt(t), is always relative, keeps its state in the weight's dtype
    and adds eps1 elsewhere. From `transformers.optimization.Adafactor` with `relative_step=False`: the momentum
    is that of U and not of lr U, and weight decay is lr * weight_decay where `scale_parameter` multiplies it by
    RMS(W), too. bfloat16 weights are rounded stochastically; neither of the two does that.
    """

    algorithm = "adafactor"

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        beta1: Annotated[
            float, Range(at_least=0, below=1), "decay of a running mean of the steps; 0 keeps none"
        ] = 0.0,
        beta2: Annotated[
            float | None,
            Range(at_least=0, below=1),
            "decay of the second moment; null (None) for 1 - t^-beta2_power",
        ] = None,
        beta2_power: Annotated[
            float, Range(above=0), "how the decay of the second moment grows with the step t; the paper's 0.8"
        ] = 0.8,
        eps: Annotated[
            tuple[float, float],
            Range(above=0),
            "added to squared gradients; least factor of a relative learning rate",
        ] = (1e-30, 1e-3),
        clip_threshold: Annotated[
            float | None,
            Range(above=0),
            "largest root mean square of a parameter's step over lr; null for no limit",
        ] = 1.0,
        relative: Annotated[bool, "multiply the learning rate by the root mean square of the weight"] = False,
        weight_decay: WeightDecay = 0.0,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            beta2_power=beta2_power,
            eps=eps,
            clip_threshold=clip_threshold,
            relative=relative,
            weight_decay=weight_decay,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        make = Factored if is_matrix(shape) else Unfactored
        return make(
            beta1=group["beta1"],
            beta2=group["beta2"],
            beta2_power=group["beta2_power"],
            eps=tuple(group["eps"]),
            clip_threshold=group["clip_threshold"],
            is_relative=group["relative"],
        )
