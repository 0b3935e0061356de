"""What the update of a matrix holds that is split along a subspace, by formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.memory import low_rank_split_formulas, step_formulas, update_tiles
from lowmem.memory.state_formulas import state_bytes
from lowmem.numerics import tiles
from lowmem.optim import FRUGAL
from tests.optim.cases import LOW_BIT
from tests.optim.live_bytes import PeakOfNewBytes

PROJECTIONS = ["subspace", "svd", "random", "dct"]
SETTINGS = [
    {},
    {"rounding": "nearest"},
    {"storage": {"moment": "fp32", "basis": "fp32"}},
    {"storage": LOW_BIT},
    {"inner": "lion"},
    {"inner": "momentum"},
    {"inner": "sign", "residual": "sgd"},
    {"residual": "none"},
    {"projection": "dct"},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module in (tiles, update_tiles):
        monkeypatch.setattr(module, "TILE_NUMEL", 1 << 14)
        monkeypatch.setattr(module, "CODED_NUMEL", 1 << 12)


def stepped(settings, shape, dtype) -> int:
    """The bytes that a second step holds beside what was there before it."""
    param = nn.Parameter(torch.randn(shape).to(dtype))
    param.grad = torch.randn(shape).to(dtype)
    optimizer = FRUGAL([param], **settings)
    optimizer.step()
    with PeakOfNewBytes() as seen:
        optimizer.step()
    return seen.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(96, 640), (640, 96)], ids=str)
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_a_step_between_two_refreshes_holds_what_the_formula_says(changes, shape, dtype, monkeypatch):
    monkeypatch.setattr(low_rank_split_formulas, "refresh_bytes", lambda *args: 0)
    settings = {"projection": "subspace", "density": 0.6, **changes}
    expected = step_formulas.update_bytes("frugal", settings, shape, dtype.itemsize, on_cuda=False)
    assert stepped(settings, shape, dtype) == pytest.approx(expected, rel=0.03, abs=2048)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_step_with_a_refresh_holds_what_the_formula_says(dtype, projection):
    settings = {"projection": projection, "density": 0.6, "refresh_every": 1}
    shape = (96, 640)
    expected = step_formulas.update_bytes("frugal", settings, shape, dtype.itemsize, on_cuda=False)
    assert stepped(settings, shape, dtype) == pytest.approx(expected, rel=0.05, abs=4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (33, 130), (130, 33), (3, 40, 24), (5, 24, 40), (300,)], ids=str)
@pytest.mark.parametrize("inner", ["adam", "lion", "momentum", "sign"])
def test_the_state_is_what_the_optimizer_declares(inner, shape, dtype):
    for density in (0.001, 0.3, 0.999):
        for storage in (None, LOW_BIT, {"basis": "fp32"}):
            for projection in ("random", "dct"):
                settings = {"projection": projection, "density": density, "inner": inner, "storage": storage}
                param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
                declared = FRUGAL([param], **settings).state_bytes()
                assert state_bytes("frugal", settings, shape, dtype.itemsize) == declared
