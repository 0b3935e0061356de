"""DCT-AdamW: low-rank Adam in vectors of the cosine basis, chosen anew at every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.algorithms.fira import Fira
from lowmem.optim.algorithms.galore import GaLore
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class DctAdamW(LowMemOptimizer):
    """Adam on the r cosine vectors that hold most of each matrix' gradient; what is left of it moves the weight, too.

        J <- the r vectors of the cosine basis with the largest |Q_j^T G|        every `refresh_every` steps
        m, v <- rows of J that were in J before as they were, others 0           "rotate"
        R <- Q_J^T G                                                             (r, n)
        N <- Adam(R)                              moments on (r, n)
        S <- (G - Q_J R) diag(|N_j| / |R_j|)      residual "scaled", as in Fira  (m, n)
        W <- W - lr (scale Q_J N + S + weight_decay W)                           (m, n), m <= n

    What it saves: moments of 2 r n values instead of 2 m n, and of the basis only which r vectors are used. There is no
    decomposition: the vectors are chosen by a fast Fourier transform of the gradient and made when they are needed,
    from their formula. Nothing is read from the device, so a step takes no longer when the basis changes.

    A fixed basis holds less of a gradient than one fitted to it. That is why it is chosen at every step by default, and
    why the rest is used: with residual "none" it is lost, and then gradients can be projected as they arrive
    (`train.execution: project`), which pays where `refresh_every` is large. With "scaled" use `train.execution: fused`
    with one micro-batch, or plain.

    A parameter that is no matrix, or whose smaller side is not larger than `rank`, is updated by plain Adam, as in
    GaLore. 3-D parameters are batches of matrices. The learning rate is near AdamW's with `scale` 1.

    Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    arXiv:2505.17967. Differs from the authors' code (ISTA-DASLab-Optimizers 1.1): the basis is the same transform for
    choosing and for projecting, of each matrix' own size, and never stored; vectors are chosen by their energy (sum of
    squares), which keeps most of the gradient, where the code takes sums of magnitudes; moments move by a selection of
    rows, which equals the product with Q_J^T Q_J_before to the bit; the rest of a gradient is scaled and used in the
    same step instead of being kept in a buffer of the weight's size until the next; step counts are part of the state.
    """

    algorithm = "dct_adamw"
    treats_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        rank: Annotated[int | None, Range(at_least=1), "how many vectors; null (None) for plain Adam"] = 128,
        scale: Annotated[float, Range(above=0), "factor of the low-rank step"] = 1.0,
        residual: Annotated[Literal["scaled", "none"], "what becomes of the rest of the gradient"] = "scaled",
        growth_limit: Annotated[
            float | None,
            Range(at_least=1),
            "how much longer the residual may be than at the step before; null (None) for any",
        ] = 1.01,
        refresh_every: Annotated[int, Range(at_least=1), "steps between two choices of vectors"] = 1,
        stagger: Annotated[
            bool, "spread the choices after the first over the steps, a few matrices at a time"
        ] = True,
        on_refresh: Annotated[
            Literal["keep", "reset", "rotate"], "what happens to the moments when vectors are chosen"
        ] = "rotate",
        accumulator: Annotated[
            Literal["param", "bf16", "fp32"], "what projected gradients are added up in over micro-batches"
        ] = "param",
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            scale=scale,
            residual=residual,
            growth_limit=growth_limit,
            refresh_every=refresh_every,
            stagger=stagger,
            on_refresh=on_refresh,
            accumulator=accumulator,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        in_cosines = {**group, "projection": "dct", "compat": False}
        return (GaLore if group["residual"] == "none" else Fira).rule(in_cosines, shape)

    remark = GaLore.remark
