"""A direction made a block of rows at a time is written like the whole one, without the memory of it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowmem.numerics import tiles
from lowmem.optim.rule import RowBlocks
from lowmem.optim.writeback import write_
from tests.optim.live_bytes import PeakOfNewBytes

MIB = 1 << 20


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks_of(direction: torch.Tensor, asked: list | None = None) -> RowBlocks:
    matrices = direction if direction.dim() == 3 else direction[None]

    def of(index: int, rows: slice) -> torch.Tensor:
        if asked is not None:
            asked.append((index, rows.start, rows.stop))
        return matrices[index][rows]

    return RowBlocks(of)


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    tile=st.integers(1, 40),
    transposed=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
def test_blocks_write_what_the_whole_direction_writes(shape, dtype, tile, transposed, weight_decay):
    start = torch.randn(*shape, generator=seeded(0)).to(dtype)
    direction = torch.randn(*shape, generator=seeded(1), dtype=torch.float32)
    whole, piecewise = start.clone(), start.mT.contiguous().mT if transposed else start.clone()
    how = {"lr": 0.3, "weight_decay": weight_decay, "generator": None}
    write_(whole, direction, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_NUMEL", tile)
        write_(piecewise, blocks_of(direction), **how)
    assert torch.equal(whole, piecewise)


def test_every_row_is_asked_for_once_and_in_order(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_NUMEL", 10)
    asked: list = []
    write_(
        torch.zeros(2, 5, 4), blocks_of(torch.ones(2, 5, 4), asked), lr=1.0, weight_decay=0, generator=None
    )
    assert asked == [(index, *rows) for index in (0, 1) for rows in ((0, 2), (2, 4), (4, 5))]


def test_bfloat16_is_rounded_stochastically_without_a_drift():
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    step = 2.0**-7 / 50  # 0.02 of the last place: to nearest, nothing would ever happen
    for seed in range(20):
        direction = blocks_of(torch.full((256, 256), -step))
        write_(weight, direction, lr=1.0, weight_decay=0, generator=seeded(seed))
    moved = (weight.float() - 1).mean().item()
    standard_error = (20 * 2.0**-7 * step / weight.numel()) ** 0.5
    assert abs(moved - 20 * step) < 4 * standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_the_weights_size_is_made(dtype):
    weight, grad = (torch.zeros(4096, 11008, dtype=dtype) for _ in range(2))
    direction = RowBlocks(lambda index, rows: grad[rows].float() * 2)
    with PeakOfNewBytes() as seen:
        write_(weight, direction, lr=1.0, weight_decay=0.1, generator=seeded(0))
    assert seen.peak <= 34 * MIB, "four float32 tiles of 8 MiB, and what is between"
