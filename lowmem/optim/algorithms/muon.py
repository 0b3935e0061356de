"""Muon: momentum whose singular values are brought to one size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.matrices import is_matrix
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.whitened import WhitenedGradient
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class Muon(LowMemOptimizer):
    """Momentum SGD with the momentum of each matrix orthogonalised.

        B <- momentum B + (1 - momentum) G                                       (m, n)
        M <- (1 - momentum) G + momentum B, or B without Nesterov's form
        U <- (M M^T)^(-1/2) M, or M (M^T M)^(-1/2) where m > n                   singular values near 1
        W <- W - lr (a U + weight_decay W)

        a = 0.2 sqrt(max(m, n))        adjust_lr "match_rms_adamw"
        a = sqrt(max(1, m / n))        adjust_lr "original"

    What it saves: half of Adam's state; a matrix has one tensor of its shape (`storage: {moment: bf16}` or int8 for
    less). What it takes while a matrix is updated: three float32 matrices of its smaller side squared, never a
    float32 copy of it.

    With "match_rms_adamw" a step is about as long as Adam's, so that one learning rate serves matrices and fallback;
    "original" wants a larger one. A parameter that is no matrix takes Adam, where `torch.optim.Muon` refuses it;
    embeddings and the output head take the `fallback` of `build_optimizer`. 3-D parameters are batches of
    matrices. The step does not depend on the size of the gradient.

    Caution: a model pretrained with Adam is not at home in Muon's geometry, and training all of its parameters
    with Muon may cost what it had learned ("Can Muon Fine-tune Adam-Pretrained Models?", arXiv:2605.10468). Use
    it for pre-training and for LoRA factors, or with a learning rate well below AdamW's.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale that matches
    Adam's: Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982. Differs from `torch.optim.Muon`: the
    polynomial works on the Gram matrix in float32 instead of on a bfloat16 copy of M; M is divided by its
    norm however small that is, where torch takes 1e-7 for a smaller one and so shortens steps of tiny gradients; the
    default scale is "match_rms_adamw" and weight decay 0, where torch has "original" and 0.1.
    """

    algorithm = "muon"
    treats_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        momentum: Annotated[
            float, Range(at_least=0, below=1), "decay of the running gradient; 0 keeps no state"
        ] = 0.95,
        nesterov: Annotated[bool, "look ahead by one momentum step"] = True,
        whitening: Annotated[
            Literal["quintic", "newton_schulz", "eigh"], "how singular values are brought to one size"
        ] = "quintic",
        iterations: Annotated[
            int | None,
            Range(at_least=1, at_most=100),
            "of the whitening; null (None) for 5 (quintic), 10 (newton_schulz)",
        ] = None,
        adjust_lr: Annotated[
            Literal["match_rms_adamw", "original"], "how long a step is for a matrix' shape"
        ] = "match_rms_adamw",
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            whitening=whitening,
            iterations=iterations,
            adjust_lr=adjust_lr,
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
        if not is_matrix(shape):
            return Adam(betas=tuple(group["betas"]), eps=group["eps"])
        m, n = shape[-2:]
        matched = group["adjust_lr"] == "match_rms_adamw"
        return WhitenedGradient(
            whitening=group["whitening"],
            iterations=group["iterations"],
            scale=0.2 * math.sqrt(max(m, n)) if matched else math.sqrt(max(1.0, m / n)),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
        )
