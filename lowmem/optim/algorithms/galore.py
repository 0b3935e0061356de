"""GaLore: Adam in a low-rank subspace of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.low_rank import LowRank
from lowmem.optim.projections import PROJECTIONS
from lowmem.optim.refresh import Every
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class GaLore(LowMemOptimizer):
    """Adam on a rank-r projection of each matrix' gradient; every weight is still trained.

        P <- r leading singular vectors of G      every `refresh_every` steps    (m, r)
        R <- P^T G                                                               (r, n)
        N <- Adam(R)                              moments on (r, n)
        W <- W - lr (scale P N + weight_decay W)                                 (m, n), m <= n

    What it saves: moments of 2 r n and a basis of m r values instead of 2 m n. With `projection="dct"` the basis is r
    vectors of the cosine basis, of which only the numbers are kept; it holds less of a gradient, so refresh it often.

    A parameter that is no matrix, or whose smaller side is not larger than `rank`, is updated by plain
    Adam (said once in the log); so is a group with `rank=None`. 3-D parameters are batches of
    matrices. `scale` multiplies the low-rank step only; with 1.0 the matrices take the same learning
    rate as the rest, which suits fine-tuning, while the paper pre-trains with 0.25 and lr 0.01.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    arXiv:2403.03507, algorithm 2. Differs from the authors' code (galore-torch 1.0): the basis is found
    by a warm-started randomised subspace iteration unless `projection` says otherwise; its signs are canonical;
    eps is added after the bias correction, as in torch and the paper, instead of before; weight decay
    uses the weight before the step; matrices are refreshed in turn and not all in one step (`stagger`),
    which keeps a refresh cheap in time and memory; a basis is kept where a gradient cannot give a new one; all state is
    plain tensors, so a run can be resumed; `on_refresh` can reset or rotate the moments.
    """

    algorithm = "galore"
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
        refresh_every: Annotated[int, Range(at_least=1), "steps between two bases (T in the paper)"] = 200,
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
            refresh_every=refresh_every,
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
        adam = Adam(betas=tuple(group["betas"]), eps=group["eps"])
        if not has_room_for(group["rank"], shape):
            return adam
        return LowRank(
            inner=adam,
            projection=PROJECTIONS[group["projection"]],
            rank=group["rank"],
            refresh_every=Every(group["refresh_every"], group["stagger"]),
            scale=group["scale"],
            on_refresh=group["on_refresh"],
        )

    @staticmethod
    def remark(group: dict[str, Any], shape: Shape) -> str | None:
        if group["rank"] is None or len(shape) < 2 or has_room_for(group["rank"], shape):
            return None
        return f"matrices whose smaller side is not larger than rank {group['rank']} take full-rank Adam"


def has_room_for(rank: int | None, shape: Shape) -> bool:
    """Whether a parameter is a matrix (or a batch of them) whose smaller side exceeds `rank`."""
    return rank is not None and len(shape) in (2, 3) and min(shape[-2:]) > rank
