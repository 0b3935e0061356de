"""bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.library_codes import refuse_without_bitsandbytes
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.bitsandbytes_blockwise import BlockwiseAdam
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, WeightDecay


class AdamW8bit(LowMemOptimizer):
    """AdamW whose moments are bitsandbytes' 8-bit codes, through the library's own kernel.

        m, v <- Adam's moments, read from their codes and kept as the nearest ones
        W <- W - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay W)

    What it saves: of 8 bytes of float32 moments a value 2.03 remain: two codes, and two float32 scales for every 256
    values. Parameters of fewer than `min_8bit_size` values keep float32 moments and take `adamw`'s own step, which is
    the library's for them.

    The library's users keep embeddings in 32 bits (its StableEmbedding); here `fallback` and `head` say so:
    `fallback={"name": "adamw", "storage": {"moment": "fp32", "variance": "fp32"}}` for all but the linear layers.

    Needs bitsandbytes (`pip install 'bitsandbytes>=0.50'`). `adamw` with `storage={"moment": "int8", "variance":
    "int8"}` takes the same memory, needs no package, and follows Adam in float more closely (its codes are others,
    rounded stochastically); this one is here for its kernel on CUDA, and to compare with.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, by the authors' library;
    defaults are its own. Differs from its AdamW8bit: the kernel makes the direction and lowmem writes the weight, so a
    bfloat16 weight is rounded stochastically unless `rounding="nearest"`, weights may be int8, and every execution and
    way of dividing parameters works; steps are counted in the state, and a loaded state keeps its dtypes. With float32
    weights the two keep the same codes and make the same weights, up to float32's rounding.
    """

    algorithm = "adamw8bit"
    formats: ClassVar[Mapping[str, str]] = {"moment": "fp32", "variance": "fp32"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-3,
        *,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 1e-2,
        min_8bit_size: Annotated[
            int, Range(at_least=1), "parameters of fewer values keep their moments in float32"
        ] = 4096,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def settle_groups(groups: list[dict[str, Any]]) -> None:
        refuse_without_bitsandbytes(
            AdamW8bit.algorithm, instead="adamw with storage {moment: int8, variance: int8}"
        )

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        betas, eps = tuple(group["betas"]), group["eps"]
        if math.prod(shape) < group["min_8bit_size"]:
            return Adam(betas=betas, eps=eps)
        return BlockwiseAdam(betas=betas, eps=eps)
