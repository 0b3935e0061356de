"""Two codes a byte: exact to pack, zero always a value, half a step of error, in all lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.numerics import tiles
from lowmem.numerics.int4_groups import (
    GROUP,
    bytes_for,
    dequantize_groups,
    groups_in,
    pack,
    quantize_groups_,
    unpack,
)
from tests.reference import quantize as reference

LENGTHS = st.one_of(st.integers(1, 5), st.integers(125, 131), st.integers(250, 700))
SIZES = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])


def drawn(numel, seed, size=1.0, sign=None):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * size
    return values.abs() * sign if sign else values


def coded(values):
    numel = values.numel()
    packed = torch.zeros(bytes_for(numel), dtype=torch.uint8)
    scales = torch.zeros(groups_in(numel), dtype=torch.bfloat16)
    zeros = torch.zeros(groups_in(numel), dtype=torch.uint8)
    quantize_groups_(values, packed, scales, zeros)
    return packed, scales, zeros


def round_trip(values):
    return dequantize_groups(*coded(values), values.numel())


@pytest.mark.parametrize("numel", [1, 2, 3, 15, 16, 257])
def test_every_code_comes_back_from_its_half_of_a_byte(numel):
    for first in range(16):
        codes = torch.arange(first, first + numel).remainder(16).to(torch.uint8)
        packed = pack(codes)
        assert packed.numel() == -(-numel // 2)
        assert torch.equal(unpack(packed, numel), codes)
    assert pack(torch.tensor([5, 12], dtype=torch.uint8)).tolist() == [5 + 16 * 12]


def test_every_pair_of_codes_has_a_byte_of_its_own():
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).view(-1)
    assert pack(pairs).unique().numel() == 256


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(0, 99), SIZES, st.sampled_from([None, 1, -1]))
def test_every_value_is_within_half_a_step_of_its_group(numel, seed, size, sign):
    values = drawn(numel, seed, size, sign)
    _, steps = reference.four_bits(values, GROUP)
    found = round_trip(values)
    assert found.isfinite().all()
    # A scale in bfloat16 is up to 1/128 larger than the reference's.
    assert ((found.double() - values.double()).abs() <= 0.5 * steps * (1 + 1 / 100)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), SIZES, st.sampled_from([None, 1, -1]))
def test_the_error_is_that_of_the_float64_reference_with_exact_scales(seed, size, sign):
    values = drawn(20 * GROUP + 17, seed, size, sign)
    expected, _ = reference.four_bits(values, GROUP)
    ratio = (round_trip(values).double() - values).norm() / (expected - values).norm()
    assert ratio == pytest.approx(1.0, abs=0.04)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 99), SIZES, st.sampled_from([None, 1, -1]))
def test_zeros_stay_zeros_whatever_is_beside_them(numel, seed, size, sign):
    values = drawn(numel, seed, size, sign)
    values[::2] = 0.0
    assert not round_trip(values)[::2].any()
    zeros = torch.zeros(numel)
    assert torch.equal(round_trip(zeros), zeros)


def test_memory_of_zeros_stands_for_zeros():
    packed, scales = torch.zeros(150, dtype=torch.uint8), torch.zeros(3, dtype=torch.bfloat16)
    assert not dequantize_groups(packed, scales, torch.zeros(3, dtype=torch.uint8), 300).any()


def test_tiles_give_what_the_whole_gives(monkeypatch):
    values = drawn(5 * GROUP + 31, 3)
    whole = coded(values)
    monkeypatch.setattr(tiles, "CODED_NUMEL", GROUP)
    for mine, other in zip(coded(values), whole, strict=True):
        assert torch.equal(mine, other)


def test_the_bytes_of_a_large_basis_are_at_most_053_a_value():
    values = drawn(4096 * 128, 0)
    assert sum(each.nbytes for each in coded(values)) <= 0.53 * values.numel()


def test_an_orthonormal_basis_keeps_its_directions():
    """A tenth of its length is error, spread so evenly that the vectors stay orthonormal within a few hundredths."""
    P = torch.linalg.qr(torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))).Q
    Q = round_trip(P.reshape(-1)).view_as(P)
    assert (Q - P).norm() / P.norm() < 0.105
    assert (Q.mT @ Q - torch.eye(128)).abs().max() < 0.05


def test_meta_tensors_are_coded_without_memory():
    packed, zeros = (torch.zeros(n, dtype=torch.uint8, device="meta") for n in (150, 3))
    scales = torch.zeros(3, dtype=torch.bfloat16, device="meta")
    quantize_groups_(torch.zeros(299, device="meta"), packed, scales, zeros)
    assert dequantize_groups(packed, scales, zeros, 299).shape == (299,)
