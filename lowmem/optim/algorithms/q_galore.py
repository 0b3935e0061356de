"""Q-GaLore: GaLore whose bases take four bits a value, whose moments take eight, and which refreshes lazily."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.algorithms.galore import GaLore
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.lazy_refresh import Lazy
from lowmem.optim.low_rank import LowRank
from lowmem.optim.refresh import Every
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay

STORAGE = {"moment": "int8", "variance": "int8", "basis": "int4"}
LONGEST_GAP = 8
"""In units of `refresh_every`: the longest gap where no `max_refresh_every` is given."""


class QGaLore(LowMemOptimizer):
    """GaLore with a packed INT4 basis, int8 moments, and a refresh of its own for every matrix.

        P <- r leading singular vectors of G      when the matrix' refresh is due    (m, r)
        R <- P^T G                                P as it is stored, in INT4         (r, n)
        N <- Adam(R)                              moments in int8                    (r, n)
        W <- W - lr (scale P N + weight_decay W)                                     (m, n), m <= n

        s <- (|P_old^T G|^2 - c) / (|P^T G|^2 - c),  c = r/m |G|^2      at a refresh after a whole gap
        after `similarity_window` of them with a mean above `similarity_threshold`:
            gap <- min(growth gap, max_refresh_every), and the window starts anew

    What it saves: a basis value takes 0.52 bytes and a moment 1.02, their scales included: m r 0.52 + 2 r n 1.02
    bytes of state instead of GaLore's 2 m r + 4 r n in bfloat16. Where bases last, most refreshes too.

    s says how much of the new basis' advantage over a random one the old basis still has on the gradient at
    hand: 1 is all, 0 none. Refreshes begin `refresh_every` steps apart. The gap and its window are part of
    the state. `lazy=False` keeps the gap.

    A parameter that is no matrix, or whose smaller side is not larger than `rank`, is updated by plain Adam
    with int8 moments, as in GaLore. Roles left out of `storage` keep the formats above. The stored basis is not
    quite orthonormal; it is used as it is, since its error is a few thousandths of a gradient's energy.

    Source: Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
    Gradients", arXiv:2407.08296, algorithm 1. Differs from the authors' code: two codes share a byte, where it
    takes a byte a code; similarity is measured on the whole subspace and on the gradient, where it takes the
    signed cosine of the first vectors, so that a flip of a sign counts as dissimilar; the window is emptied when
    the gap grows, where a full one doubles the gap at every later refresh; the gap is bounded; the basis is
    found as in GaLore, by a warm-started subspace iteration, without the workspace of a full decomposition, and
    is kept where that fails; matrices are refreshed in turn; every parameter is trained in every execution;
    all state is plain tensors, so a run can be resumed. It trains ordinary weights: INT8 weights, the
    paper's third part, are a property of the model and not of the optimizer.
    """

    algorithm = "q_galore"
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
        refresh_every: Annotated[int, Range(at_least=1), "steps between two bases, at first"] = 200,
        lazy: Annotated[bool, "refresh a matrix less often while its bases stay alike"] = True,
        similarity_threshold: Annotated[
            float, Range(at_least=0, at_most=1), "mean similarity above which the gap grows"
        ] = 0.4,
        similarity_window: Annotated[int, Range(at_least=1), "similarities that the mean is taken of"] = 5,
        growth: Annotated[float, Range(above=1), "factor by which the gap grows"] = 2.0,
        max_refresh_every: Annotated[
            int | None, Range(at_least=1), "longest gap; null (None) for 8 times refresh_every"
        ] = None,
        stagger: Annotated[
            bool, "spread the refreshes after the first over the steps, a few matrices at a time"
        ] = True,
        projection: Annotated[Literal["subspace", "svd", "dct"], "how the basis is found"] = "subspace",
        on_refresh: Annotated[
            Literal["keep", "reset", "rotate"], "what happens to the moments at a refresh"
        ] = "keep",
        accumulator: Annotated[
            Literal["param", "bf16", "fp32"], "what projected gradients are added up in over micro-batches"
        ] = "param",
        storage: StorageSetting = STORAGE,
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
            refresh_every=refresh_every,
            lazy=lazy,
            similarity_threshold=similarity_threshold,
            similarity_window=similarity_window,
            growth=growth,
            max_refresh_every=max_refresh_every,
            stagger=stagger,
            projection=projection,
            on_refresh=on_refresh,
            accumulator=accumulator,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        longest, gap = group["max_refresh_every"], group["refresh_every"]
        if longest is not None and longest < gap:
            raise ValueError(
                f"q_galore: max_refresh_every {longest} is below refresh_every {gap}, the gap to begin with. "
                "Raise it, or leave it out."
            )
        rule = GaLore.rule(group, shape)
        if not (group["lazy"] and isinstance(rule, LowRank)):
            return rule
        lazy = Lazy(
            first=Every(gap, group["stagger"]),
            threshold=group["similarity_threshold"],
            growth=group["growth"],
            longest_gap=LONGEST_GAP * gap if longest is None else longest,
            window=group["similarity_window"],
        )
        return dataclasses.replace(rule, refresh_every=lazy)

    remark = GaLore.remark
