"""Rows of a matrix of state are read and kept in every format, also where they cut a block of codes."""

from __future__ import annotations

import pytest
import torch

from lowmem.optim.rule import Slot
from lowmem.optim.storage import LoadedState, codec_for

SHAPE = (3, 10, 14)  # 140 values a matrix, so that blocks of 256 lie across matrices


def state_of(chosen: str, values: torch.Tensor) -> LoadedState:
    slot = Slot(SHAPE)
    codec = codec_for("m", slot, {"moment": chosen}, torch.float32)
    state = LoadedState(codec.allocate(torch.device("cpu")), {"m": codec}, {"m": slot}, slice(None))
    state.save_({"m": values}, None)
    return state


@pytest.mark.parametrize("chosen", ["fp32", "bf16", "int8"])
def test_rows_are_those_of_the_whole(chosen):
    state = state_of(chosen, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    for index in range(3):
        for rows in (slice(0, 10), slice(3, 7), slice(9, 10)):
            assert torch.equal(state.rows("m", index, rows), state["m"][index, rows])


@pytest.mark.parametrize("chosen", ["fp32", "bf16", "int8"])
def test_saved_rows_change_and_the_others_do_not(chosen):
    """Of one size, so that the scale of a block of codes stays and its other values have the same codes again."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).clamp_(-1, 1)
    values[..., 0] = 1.0
    state = state_of(chosen, values)
    before = state["m"].clone()
    state.save_rows_("m", 1, slice(4, 6), torch.full((2, 14), -0.25))
    after = state["m"]
    torch.testing.assert_close(after[1, 4:6], torch.full((2, 14), -0.25), rtol=0.02, atol=0)
    after[1, 4:6] = before[1, 4:6]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
