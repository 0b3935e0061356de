"""BAdam: Adam on one block of layers at a time, everything else at rest."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from lowmem.optim.block_switch import BlockSwitch
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.layer_blocks import has_layers, layer_blocks
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.rest import Rest
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay

log = logging.getLogger("lowmem")


class BlockAdam(LowMemOptimizer):
    """Adam on one transformer layer for some steps, then on another; all others stay as they are meanwhile.

        every `refresh_every` steps:  another block b is active; its moments and its step count begin with nothing
        W_b <- W_b - lr (Adam(G_b) + weight_decay W_b)          moments on W_b
        W_i <- W_i                                              i != b: no state, no gradient, no decay

    What it saves: moments and gradients of all layers but one, so with D layers 1 / D of Adam's of each. Backward ends
    at the active block: gradients further down are not made, nor what they would need of the forward pass kept.

    A block is a layer, told by the number in its parameters' names (model.layers.7). The embedding and the head are
    blocks of their own (one, where they are tied), and the last norm goes with the last layer. With `others: frozen`
    what is outside of the layers is never trained; with a `fallback` it is trained by that at every step, as are the
    norms inside of layers. `active` blocks have their turn at the same time. Without names, or numbers in them, every
    tensor is a block.

    `order`: `shuffled` goes through all blocks in an order that is drawn anew each time, so that each has its turn
    equally often; `ascending`, `descending` and `mirror` (up and down) keep one.

    Whoever runs the steps stops the gradients: a recipe, `LowMemTrainerMixin` or `lowmem.run.execution`, in plain and
    in fused, over micro-batches, under data parallel training and after a resume. Used by itself, and under FSDP2 and
    ZeRO, the class makes the same updates; the gradients of resting blocks are then made for nothing, and a norm to
    clip by counts them.

    Source: Luo, Yu and Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    arXiv:2404.02827, algorithm 1. Differs from the authors' code: embedding and head have their turns, where they are
    left out by default; a bfloat16 weight has no float32 copy and is rounded stochastically; which blocks are active,
    their moments and their counts are saved, so that a run can be resumed inside a turn.
    """

    algorithm = "block_adam"
    rests = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-5,
        *,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        refresh_every: Annotated[
            int, Range(at_least=1), "steps until another block is active (K in the paper)"
        ] = 100,
        order: Annotated[
            Literal["shuffled", "ascending", "descending", "mirror"], "in which blocks take turns"
        ] = "shuffled",
        active: Annotated[int, Range(at_least=1), "blocks that are active at the same time"] = 1,
        others: Annotated[
            Literal["turns", "frozen"], "what becomes of the embedding, the head and what else is in no layer"
        ] = "turns",
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            refresh_every=refresh_every,
            order=order,
            active=active,
            others=others,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def turn_length(group: dict[str, Any]) -> int | None:
        return group["refresh_every"]

    @staticmethod
    def settle_groups(groups: list[dict[str, Any]]) -> None:
        own = [group for group in groups if group["algorithm"] == BlockAdam.algorithm]
        if has_layers(own):
            return
        if any(group["others"] == "frozen" for group in own):
            raise ValueError(
                "block_adam: others 'frozen' would leave all weights as they are, since no parameter's name has a "
                "layer's number. Give named parameters, as build_optimizer does, or set others to 'turns'."
            )
        if sum(len(group["params"]) for group in own) == 1:
            return
        log.warning(
            "block_adam: no parameter's name has a layer's number, so each tensor has its own turn. "
            "Give model.named_parameters() for one layer a turn."
        )

    @staticmethod
    def blocks(groups: Sequence[dict[str, Any]]) -> list[list[tuple[int, int]]]:
        return layer_blocks(groups, with_others=groups[0]["others"] == "turns")

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        return BlockSwitch(
            inner=Adam(betas=tuple(group["betas"]), eps=group["eps"]),
            residual=Rest(),
            count=group["active"],
            order=group["order"],
        )
