"""An embedding in int8 that is trained in place, and an output head tied to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowmem.numerics.int8_groups import dequantize_rows
from lowmem.numerics.row_gradients import EmbeddingRows, RowTaker, open_taker
from lowmem.quant.int8_linear import int8_linear
from lowmem.quant.int8_weight import GROUP, Int8Module, Int8Weight


class Int8Embedding(Int8Module):
    """Rows of an int8 matrix by their number; only the rows looked up become float.

    The gradient of the weight is of the handle's dtype. It is dense and handled as `Int8Linear` does, or made by rows
    where whoever trains the handle takes it so.
    """

    gives_rows = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group_size: int = GROUP,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            group_size=group_size,
            scale_dtype=scale_dtype,
            dtype=dtype,
            device=device,
        )
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, group_size: int = GROUP, scale_dtype: torch.dtype = torch.float32
    ) -> Int8Embedding:
        """The same table, quantised to nearest. Raises ValueError for one that renormalises or is sparse."""
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError("an embedding with max_norm, scale_grad_by_freq or sparse cannot be int8")
        made = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            group_size=group_size,
            scale_dtype=scale_dtype,
            dtype=embedding.weight.dtype,
            device=embedding.weight.device,
        )
        made.weight.requires_grad_(embedding.weight.requires_grad)
        made.quantize_(embedding.weight.detach())
        return made

    def forward(self, ids: Tensor) -> Tensor:
        return _look_up(ids, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, group_size={self.group_size}"


class Int8TiedLinear(nn.Module):
    """An output head whose weight is an int8 embedding's: the same codes, the same handle, one gradient."""

    def __init__(self, embedding: Int8Embedding, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight = embedding.weight
        self.bias = bias
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "weight", None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        given = {**state_dict, prefix + "weight": self.weight.detach()}
        super()._load_from_state_dict(given, prefix, metadata, strict, *lists)


@torch.compiler.disable
def _look_up(ids: Tensor, handle: nn.Parameter, padding_idx: int | None) -> Tensor:
    held: Int8Weight = handle.held_weight  # type: ignore[attr-defined]
    looked_up: Tensor = _Int8LookUp.apply(ids, handle, held, padding_idx, open_taker(handle))
    return looked_up


class _Int8LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        handle: Tensor,
        held: Int8Weight,
        padding_idx: int | None,
        taker: RowTaker | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.held, ctx.padding_idx, ctx.taker = held, padding_idx, taker
        module, flat = held.module, ids.reshape(-1)
        rows = dequantize_rows(module.weight_codes[flat], module.weight_scales[flat], module.group_size)
        return rows.to(handle.dtype).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        held: Int8Weight = ctx.held
        if ctx.taker is not None:
            ctx.taker.parts.append(EmbeddingRows(ids, dy, held.shape[0], ctx.padding_idx))
        else:
            padding_idx = -1 if ctx.padding_idx is None else ctx.padding_idx
            held.add_grad_(
                torch.ops.aten.embedding_dense_backward(dy, ids, held.shape[0], padding_idx, False)
            )
        return None, dy.new_zeros(0), None, None, None
