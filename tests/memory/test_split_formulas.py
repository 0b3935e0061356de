"""What a split matrix' update holds, by formula, where rows have state: how many are in a tile is chance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.memory import step_formulas, update_tiles
from lowmem.numerics import tiles
from lowmem.optim import FRUGAL
from tests.optim.live_bytes import PeakOfNewBytes

LOW_BIT = {"moment": "int8", "variance": "int8"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1000, 64), (400, 160), (3, 300, 96)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"density": 0.9}, {"storage": LOW_BIT}, {"inner": "lion"}], ids=str)
def test_what_chosen_rows_take_is_foreseen_but_for_chance(settings, shape, dtype, monkeypatch):
    for module in (tiles, update_tiles):
        monkeypatch.setattr(module, "TILE_NUMEL", 1 << 14)
        monkeypatch.setattr(module, "CODED_NUMEL", 1 << 12)
    param = nn.Parameter(torch.randn(shape).to(dtype))
    param.grad = torch.randn(shape).to(dtype)
    optimizer = FRUGAL([param], projection="rows", **settings)
    optimizer.step()
    with PeakOfNewBytes() as seen:
        optimizer.step()
    expected = step_formulas.update_bytes(
        "frugal", {"projection": "rows", **settings}, shape, dtype.itemsize, on_cuda=False
    )
    assert seen.peak == pytest.approx(expected, rel=0.15)
