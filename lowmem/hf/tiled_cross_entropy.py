"""Cross-entropy of a linear head, a tile of the vocabulary at a time.

    z_j = functions(x W_j^T + b_j)                       logits of tile j                (T, v)
    lse = log sum_j exp z_j                              kept over all tiles             (T,)
    loss = sum_t lse_t - z[t, label_t]
    dz_j = functions'(...) (exp(z_j - lse) - onehot)     the tile is computed again      (T, v)
    dW_j = dz_j^T x,  db_j = sum_t dz_j,  dx = sum_j dz_j W_j

Only one tile of logits exists at any time. Tiles go over the vocabulary and not over the tokens because
then each row of dW is finished by one matrix product: it is written once, in the weight's own dtype,
and needs no fp32 accumulator of the head's size. With a single tile nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lowmem.numerics.held_weights import held_weight, load_rows, shape_of

Elementwise = Callable[[Tensor], Tensor]

TILE_BYTES = 32 * 2**20
# Narrower tiles waste matrix units; with more than 131072 tokens the tile is allowed to grow instead.
FEWEST_COLUMNS = 64


def columns_per_tile(num_tokens: int, tile_bytes: int) -> int:
    """How many vocabulary columns of fp32 logits for `num_tokens` tokens fit into `tile_bytes`."""
    columns = tile_bytes // (4 * max(num_tokens, 1))
    return max(FEWEST_COLUMNS, columns - columns % FEWEST_COLUMNS)


def tiled_cross_entropy(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H), or the handle of such a weight
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64, each in [0, V)
    *,
    functions: tuple[Elementwise, ...] = (),
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """Cross-entropy of `functions(hidden @ weight.T + bias)` against `labels`, summed over tokens, in nats.

    `functions` act element by element and are applied in order. Products are taken in the dtypes that
    `F.linear` would use, autocast included; what follows the functions is float32 (float64 stays). Without
    tokens the result is 0 and so is every gradient.

    Raises ValueError when a label is outside the vocabulary.
    """
    vocabulary, _ = shape_of(weight)
    if labels.numel():
        lowest, highest = torch.stack([labels.min(), labels.max()]).tolist()
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"label {wrong} is outside the vocabulary: ids go from 0 to {vocabulary - 1}")
    columns = min(columns_per_tile(labels.numel(), tile_bytes), _most_columns(weight), vocabulary)
    tiles = [slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)]
    return _TiledCrossEntropy.apply(hidden, weight, bias, labels, functions, tiles, torch.is_grad_enabled())


def _most_columns(weight: Tensor) -> int:
    """Of a weight in another format only as many rows become float at one time as its own tiles have."""
    held = held_weight(weight)
    if held is None:
        return shape_of(weight)[0]
    rows = next(held.row_slices()).stop
    return max(FEWEST_COLUMNS, rows - rows % FEWEST_COLUMNS)


def autocast_here(device_type: str) -> dict[str, Any]:
    """Arguments of `torch.autocast` that bring back the mixed precision which is on at this moment."""
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        # Tiles of the weight are used once, so a cache of their casts would only hold memory.
        "cache_enabled": False,
    }


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        functions: tuple[Elementwise, ...],
        tiles: list[slice],
        wants_grad: bool,
    ) -> Tensor:
        ctx.autocast = autocast_here(hidden.device.type)
        ctx.functions, ctx.tiles, ctx.hidden_dtype = functions, tiles, hidden.dtype
        # Under autocast every tile would cast the hidden states again.
        x = hidden.to(ctx.autocast["dtype"]) if ctx.autocast["enabled"] else hidden
        keeps_tile = ctx.keeps_tile = wants_grad and len(tiles) == 1

        with torch.autocast(**ctx.autocast):
            log_sum_exp, label_logit, z = _scan(x, weight, bias, labels, functions, tiles, keeps_tile)
            if keeps_tile:
                dz = _logit_grad(z, functions, labels, log_sum_exp, tiles[0], None)
                ctx.save_for_backward(x, weight, bias, dz, None)
            else:
                ctx.save_for_backward(x, weight, bias, labels, log_sum_exp)
        return (log_sum_exp - label_logit).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x, weight, bias, kept, log_sum_exp = ctx.saved_tensors
        dx: Tensor | None = None
        dweight = weight.new_empty(shape_of(weight)) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None

        for tile in ctx.tiles:
            with torch.autocast(**ctx.autocast):
                W = load_rows(weight, tile)
                if ctx.keeps_tile:
                    # In fp32: a scale rounded to bf16 would bend every gradient the same way.
                    dz = (_upcast(kept) * scale).to(kept.dtype)
                else:
                    z = linear(x, W, None if bias is None else bias[tile])
                    dz = _logit_grad(z, ctx.functions, kept, log_sum_exp, tile, scale)
                    del z
            if dweight is not None:
                _store_product_(dweight[tile], dz.T, x)
            if dbias is not None:
                dbias[tile] = dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32))
            if needs_x:
                dx = _add_product_(dx, dz, W.to(dz.dtype), several=len(ctx.tiles) > 1)
        dx = None if dx is None else dx.to(ctx.hidden_dtype)
        if dweight is not None and (held := held_weight(weight)) is not None:
            held.add_grad_(dweight)
            dweight = weight.new_zeros(0)
        return dx, dweight, dbias, None, None, None, None


def _scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    functions: tuple[Elementwise, ...],
    tiles: list[slice],
    keeps_tile: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp and label logit of each token, (T,) each, and the last tile of raw logits, (T, v).

    That tile is destroyed unless `keeps_tile`.
    """
    highest = total = label_logit = torch.empty(0)
    for tile in tiles:
        z = linear(x, load_rows(weight, tile), None if bias is None else bias[tile])
        y = _upcast(_apply(functions, z))
        if tile.start == 0:
            # Not -inf: a tile of nothing but -inf would then give inf - inf.
            highest = y.new_full((y.shape[0],), torch.finfo(y.dtype).min)
            total, label_logit = torch.zeros_like(highest), torch.zeros_like(highest)
        column, is_here = _label_column(labels, tile)
        label_logit += torch.where(is_here, y.gather(1, column).squeeze(1), 0.0)
        before, highest = highest, torch.maximum(highest, y.amax(1))
        total *= torch.exp(before - highest)
        shifted = y - highest[:, None] if keeps_tile else y.sub_(highest[:, None])
        total += shifted.exp_().sum(1)
        del y, shifted
    return total.log_().add_(highest), label_logit, z


