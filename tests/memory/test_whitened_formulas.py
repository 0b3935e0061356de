"""What the update of a whitened matrix holds, by formula, where its smaller side squared is larger than a tile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.memory import step_formulas, update_tiles, whitened_formulas, workspaces
from lowmem.numerics import tiles
from lowmem.optim.registry import optimizer_class
from tests.optim.live_bytes import PeakOfNewBytes

CASES = [
    ("swan", {}),
    ("swan", {"whitening": "newton_schulz", "standardize": False}),
    ("swan", {"whitening": "nsds", "rounding": "nearest"}),
    ("swan", {"whitening": "eigh"}),
    ("muon", {}),
    ("muon", {"nesterov": False, "storage": {"moment": "fp32"}}),
    ("muon", {"storage": {"moment": "int8"}}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (40, 2000), (3, 150, 150)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_whitened_matrix_takes_is_foreseen(case, shape, dtype, monkeypatch):
    for module in (tiles, update_tiles):
        monkeypatch.setattr(module, "TILE_NUMEL", 1 << 14)
        monkeypatch.setattr(module, "CODED_NUMEL", 1 << 12)
    name, settings = case
    param = nn.Parameter(torch.randn(shape).to(dtype))
    param.grad = torch.randn(shape).to(dtype)
    optimizer = optimizer_class(name)([param], **settings)
    optimizer.step()
    with PeakOfNewBytes() as seen:
        optimizer.step()
    expected = step_formulas.update_bytes(name, settings, shape, dtype.itemsize, on_cuda=False)
    assert seen.peak == pytest.approx(expected, rel=0.03, abs=4096)


def test_the_workspace_of_an_eigendecomposition_is_the_one_that_simulations_count():
    assert workspaces._COPIES[torch.ops.aten._linalg_eigh.default] == whitened_formulas.EIGH_COPIES
