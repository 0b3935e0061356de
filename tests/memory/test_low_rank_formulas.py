"""What an update between two refreshes holds, by formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.memory import low_rank_formulas, step_formulas, update_tiles
from lowmem.numerics import tiles
from lowmem.optim.registry import optimizer_class
from tests.optim.cases import LOW_BIT
from tests.optim.live_bytes import PeakOfNewBytes

NAMES = ["galore", "fira", "apollo", "dct_adamw"]
SETTINGS = [
    {},
    {"rounding": "nearest"},
    {"storage": {"moment": "fp32", "basis": "fp32"}},
    {"storage": LOW_BIT},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(96, 640), (640, 96)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_between_two_refreshes_holds_what_the_formula_says(name, shape, dtype, monkeypatch):
    for module in (tiles, update_tiles):
        monkeypatch.setattr(module, "TILE_NUMEL", 1 << 14)
        monkeypatch.setattr(module, "CODED_NUMEL", 1 << 12)
    monkeypatch.setattr(low_rank_formulas, "refresh_bytes", lambda *args: 0)
    for settings in SETTINGS:
        settings = {"rank": 64, **settings}
        param = nn.Parameter(torch.randn(shape).to(dtype))
        param.grad = torch.randn(shape).to(dtype)
        optimizer = optimizer_class(name)([param], **settings)
        optimizer.step()
        with PeakOfNewBytes() as seen:
            optimizer.step()
        expected = step_formulas.update_bytes(name, settings, shape, dtype.itemsize, on_cuda=False)
        assert seen.peak == pytest.approx(expected, rel=0.03, abs=2048), settings
