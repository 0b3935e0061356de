"""Cross-entropy of a linear head, a tile of the vocabulary at a time.

    z_j = functions(x W_j^T + b_j)                       logits of tile j                (T, v)
    lse = log sum_j exp z_j                              kept over all tiles             (T,)
    loss = sum_t lse_t - z[t, label_t]
    dz_j = functions'(...) (exp(z_j - lse) - onehot)     the tile is computed again      (T, v)
    dW_j = dz_j^T x,  db_j = sum_t dz_j,  dx = sum_j dz_j W_j

Only one tile of logits exists at any time. Tiles go over the vocabulary and not over the tokens because
then each row of dW is finished by one matrix product: it is written once, in the weight's own dtype,
and needs no fp32 accumulator of the head's size. With a single tile nothing is computed twice.

Where the weight's gradient is taken by rows (`numerics.row_gradients`), dW is not made here but by whoever updates the
weight, when the input gradient is there; then a single tile is computed again as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lowmem.hf.head_rows import HeadRows
from lowmem.hf.logit_tiles import Elementwise, add_product_, logit_grad, scan, store_product_, upcast
from lowmem.numerics.held_weights import held_weight, load_rows, shape_of
from lowmem.numerics.row_gradients import RowTaker, open_taker

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
    taker = open_taker(weight)
    in_graph = weight if taker is None else taker.expect()
    if in_graph is not weight:
        weight = weight.detach()  # an edge to the weight itself would run its hooks
    total: Tensor = _TiledCrossEntropy.apply(
        hidden, in_graph, bias, weight, labels, functions, tiles, torch.is_grad_enabled(), taker
    )
    return total


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
        in_graph: Tensor,  # the weight, or what stands for it in the graph
        bias: Tensor | None,
        weight: Tensor,
        labels: Tensor,
        functions: tuple[Elementwise, ...],
        tiles: list[slice],
        wants_grad: bool,
        taker: RowTaker | None,
    ) -> Tensor:
        ctx.autocast = autocast_here(hidden.device.type)
        ctx.functions, ctx.tiles, ctx.taker, ctx.hidden_dtype = functions, tiles, taker, hidden.dtype
        # Under autocast every tile would cast the hidden states again.
        x = hidden.to(ctx.autocast["dtype"]) if ctx.autocast["enabled"] else hidden
        keeps_tile = ctx.keeps_tile = wants_grad and len(tiles) == 1 and taker is None

        with torch.autocast(**ctx.autocast):
            log_sum_exp, label_logit, z = scan(x, weight, bias, labels, functions, tiles, keeps_tile)
            if keeps_tile:
                dz = logit_grad(z, functions, labels, log_sum_exp, tiles[0], None)
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
        makes_rows = needs_weight and ctx.taker is not None
        dweight = weight.new_empty(shape_of(weight)) if needs_weight and not makes_rows else None
        dbias = torch.empty_like(bias) if needs_bias else None

        for tile in ctx.tiles:
            with torch.autocast(**ctx.autocast):
                W = load_rows(weight, tile)
                if ctx.keeps_tile:
                    # In fp32: a scale rounded to bf16 would bend every gradient the same way.
                    dz = (upcast(kept) * scale).to(kept.dtype)
                else:
                    z = linear(x, W, None if bias is None else bias[tile])
                    dz = logit_grad(z, ctx.functions, kept, log_sum_exp, tile, scale)
                    del z
            if dweight is not None:
                store_product_(dweight[tile], dz.T, x)
            if dbias is not None:
                dbias[tile] = dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32))
            if needs_x:
                dx = add_product_(dx, dz, W.to(dz.dtype), several=len(ctx.tiles) > 1)
        dx = None if dx is None else dx.to(ctx.hidden_dtype)
        if makes_rows:
            rows = HeadRows(
                x, weight, bias, kept, log_sum_exp, scale, functions=ctx.functions, autocast=ctx.autocast
            )
            ctx.taker.parts.append(rows)
            dweight = weight.new_zeros(0)
        elif dweight is not None and (held := held_weight(weight)) is not None:
            held.add_grad_(dweight)
            dweight = weight.new_zeros(0)
        return dx, dweight, dbias, None, None, None, None, None, None
