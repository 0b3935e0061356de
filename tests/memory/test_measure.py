from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from lowmem.memory.allocator import CudaAllocator
from lowmem.memory.measure import AllocatorMeter, Measured, TrackedMeter, meter_for
from tests.memory.counted_allocator import CountedAllocator, allocator_for
from tests.memory.small_training import HIDDEN, INPUTS, OUTPUTS, batch, network, train_step

CPU = torch.device("cpu")


def steps(model: nn.Module, inputs: torch.Tensor, meter, *, num_steps: int = 2, **variant: bool) -> Measured:
    optimizer = torch.optim.AdamW(model.parameters(), **variant)
    meter.watch(optimizer)
    for _ in range(num_steps):
        with meter.step():
            train_step(model, inputs, optimizer, meter)
    return meter.measured()


def test_the_fullest_step_stands_for_all_and_the_steady_peak_leaves_the_first_out():
    model = network()
    meter = TrackedMeter(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter.watch(optimizer)
    peaks = []
    for rows in (4000, 1000, 2000):
        with meter.step():
            train_step(model, batch(rows), optimizer, meter)
        peaks.append(meter.last_peak_bytes())
    measured = meter.measured()
    assert peaks[0] > peaks[2] > peaks[1]
    assert measured.peak_bytes == peaks[0]
    assert measured.steady_peak_bytes == peaks[2]
    assert measured.steps == 3
    assert measured.source == "tracked"
    assert measured.reserved_bytes is None


def test_one_step_has_no_steady_peak():
    model = network()
    assert steps(model, batch(4), TrackedMeter(model), num_steps=1, fused=True).steady_peak_bytes is None


def test_no_step_is_an_error_and_not_zero_bytes():
    meter = TrackedMeter(network())
    assert meter.last_peak_bytes() is None
    with pytest.raises(ValueError, match="no step was measured"):
        meter.measured()


@pytest.mark.parametrize("kind", ["tracked", "allocator"])
def test_a_step_that_raises_is_left_out(kind):
    model = network()
    meter = TrackedMeter(model) if kind == "tracked" else AllocatorMeter(model, CPU, allocator_for(model))
    with pytest.raises(KeyError), meter.step(), meter.phase("backward"):
        raise KeyError
    assert meter.last_peak_bytes() is None
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters() if kind == "allocator")


@pytest.mark.parametrize("kind", ["tracked", "allocator"])
def test_phases_outside_a_step_measure_nothing(kind):
    model = network()
    meter = TrackedMeter(model) if kind == "tracked" else AllocatorMeter(model, CPU, allocator_for(model))
    train_step(model, batch(4), torch.optim.SGD(model.parameters(), lr=0.1), meter)
    assert meter.last_peak_bytes() is None


def test_without_an_optimizer_to_watch_its_state_is_not_guessed():
    model = network()
    meter = TrackedMeter(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with meter.step():
        train_step(model, batch(2), optimizer, meter)
    assert meter.measured().parts["optimizer_state"] == 0


def test_a_result_survives_a_trip_through_json():
    model = network()
    measured = steps(model, batch(4), TrackedMeter(model), fused=True)
    assert Measured(**json.loads(json.dumps(asdict(measured)))) == measured


def test_the_meter_fits_the_device():
    assert isinstance(meter_for(network(), "cpu"), TrackedMeter)
    with pytest.raises(ValueError, match="not on meta"):
        meter_for(network(), "meta")


# ------------------------------------------------------------------ the allocator's counters


@pytest.mark.parametrize("variant", ["fused", "foreach"])
@pytest.mark.parametrize("rows", [2, 2000])
def test_the_allocator_meter_agrees_with_the_tracker(variant, rows):
    """Totals exactly; gradients within one parameter; activations at least what they were."""
    model, inputs = network(), batch(rows)
    tracked = steps(model, inputs, TrackedMeter(model), **{variant: True})
    allocator = allocator_for(model, inputs)
    with allocator:
        read = steps(model, inputs, AllocatorMeter(model, CPU, allocator), **{variant: True})
    assert read.peak_bytes == tracked.peak_bytes == sum(read.parts.values())
    assert read.steady_peak_bytes == tracked.steady_peak_bytes
    assert read.source == "allocator"
    assert read.reserved_bytes == 2 * 1024**2 * -(-read.peak_bytes // (2 * 1024**2))
    assert read.driver_bytes == read.reserved_bytes + 400 * 1024**2, "the driver counts the context too"
    for part in ("weights", "optimizer_state", "other"):
        assert read.parts[part] == tracked.parts[part]
    largest_parameter = INPUTS * HIDDEN * 4
    assert abs(read.parts["gradients"] - tracked.parts["gradients"]) <= largest_parameter
    assert read.parts["activations"] >= tracked.parts["activations"] - 512
    if rows == 2000:  # ReLU's output, the only thing forward leaves for backward but square's input
        assert read.parts["activations"] <= rows * (HIDDEN + OUTPUTS) * 4 + 512


def test_a_peak_in_forward_leaves_no_gradient_in_the_account():
    model, inputs = network(), batch(2)
    allocator = allocator_for(model, inputs)
    meter = AllocatorMeter(model, CPU, allocator)
    meter.watch(torch.optim.AdamW(model.parameters()))
    with allocator, meter.step():
        with meter.phase("forward"):
            kept = torch.empty(100, 1280)
            torch.empty(1000, 1280)  # dropped at once
            loss = model(inputs).sum()
        del kept
        with meter.phase("backward"):
            loss.backward()
    parts = meter.measured().parts
    assert parts["gradients"] == 0
    assert 100 * 1280 * 4 <= parts["activations"] <= 100 * 1280 * 4 + 8192
    assert 900 * 1280 * 4 <= parts["temporary"] <= 1000 * 1280 * 4


def test_the_peak_between_backward_and_the_step_is_seen():
    model, inputs = network(), batch(2)
    allocator = allocator_for(model, inputs)
    meter = AllocatorMeter(model, CPU, allocator)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter.watch(optimizer)
    with allocator, meter.step():
        with meter.phase("backward"):
            model(inputs).sum().backward()
        torch.empty(1_000_000)
        with meter.phase("optimizer"):
            optimizer.step()
    measured = meter.measured()
    assert measured.parts["temporary"] >= 4_000_000
    assert measured.parts["gradients"] == measured.parts["weights"]


def test_a_full_device_is_flagged():
    model = network()
    allocator: CountedAllocator = allocator_for(model)
    meter = AllocatorMeter(model, CPU, allocator)
    allocator.retries = 3  # before the step: not its fault
    with meter.step():
        allocator.retries = 5
    assert meter.measured().warnings[0].startswith("the device was full 2 time(s)")
    assert allocator.waited == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counters_account_for_adamw_to_the_byte():
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)).to(device)
    inputs = torch.ones(8, 2048, device=device)
    meter = meter_for(model, "cuda")
    assert isinstance(meter, AllocatorMeter)
    measured = steps(model, inputs, meter, num_steps=4, foreach=True)
    weights = sum(param.nbytes for param in model.parameters())
    assert measured.parts["weights"] == measured.parts["gradients"] == weights
    assert measured.parts["optimizer_state"] == 2 * weights  # the step counts are on the CPU
    assert measured.parts["temporary"] + measured.parts["activations"] >= weights
    assert measured.reserved_bytes >= measured.peak_bytes == sum(measured.parts.values())
    assert CudaAllocator(device).num_retries() == 0
