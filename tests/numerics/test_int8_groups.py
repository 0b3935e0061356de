"""Int8 codes with one scale a group: exact where they can be, within half a step elsewhere, unbiased when trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.numerics.int8_groups import dequantize_rows, groups_in, quantize_rows
from tests.reference import int8_weights as reference

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 41))
GROUPS = st.sampled_from([1, 2, 7, 16, 256])


def matrix(shape, seed, size=1.0, sign=None):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    return w.abs() * sign if sign else w


@settings(max_examples=80, deadline=None)
@given(
    SHAPES,
    GROUPS,
    st.integers(0, 99),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.sampled_from([None, 1, -1]),
)
def test_every_value_is_within_half_a_step_of_its_group(shape, group, seed, size, sign):
    w = matrix(shape, seed, size, sign)
    codes, scales = quantize_rows(w.clone(), group)
    assert codes.dtype == torch.int8
    assert scales.shape == (shape[0], groups_in(shape[1], group))
    step = scales.double().repeat_interleave(group, dim=1)[:, : shape[1]]
    assert ((dequantize_rows(codes, scales, group).double() - w.double()).abs() <= 0.5001 * step).all()


@settings(max_examples=40, deadline=None)
@given(SHAPES, GROUPS, st.integers(0, 99))
def test_codes_are_those_of_the_float64_reference(shape, group, seed):
    w = matrix(shape, seed)
    codes, scales = quantize_rows(w.clone(), group)
    expected, expected_scales = reference.quantized(w, group)
    assert torch.allclose(scales.double(), expected_scales, rtol=1e-6)
    # A value half way between two codes may go either way.
    assert ((codes.double() - expected).abs() <= 1).all()
    assert (codes.double() != expected).double().mean() <= 0.05


@settings(max_examples=40, deadline=None)
@given(SHAPES, GROUPS, st.integers(0, 99))
def test_what_is_on_the_grid_stays_there(shape, group, seed):
    w = dequantize_rows(*quantize_rows(matrix(shape, seed), group), group)
    again = dequantize_rows(*quantize_rows(w.clone(), group), group)
    assert torch.allclose(again, w, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(SHAPES, GROUPS, st.integers(0, 99), st.booleans())
def test_the_largest_value_of_a_group_keeps_its_size_also_with_bf16_scales(shape, group, seed, stochastic):
    w = matrix(shape, seed)
    generator = torch.Generator().manual_seed(seed) if stochastic else None
    codes, scales = quantize_rows(w.clone(), group, torch.bfloat16, generator)
    error = (dequantize_rows(codes, scales, group) - w).abs()
    step = scales.float().repeat_interleave(group, dim=1)[:, : shape[1]]
    assert (error <= 1.001 * step).all(), "a code beyond 127 was cut off"


@given(SHAPES, GROUPS)
@settings(max_examples=20, deadline=None)
def test_zeros_stay_zeros_whatever_is_beside_them(shape, group):
    w = torch.full(shape, 3.0)
    w[:, ::2] = 0.0
    codes, scales = quantize_rows(w.clone(), group, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dequantize_rows(codes, scales, group)[:, ::2], torch.zeros_like(w[:, ::2]))
    codes, scales = quantize_rows(torch.zeros(shape), group)
    assert not codes.any()
    assert torch.equal(dequantize_rows(codes, scales, group), torch.zeros(shape))


def test_a_group_of_one_sign_is_kept():
    """With a zero point cut off at the codes' end, values of [1, 1.1] would be lost."""
    w = 1 + 0.1 * torch.rand(4, 256, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_rows(w.clone(), 256)
    assert (dequantize_rows(codes, scales, 256) - w).abs().max() <= 1.1 / 127 / 2 * 1.001


def test_what_is_not_a_number_stays_visible():
    w = torch.ones(2, 8)
    w[1, 3] = float("nan")
    codes, scales = quantize_rows(w, 4)
    assert dequantize_rows(codes, scales, 4)[1, :4].isnan().all()
    assert dequantize_rows(codes, scales, 4)[0].isfinite().all()


def drift(stochastic: bool, step: float = 0.02, updates: int = 1000) -> float:
    """What part of `updates` equal updates of `step` codes each is realised."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 512, generator=generator) * 0.02
    codes, scales = quantize_rows(w, 256)
    start = dequantize_rows(codes, scales, 256)
    signs = torch.where(torch.rand(w.shape, generator=generator) < 0.5, -1.0, 1.0)
    update = scales.repeat_interleave(256, dim=1) * step * signs
    for _ in range(updates):
        w = dequantize_rows(codes, scales, 256).add_(update)
        codes, scales = quantize_rows(w, 256, generator=generator if stochastic else None)
    moved = dequantize_rows(codes, scales, 256) - start
    return ((moved * update).sum() / (updates * update.square().sum())).item()


def test_updates_of_a_fiftieth_of_a_code_add_up():
    assert drift(stochastic=True) == pytest.approx(1.0, abs=0.01)


def test_rounding_to_nearest_loses_them():
    assert drift(stochastic=False) < 0.1
