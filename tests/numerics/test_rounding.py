"""Stochastic rounding is unbiased, exact where it can be, and keeps special values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.numerics.rounding import bf16_stochastic
from lowmem.numerics.seeding import stable_seed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120),
    st.integers(0, 99),
)
def test_the_result_is_one_of_the_two_neighbours(value, seed):
    x = torch.full((8,), value)
    below = (x.view(torch.int32) & -65536).view(torch.float32)
    above = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    rounded = bf16_stochastic(x, generator(seed)).float()
    assert ((rounded == below) | (rounded == above)).all()
    assert (rounded == x).all() or (below != x).all()


@pytest.mark.parametrize("fraction", [0.02, 0.25, 0.9])
def test_updates_far_below_the_last_bit_survive_in_the_mean(fraction):
    """1000 updates of a fraction of the spacing at 1.0 (2^-7) move the mean by their sum; nearest loses small ones."""
    update = fraction * 2.0**-7 / 10
    w = torch.ones(20_000, dtype=torch.bfloat16)
    draw = generator()
    for _ in range(1000):
        w = bf16_stochastic(w.float() + update, draw)
    assert (w.float().mean().item() - 1) == pytest.approx(1000 * update, rel=0.02)


def test_bfloat16_values_infinities_and_nan_are_kept():
    x = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), -float("inf")])
    assert torch.equal(bf16_stochastic(x, generator()).float(), x)
    nans = (
        torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    assert bf16_stochastic(nans, generator()).isnan().all()


def test_seeds_do_not_depend_on_the_process():
    assert stable_seed(0, "layer.weight", 3) == 1895051798992423702
    assert stable_seed(0, "a", 12) != stable_seed(0, "a1", 2)
