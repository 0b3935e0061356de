"""APOLLO: the gradient with every column as long as Adam would make it, as a random projection tells."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.algorithms.galore import GaLore, has_room_for
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.projection_scaled import ProjectionScaled
from lowmem.optim.refresh import Every
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class Apollo(LowMemOptimizer):
    """Gradient descent whose scaling Adam finds in a random projection of each matrix' gradient.

        P <- normal numbers / sqrt(r)             anew every `refresh_every` steps   (m, r)
        R <- P^T G                                                               (r, n)
        N <- Adam(R)                              moments on (r, n)
        phi_j <- |N_j| / |R_j|                    scaling "channel", column by column
        phi_j <- |N| / |R|                        scaling "tensor", one factor
        S <- G diag(phi),  S <- S min(1, growth_limit |S_before| / |S|)          (m, n)
        W <- W - lr (sqrt(scale) S + weight_decay W)                             (m, n), m <= n

    What it saves: moments of 2 r n values instead of 2 m n, and no basis: P is drawn anew in each step from seed, name
    and step. No matrix is ever decomposed.

    APOLLO-Mini is `rank=1, scaling="tensor"`, with two moments of n values. A factor that is measured in r of m
    directions comes out sqrt(r / m) times Adam's, which `scale` makes up for: None (null), the default, is m / r, with
    which the learning rate is near AdamW's. The paper pre-trains at lr 0.01 with `scale` 1, and APOLLO-Mini with 128.

    Directions are those of the gradient, so it needs the whole gradient of a step and cannot project it as it arrives:
    use `train.execution: fused` with one micro-batch, or plain. S is made some rows at a time and never held.

    A parameter that is no matrix, or whose smaller side is not larger than `rank`, is updated by plain Adam, as in
    GaLore. 3-D parameters are batches of matrices, each with a limiter of its own.

    Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv:2412.05270. Differs from
    the authors' code (apollo-torch 1.0): P is not kept; nothing is added to |R_j|, so that phi does not depend on the
    size of gradients; the limiter sees N with its bias corrected, asks nothing of the device, and passes over steps
    without a gradient, after one of which theirs starts from zero; eps is 1e-8, and added after the bias correction;
    weight decay uses the weight before the step; all state is plain tensors, so a run can be resumed.
    """

    algorithm = "apollo"
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
            int | None, Range(at_least=1), "dimension of the projection; null (None) for plain Adam"
        ] = 128,
        scaling: Annotated[
            Literal["channel", "tensor"], "a factor for every column, or one for a matrix (APOLLO-Mini)"
        ] = "channel",
        scale: Annotated[
            float | None,
            Range(above=0),
            "the step is multiplied by its square root (alpha); null (None) for the smaller side over rank",
        ] = None,
        growth_limit: Annotated[
            float | None,
            Range(at_least=1),
            "how much longer the step may be than the one before (gamma); null (None) for any",
        ] = 1.01,
        refresh_every: Annotated[int, Range(at_least=1), "steps between two projections"] = 200,
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
            scaling=scaling,
            scale=scale,
            growth_limit=growth_limit,
            refresh_every=refresh_every,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        adam = Adam(betas=tuple(group["betas"]), eps=group["eps"])
        rank, scale = group["rank"], group["scale"]
        if not has_room_for(rank, shape):
            return adam
        return ProjectionScaled(
            inner=adam,
            rank=rank,
            redraw=Every(group["refresh_every"]),
            scaling=group["scaling"],
            scale=math.sqrt(min(shape[-2:]) / rank if scale is None else scale),
            growth=group["growth_limit"],
        )

    remark = GaLore.remark
