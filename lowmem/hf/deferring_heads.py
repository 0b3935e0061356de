"""Output embeddings that answer with logits which are not computed yet, one class for each kind of weight.

A model's own head becomes one by `use_chunked_loss`, which changes its class, and back by `use_plain_loss`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowmem.hf.deferred_logits import DeferredLogits
from lowmem.hf.tiled_cross_entropy import TILE_BYTES
from lowmem.quant.int8_embedding import Int8TiedLinear
from lowmem.quant.int8_linear import Int8Linear


class Deferring(nn.Module):
    """Answers with DeferredLogits in training mode with gradients on, and always while `defers_always`."""

    plain: ClassVar[type[nn.Module]]
    """The class that it was before."""
    gives_rows: ClassVar[bool] = True
    """The chunked loss leaves the gradient of the weight with a `RowTaker` where there is one."""
    tile_bytes: int = TILE_BYTES
    defers_always: bool = False
    materialised_by: str | None = None
    weight: Any
    bias: Any
    out_features: int

    def forward(self, input: Tensor) -> Tensor:
        if self.defers_always or (self.training and torch.is_grad_enabled()):
            return DeferredLogits(input, self)  # type: ignore[return-value]
        return self.logits(input)

    def logits(self, hidden: Tensor) -> Tensor:
        """The real ones, (..., V)."""
        logits: Tensor = self.plain.forward(self, hidden)
        return logits

    def stop_deferring(self) -> None:
        """Be what it was before again."""
        for name in ("tile_bytes", "defers_always", "materialised_by"):
            self.__dict__.pop(name, None)
        self.__class__ = self.plain  # type: ignore[assignment]


class DeferringHead(Deferring, nn.Linear):
    plain = nn.Linear


class DeferringInt8Head(Deferring, Int8Linear):
    plain = Int8Linear


class DeferringInt8TiedHead(Deferring, Int8TiedLinear):
    plain = Int8TiedLinear


DEFERRING: dict[type[nn.Module], type[Deferring]] = {
    each.plain: each for each in (DeferringHead, DeferringInt8Head, DeferringInt8TiedHead)
}
"""What a head of each class becomes."""
