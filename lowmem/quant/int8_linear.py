"""A linear layer whose weight is int8 and is trained in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowmem.numerics.int8_groups import dequantize_rows
from lowmem.quant.int8_weight import GROUP, Int8Module, Int8Weight

PRODUCT_TILE_NUMEL = 1 << 22
"""Values of the weight that are float at one time in a product: 16 MiB, and 8 more in bfloat16."""


class Int8Linear(Int8Module):
    """y = x W^T + b with W in int8: no float copy of the weight, and no `.grad` of it.

        forward    y[:, I] <- x dequantize(W[I])^T + b[I]       row tiles I of a few million values
        backward   dx[:, J] <- dy dequantize(W[:, J])           column tiles J, with the weight of the forward pass
                   dW <- dy^T x                                 handed to whoever trains the handle

    dW is a tensor of the handle's dtype that lives until the optimizer has used it: within the backward pass in
    `fused` and `project`, until the step in `plain`. Hooks on `weight` run when it is complete, also for a weight
    that is used several times. The input gradient comes first, so an update within backward cannot change it.

    W: (out_features, in_features). Weights take 1 + 4 / 256 bytes a value, where the authors of Q-GaLore keep
    asymmetric codes: here zero is always a code, also in groups of one sign.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = GROUP,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            out_features,
            in_features,
            group_size=group_size,
            scale_dtype=scale_dtype,
            dtype=dtype,
            device=device,
        )
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, group_size: int = GROUP, scale_dtype: torch.dtype = torch.float32
    ) -> Int8Linear:
        """The same layer with its weight quantised to nearest; the bias is taken over as it is."""
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group_size=group_size,
            scale_dtype=scale_dtype,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        made.bias = linear.bias
        made.weight.requires_grad_(linear.weight.requires_grad)
        made.quantize_(linear.weight.detach())
        return made

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, group_size={self.group_size}"


@torch.compiler.disable
def int8_linear(x: Tensor, handle: nn.Parameter, bias: Tensor | None) -> Tensor:
    """x W^T + b for the int8 weight that `handle` stands for; x: (..., columns), the result (..., rows)."""
    product: Tensor = _Int8Product.apply(x, handle, bias, handle.held_weight)  # type: ignore[attr-defined]
    return product


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor, bias: Tensor | None, held: Int8Weight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.held, ctx.version = held, held.module.weight_codes._version
        y = product_by_row_tiles(x, held)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        held: Int8Weight = ctx.held
        if held.module.weight_codes._version != ctx.version:
            raise RuntimeError(
                "an int8 weight was changed between a forward pass and its backward pass. With gradients that are used "
                "inside backward, a graph can be gone through once."
            )
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        dx = product_by_column_tiles(dy, held).to(x.dtype) if needs_dx else None
        db = flat.sum(0) if needs_db else None
        if not needs_dw:
            return dx, None, db, None
        held.add_grad_(flat.mT @ x.reshape(-1, x.shape[-1]).to(dy.dtype))
        return dx, dy.new_zeros(0), db, None


def product_by_row_tiles(x: Tensor, held: Int8Weight) -> Tensor:
    """x W^T, (..., columns) -> (..., rows)."""
    flat = x.reshape(-1, x.shape[-1])
    y = flat.new_empty(flat.shape[0], held.shape[0])
    step = max(1, PRODUCT_TILE_NUMEL // max(1, held.shape[1]))
    for start in range(0, held.shape[0], step):
        rows = slice(start, start + step)
        torch.mm(flat, held.load_rows(rows).to(x.dtype).mT, out=y[:, rows])
    return y.view(*x.shape[:-1], held.shape[0])


def product_by_column_tiles(dy: Tensor, held: Int8Weight) -> Tensor:
    """dy W, (..., rows) -> (..., columns). By columns, so that no sum over tiles is rounded in between."""
    module, flat = held.module, dy.reshape(-1, dy.shape[-1])
    rows, columns = held.shape
    group = module.group_size
    dx = flat.new_empty(flat.shape[0], columns)
    step = max(group, PRODUCT_TILE_NUMEL // max(1, rows) // group * group)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        scales = module.weight_scales[:, start // group : -(-stop // group)]
        tile = dequantize_rows(module.weight_codes[:, start:stop].contiguous(), scales, group)
        torch.mm(flat, tile.to(dy.dtype), out=dx[:, start:stop])
    return dx.view(*dy.shape[:-1], columns)