def _logit_grad(
    z: Tensor,  # (T, v)  destroyed
    functions: tuple[Elementwise, ...],
    labels: Tensor,
    log_sum_exp: Tensor,
    tile: slice,
    scale: Tensor | None,
) -> Tensor:
    """`scale` times the gradient of the summed loss at one tile of raw logits, (T, v), in their dtype."""
    if functions:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = _upcast(_apply(functions, z))
        dy = (y.detach() - log_sum_exp[:, None]).exp_()
    else:
        dy = _upcast(z).sub_(log_sum_exp[:, None]).exp_()
    column, is_here = _label_column(labels, tile)
    dy.scatter_(1, column, dy.gather(1, column) - is_here[:, None].to(dy.dtype))
    if scale is not None:
        dy *= scale
    if functions:
        return torch.autograd.grad(y, z, dy)[0]
    return dy.to(z.dtype)


def _label_column(labels: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Column (T, 1) of each token's label in this tile, and whether it is in this tile at all, (T,)."""
    is_here = (labels >= tile.start) & (labels < tile.stop)
    return (labels - tile.start).clamp(0, tile.stop - tile.start - 1)[:, None], is_here


def _apply(functions: tuple[Elementwise, ...], z: Tensor) -> Tensor:
    return reduce(lambda y, function: function(y), functions, z)


def _upcast(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32))


def _store_product_(target: Tensor, left: Tensor, right: Tensor) -> None:
    if target.dtype == left.dtype:
        torch.mm(left, right, out=target)
    else:
        target.copy_(left @ right)


def _add_product_(total: Tensor | None, left: Tensor, right: Tensor, *, several: bool) -> Tensor:
    """`total + left @ right`, summed in fp32 when there are several terms."""
    if not several:
        return left @ right
    dtype = torch.promote_types(left.dtype, torch.float32)
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)
