"""Fira: GaLore's low-rank Adam, and the rest of the gradient scaled as Adam scales its projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.algorithms.galore import GaLore, has_room_for
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.low_rank_residual import LowRankWithResidual
from lowmem.optim.projections import PROJECTIONS
from lowmem.optim.refresh import Every
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class Fira(LowMemOptimizer):
    """Adam on a rank-r projection of each matrix' gradient; what is left of the gradient moves the weight, too.

        P <- r leading singular vectors of G      every `refresh_every` steps    (m, r)
        R <- P^T G                                                               (r, n)
        N <- Adam(R)                              moments on (r, n)
        phi_j <- |N_j| / |R_j|                    column by column               (n,)
        S <- (G - P R) diag(phi)                                                 (m, n)
        S <- S min(1, growth_limit |S_before| / |S|)
        W <- W - lr (scale P N + S + weight_decay W)                             (m, n), m <= n

    What it saves: moments of 2 r n and a basis of m r values instead of 2 m n, as GaLore, and unlike GaLore no
    direction is left out: a column that Adam would take ten times as long in the subspace is taken ten times as
    long outside of it. |S| may grow by `growth_limit` from one step to the next, which keeps one gradient of unusual
    size from throwing the weights off; None (null) lets it grow.

    The residual needs the gradient of the whole step, so it cannot be projected as it arrives: use
    `train.execution: fused` with one micro-batch, or plain. Every basis is fitted to that gradient, too. S is made
    some rows at a time and never held.

    A parameter that is no matrix, or whose smaller side is not larger than `rank`, is updated by plain Adam, as in
    GaLore. 3-D parameters are batches of matrices, each with a limiter of its own. The learning rate is near
    AdamW's with `scale` 1; the paper pre-trains with `scale` 0.25 and lr 0.01. `scale` multiplies P N alone.

    Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    arXiv:2410.01623. Differs from the authors' code (fira 1.0): there the residual is
    G - scale P R, so that with scale < 1 a share of the projected gradient is applied once more; `compat=True` does
    that. Nothing is added to |R_j|, so that phi does not depend on the size of gradients. The limiter sees N with its
    bias corrected, asks nothing of the device, and passes over steps without a gradient, after one of which theirs
    starts from zero. The basis, eps, weight decay and the turns of refreshes are those of our GaLore.
    """

    algorithm = "fira"
    treats_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        rank: Annotated[
            int | None, Range(at_least=1), "dimension of the subspace; null (None) for plain Adam"
        ] = 128,
        scale: Annotated[float, Range(above=0), "factor of the low-rank step (alpha in the paper)"] = 1.0,
        growth_limit: Annotated[
            float | None,
            Range(at_least=1),
            "how much longer the residual may be than at the step before (gamma); null (None) for any",
        ] = 1.01,
        compat: Annotated[
            bool, "take scale P R from the gradient, as the authors' code does, and not P R"
        ] = False,
        refresh_every: Annotated[int, Range(at_least=1), "steps between two bases (T in the paper)"] = 200,
        stagger: Annotated[
            bool, "spread the refreshes after the first over the steps, a few matrices at a time"
        ] = True,
        projection: Annotated[Literal["subspace", "svd", "dct"], "how the basis is found"] = "subspace",
        on_refresh: Annotated[
            Literal["keep", "reset", "rotate"], "what happens to the moments at a refresh"
        ] = "keep",
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
            growth_limit=growth_limit,
            compat=compat,
            refresh_every=refresh_every,
            stagger=stagger,
            projection=projection,
            on_refresh=on_refresh,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        adam = Adam(betas=tuple(group["betas"]), eps=group["eps"])
        if not has_room_for(group["rank"], shape):
            return adam
        return LowRankWithResidual(
            inner=adam,
            projection=PROJECTIONS[group["projection"]],
            rank=group["rank"],
            refresh_every=Every(group["refresh_every"], group["stagger"]),
            scale=group["scale"],
            on_refresh=group["on_refresh"],
            share=group["scale"] if group["compat"] else 1.0,
            growth=group["growth_limit"],
        )

    remark = GaLore.remark
