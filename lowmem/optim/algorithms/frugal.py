"""FRUGAL: a rule with state on a part of the gradient, a rule without on the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.block_switch import BlockSwitch
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.low_rank_split import LowRankSplit
from lowmem.optim.matrices import is_matrix
from lowmem.optim.projections import PROJECTIONS
from lowmem.optim.refresh import Every
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.lion import Lion
from lowmem.optim.rules.momentum import Momentum
from lowmem.optim.rules.stateless import Stateless
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay
from lowmem.optim.split import Split


class FRUGAL(LowMemOptimizer):
    """Adam on some columns of each matrix, the sign of the gradient on the others; every weight moves at every step.

        J <- k = density n of n columns, drawn anew every `refresh_every` steps; moments restart
        U[:, J]     <- Adam(G[:, J])                    moments on (m, k)
        U[:, not J] <- residual_scale sign(G[:, not J])
        W <- W - lr (U + weight_decay W)                                         (m, n)

    What it saves: moments of 2 m k values instead of 2 m n, and no basis. With `density` 0 a matrix has no state
    at all; with 1 it takes the inner rule whole.

    `projection="rows"` takes rows instead. `projection="block"` takes whole tensors: k = density n of the n in a group
    take the inner rule and the others signs, until others have their turn, drawn at random or in an `order`; state is
    freed at the end of a turn. That is cheapest in time, and what the paper pre-trains with. `subspace`, `svd`, `dct`
    and `random` split each gradient G, (m, n) or its transpose with m <= n, along a basis that is fitted or drawn anew
    at every refresh:

        P <- r = density m leading singular vectors of G, nearly or exactly, cosine or random ones    (m, r)
        R <- P^T G;  U <- P Adam(R) + residual_scale sign(G - P R)               moments on (r, n)

    A sign is as long however little P leaves out of G. Columns and blocks need no decomposition and no basis.

    `inner` is the rule with state: Adam, Lion, a running mean of the gradient (`momentum`, decay betas[0]) or, without
    any, its sign. `residual` is the rule for the rest: `sign`, the gradient itself (`sgd`) or nothing (`none`). After a
    restart Adam's bias correction begins anew, which makes its first step as long as one of signs.

    The learning rate is that of AdamW, and the rest moves at `residual_scale` times it: the paper takes 0.1 for
    fine-tuning and 1 for pre-training.

    A parameter that is no matrix takes the inner rule whole, or its turn as a block. Embeddings and above all the
    output head should keep state: `build_optimizer` gives them the `fallback`, and its `groups` another density to
    matrices by name: 1 keeps all their state, 0 none. 3-D parameters are batches of matrices.

    Which layers are split, keep state or have none, as the authors pre-train and fine-tune, in a recipe:

        optimizer: {name: frugal, lr: 1.0e-3, projection: block, order: descending, density: 0.25, residual_scale: 1.0}
        optimizer: {name: frugal, lr: 5.0e-5, target: [q_proj, v_proj], density: 0.0104, refresh_every: 500,
                    fallback: {name: frugal, density: 0.0}, head: {name: adamw}}
        optimizer: {name: frugal, lr: 5.0e-5, groups: [{match: [v_proj], density: 1.0}, {match: [mlp], density: 0.0}]}

    The second one splits queries and values (0.0104 is rank 8 of 768) and leaves all other linear layers, and here the
    embedding, without state; norms and head keep Adam's.

    Source: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
    Training", arXiv:2411.07837, algorithm 1. Differs from the authors' code: columns depend on seed, name and step,
    so that a resumed run and every process have the same; k is rounded and at least 1, where it is cut off; turns of
    blocks are counted by the steps of their group; other parameters count their own, so that one without a gradient
    (an expert that saw no token) is left alone, where the code fails; weight decay uses the weight before the step;
    state may be kept in few bits.
    """

    algorithm = "frugal"
    treats_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        density: Annotated[
            float, Range(at_least=0, at_most=1), "share of each matrix that has state (rho in the paper)"
        ] = 0.25,
        projection: Annotated[
            Literal["columns", "rows", "block", "subspace", "svd", "dct", "random"],
            "what has state: part of each matrix, whole tensors in turn, or a subspace of each gradient",
        ] = "columns",
        order: Annotated[
            Literal["random", "ascending", "descending", "mirror"], "in which blocks take turns"
        ] = "random",
        refresh_every: Annotated[
            int, Range(at_least=1), "steps until other parts have state (T in the paper)"
        ] = 200,
        inner: Annotated[
            Literal["adam", "lion", "momentum", "sign"], "the rule of the part with state"
        ] = "adam",
        residual: Annotated[Literal["sign", "sgd", "none"], "the rule of the rest"] = "sign",
        residual_scale: Annotated[
            float,
            Range(above=0),
            "learning rate of the rest over lr; 0.1 for fine-tuning, 1 for pre-training",
        ] = 0.1,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            density=density,
            projection=projection,
            order=order,
            refresh_every=refresh_every,
            inner=inner,
            residual=residual,
            residual_scale=residual_scale,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def turn_length(group: dict[str, Any]) -> int | None:
        return group["refresh_every"] if _takes_turns(group) else None

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        inner, density = _inner(group), group["density"]
        residual = Stateless(form=group["residual"], scale=group["residual_scale"])
        if _takes_turns(group):
            return BlockSwitch(inner=inner, residual=residual, density=density, order=group["order"])
        if not is_matrix(shape) or density == 1:
            return inner
        if density == 0:
            if residual.form == "none":
                raise ValueError(
                    "frugal: density 0 with residual 'none' would leave matrices as they are. "
                    "Raise density, or set residual to 'sign' or 'sgd'."
                )
            return residual
        if group["projection"] in PROJECTIONS:
            return LowRankSplit(
                inner=inner,
                residual=residual,
                projection=PROJECTIONS[group["projection"]],
                rank=rank_for(density, shape),
                refresh_every=Every(group["refresh_every"]),
                on_refresh="reset",
            )
        return Split(
            inner=inner,
            residual=residual,
            along=group["projection"],
            density=density,
            refresh_every=Every(group["refresh_every"]),
        )


def rank_for(density: float, shape: Shape) -> int:
    """The dimension of the subspace with state, which leaves out at least one direction."""
    side = min(shape[-2:])
    return min(max(1, round(density * side)), side - 1)


def _takes_turns(group: dict[str, Any]) -> bool:
    return group["projection"] == "block" and 0 < group["density"] < 1


def _inner(group: dict[str, Any]) -> Rule:
    betas = tuple(group["betas"])
    if group["inner"] == "adam":
        return Adam(betas=betas, eps=group["eps"])
    if group["inner"] == "lion":
        return Lion(betas=betas)
    if group["inner"] == "momentum":
        return Momentum(momentum=betas[0], dampening=betas[0])
    return Stateless(form="sign")
