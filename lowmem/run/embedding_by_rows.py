"""An embedding whose gradient can be made by rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowmem.numerics.row_gradients import EmbeddingRows, RowTaker, open_taker


class EmbeddingByRows(nn.Embedding):
    """An nn.Embedding that leaves tokens and output gradients with its weight's taker while that is open.

    A gradient of vocabulary x width is then never made, where nn.Embedding makes one of mostly zeros. A model's own
    embedding becomes one by a change of its class, and back.
    """

    gives_rows = True

    def forward(self, input: Tensor) -> Tensor:
        taker = open_taker(self.weight)
        if taker is None:
            return super().forward(input)
        looked_up: Tensor = _LookUp.apply(
            input, taker.expect(), self.weight.detach(), taker, self.padding_idx
        )
        return looked_up


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, in_graph: Tensor, weight: Tensor, taker: RowTaker, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.taker, ctx.padding_idx, ctx.rows = taker, padding_idx, weight.shape[0]
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.taker.parts.append(EmbeddingRows(ids, dy, ctx.rows, ctx.padding_idx))
        return None, dy.new_zeros(0), None, None, None


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether the class of `module` may be changed to EmbeddingByRows."""
    return type(module) is nn.Embedding and not (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    )
