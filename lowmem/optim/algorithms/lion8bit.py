"""bitsandbytes' 8-bit Lion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.library_codes import refuse_without_bitsandbytes
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.bitsandbytes_blockwise import BlockwiseLion
from lowmem.optim.rules.lion import Lion
from lowmem.optim.settings import LearningRate, Range, Rounding, Seed, WeightDecay


class Lion8bit(LowMemOptimizer):
    """Lion whose mean is bitsandbytes' 8-bit codes, through the library's own kernel.

        m <- Lion's mean, read from its codes and kept as the nearest ones
        W <- W - lr (sign(beta1 m + (1 - beta1) G) + weight_decay W)

    What it saves: of 8 bytes of Adam's float32 moments a value 1.02 remain: a code, and a float32 scale for every 256
    values. Parameters of fewer than `min_8bit_size` values keep a float32 mean. Every entry moves by the learning rate
    at each step, so that takes a rate some times smaller than AdamW's.

    The library's users keep embeddings in 32 bits; here `fallback` and `head` say so, as with `adamw8bit`.

    Needs bitsandbytes (`pip install 'bitsandbytes>=0.50'`).

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2; codes of
    Dettmers et al., arXiv:2110.02861, by the authors' library, whose defaults these are. Differs from its Lion8bit as
    `adamw8bit` does from its AdamW8bit.
    """

    algorithm = "lion8bit"
    formats: ClassVar[Mapping[str, str]] = {"moment": "fp32"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        betas: Annotated[
            tuple[float, float],
            Range(at_least=0, below=1),
            "share of the mean in the sign that is taken, and decay of the mean",
        ] = (0.9, 0.99),
        weight_decay: WeightDecay = 0.0,
        min_8bit_size: Annotated[
            int, Range(at_least=1), "parameters of fewer values keep their mean in float32"
        ] = 4096,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def settle_groups(groups: list[dict[str, Any]]) -> None:
        refuse_without_bitsandbytes(
            Lion8bit.algorithm, instead="frugal with density 1.0, inner lion and storage {moment: int8}"
        )

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        betas = tuple(group["betas"])
        if math.prod(shape) < group["min_8bit_size"]:
            return Lion(betas=betas)
        return BlockwiseLion(betas=betas)
