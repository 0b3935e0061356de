"""A step's temporary memory is bounded, whatever the size of the parameter."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from tests.optim.cases import LOW_BIT, case_id, make, takes_storage
from tests.optim.live_bytes import PeakOfNewBytes

MIB = 1 << 20
WHITENED = {"swan": 4, "muon": 3}
"""Float32 matrices of the smaller side squared that are held beside tiles."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        (name, settings)
        for name in OPTIMIZERS
        if name not in WHITENED
        for settings in ({}, {"storage": LOW_BIT})
        if not settings or takes_storage((name, {}))
    ],
    ids=case_id,
)
def test_a_step_of_a_4096_by_11008_matrix_needs_at_most_64_mib(case, dtype):
    """First step (state made, basis fitted) and a steady one; the float32 matrix alone would be 172 MiB."""
    param = torch.nn.Parameter(torch.zeros(4096, 11008, dtype=dtype))
    optimizer = make(case, [param], lr=1e-3)
    param.grad = torch.ones_like(param)
    param.grad[::7, ::3] = -1.0
    param.grad[::5, ::11] = 0.25
    with PeakOfNewBytes() as first:
        optimizer.step()
    with PeakOfNewBytes() as steady:
        optimizer.step()
    assert first.peak - optimizer.state_bytes() <= 64 * MIB
    assert steady.peak <= 64 * MIB
    assert param.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4096, 11008), torch.bfloat16), ((11008, 4096), torch.float32)], ids=str
)
@pytest.mark.parametrize("name", WHITENED)
def test_whitening_adds_matrices_of_the_smaller_side_and_none_of_the_weights_shape(name, shape, dtype):
    """On tensors without values: its products of 4096^3 would take minutes."""
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = optimizer_class(name)([param], lr=1e-3)
        for _ in range(2):
            param.grad = torch.ones_like(param)
            with PeakOfNewBytes() as seen:
                optimizer.step()
    assert seen.peak <= (WHITENED[name] * 64 + 9) * MIB


def test_the_tracker_sees_a_whole_copy():
    """The count above could fail: torch's own loop makes copies of the parameter's size."""
    param = torch.nn.Parameter(torch.zeros(4096, 11008))
    param.grad = torch.ones_like(param)
    optimizer = torch.optim.AdamW([param], foreach=False)
    optimizer.step()
    with PeakOfNewBytes() as steady:
        optimizer.step()
    assert steady.peak >= 172 * MIB
