"""Int8 codes of moments: the nearest ones, unbiased when drawn, and never 0 for a positive second moment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.numerics import tiles
from lowmem.numerics.int8_blocks import BLOCK, blocks_in, dequantize_blocks, quantize_blocks_
from tests.reference import quantize as reference

LENGTHS = st.one_of(st.integers(1, 5), st.integers(250, 260), st.integers(500, 1100))
SIZES = st.sampled_from([1e-30, 1e-12, 1.0, 1e30])
KINDS = {torch.int8: reference.MOMENTS, torch.uint8: reference.VARIANCES}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["moment", "variance"])


def drawn(numel, seed, size=1.0, kind=torch.int8, spread=3.0):
    """Values over several powers of ten, so that a block has small ones beside large ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    values *= 10 ** (-spread * torch.rand(numel, generator=generator)) * size
    return values if kind == torch.int8 else values.abs()


def coded(values, kind, seed=None):
    codes, scales = torch.zeros(values.numel(), dtype=kind), torch.zeros(blocks_in(values.numel()))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    quantize_blocks_(values, codes, scales, generator)
    return codes, scales


def round_trip(values, kind, seed=None):
    return dequantize_blocks(*coded(values, kind, seed))


@each_kind
@settings(max_examples=60, deadline=None)
@given(numel=LENGTHS, size=SIZES, seed=st.integers(0, 99))
def test_every_value_takes_the_nearest_code_of_its_block(kind, numel, size, seed):
    values = drawn(numel, seed, size, kind)
    expected = reference.nearest(values, KINDS[kind], BLOCK, positive_stays=kind == torch.uint8)
    below, above = reference.neighbours(values, KINDS[kind], BLOCK)
    # One that lies half way between two codes may take either.
    tolerance = torch.where(
        (values.abs() - (below + above) / 2).abs() < 1e-4 * (above - below), above - below, 2e-6 * above
    )
    found = round_trip(values, kind)
    assert found.isfinite().all()
    assert ((found - expected).abs() <= tolerance).all()


@each_kind
@settings(max_examples=40, deadline=None)
@given(numel=LENGTHS, size=SIZES, seed=st.integers(0, 99))
def test_a_drawn_code_is_one_of_the_two_around_the_value(kind, numel, size, seed):
    values = drawn(numel, seed, size, kind)
    below, above = reference.neighbours(values, KINDS[kind], BLOCK)
    found = round_trip(values, kind, seed).double()
    distance = torch.minimum((found.abs() - below).abs(), (found.abs() - above).abs())
    assert (distance <= 1e-5 * above).all()
    assert ((found == 0) | (found.sign() == values.sign())).all()


@each_kind
def test_the_mean_of_drawn_codes_is_the_value(kind):
    """Ten values in one block beside its largest, each drawn 20,000 times; four standard errors are allowed."""
    values = drawn(BLOCK, 5, kind=kind)
    values[:10] = torch.tensor(
        [3e-9 if kind == torch.uint8 else 1e-5, 1e-4, 3e-4, 1e-3, 5e-3, 0.01, 0.03, 0.1, 0.3, 0.9]
    )
    values[10] = 1.0
    values.clamp_(-1, 1)
    count = 20_000
    found = round_trip(values.repeat(count), kind, seed=1).view(count, BLOCK)[:, :10].double()
    below, above = (each[:10] for each in reference.neighbours(values, KINDS[kind], BLOCK))
    error = (found.mean(0) - values[:10].double()).abs()
    assert (error <= 4 * (above - below) / 2 / count**0.5).all()
    assert (found.std(0) > 0).all()


@settings(max_examples=40, deadline=None)
@given(numel=LENGTHS, size=SIZES, spread=st.sampled_from([1.0, 12.0, 30.0]), seeds=st.integers(0, 99))
def test_a_positive_second_moment_is_never_zero(numel, size, spread, seeds):
    values = drawn(numel, seeds, size, torch.uint8, spread)
    values[::3] = 0.0
    for seed in (None, seeds):
        codes, _ = coded(values, torch.uint8, seed)
        assert torch.equal(codes == 0, values == 0)


@each_kind
@settings(max_examples=20, deadline=None)
@given(numel=LENGTHS, size=SIZES, seed=st.integers(0, 99))
def test_zeros_stay_zeros_and_the_largest_of_a_block_stays_itself(kind, numel, size, seed):
    values = drawn(numel, seed, size, kind)
    values[::2] = 0.0
    found = round_trip(values, kind, seed)
    assert not found[::2].any()
    for start in range(0, numel, BLOCK):
        part = slice(start, start + BLOCK)
        largest = values[part].abs().argmax()
        assert found[part][largest] == values[part][largest]
    zeros = torch.zeros(numel)
    assert torch.equal(round_trip(zeros, kind, seed), zeros)


@each_kind
def test_memory_of_zeros_stands_for_zeros(kind):
    assert not dequantize_blocks(torch.zeros(300, dtype=kind), torch.zeros(2)).any()


@each_kind
def test_slices_at_block_borders_give_what_the_whole_gives(kind, monkeypatch):
    values = drawn(3 * BLOCK + 40, 1, kind=kind)
    whole = coded(values, kind)
    monkeypatch.setattr(tiles, "CODED_NUMEL", BLOCK)
    codes, scales = torch.zeros_like(whole[0]), torch.zeros_like(whole[1])
    quantize_blocks_(values[: 2 * BLOCK], codes[: 2 * BLOCK], scales[:2], None)
    quantize_blocks_(values[2 * BLOCK :], codes[2 * BLOCK :], scales[2:], None)
    assert torch.equal(codes, whole[0])
    assert torch.equal(scales, whole[1])
    assert torch.equal(dequantize_blocks(codes, scales), dequantize_blocks(*whole))


@each_kind
def test_a_block_with_a_nan_is_nan_and_the_others_are_not(kind):
    values = drawn(2 * BLOCK, 1, kind=kind)
    values[3] = float("nan")
    found = round_trip(values, kind)
    assert found[:BLOCK].isnan().all()
    assert found[BLOCK:].isfinite().all()


@each_kind
def test_meta_tensors_are_coded_without_memory(kind):
    codes, scales = torch.zeros(700, dtype=kind, device="meta"), torch.zeros(3, device="meta")
    quantize_blocks_(torch.zeros(700, device="meta"), codes, scales, torch.Generator())
    assert dequantize_blocks(codes, scales).shape == (700,)
