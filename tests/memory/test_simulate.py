from __future__ import annotations

import gc
import resource

import pytest
import torch
from torch import nn

from lowmem.memory.caching_allocator import CachingAllocator
from lowmem.memory.measure import TrackedMeter
from lowmem.memory.plan_document import Held
from lowmem.memory.simulate import SimulatedMeter, Simulation
from lowmem.memory.workspaces import CUBLAS_BYTES
from lowmem.optim import build_optimizer
from lowmem.optim.without_values import pretend_until_refresh_
from tests.memory.small_training import batch, network, train_step
from tests.optim.cases import CASES, case_id, make

MIB = 2**20


def simulated(optimizer_of, *, steps: int = 3, rows: int = 32, on_cuda: bool = False, refresh: bool = False):
    simulation = Simulation()
    with simulation.tensors():
        model = network()
        meter = SimulatedMeter(model, on_cuda=on_cuda)
        optimizer = optimizer_of(model)
        meter.watch(optimizer)
        for step in range(steps):
            if refresh and step == steps - 1:
                assert pretend_until_refresh_(optimizer)
            with meter.step():
                train_step(model, torch.empty(rows, 64), optimizer, meter)
    return meter


def tracked(optimizer_of, *, steps: int = 3, rows: int = 32) -> TrackedMeter:
    model = network()
    meter = TrackedMeter(model)
    optimizer = optimizer_of(model)
    meter.watch(optimizer)
    for _ in range(steps):
        inputs = batch(rows)
        with meter.step():
            train_step(model, inputs, optimizer, meter)
        del inputs
    return meter


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("rows", [1, 512], ids=["peak in the optimizer", "peak in backward"])
def test_simulated_bytes_are_those_of_a_real_run_for_every_optimizer(case, rows):
    def of(model):
        return make(case, model.parameters())

    found, real = simulated(of, rows=rows).measured(), tracked(of, rows=rows).measured()
    assert found.parts == real.parts
    assert (found.peak_bytes, found.steady_peak_bytes) == (real.peak_bytes, real.steady_peak_bytes)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_torchs_own_optimizers_are_simulated_too(how):
    def of(model):
        return torch.optim.AdamW(model.parameters(), **how)

    assert simulated(of, rows=1).measured().parts == tracked(of, rows=1).measured().parts


def test_a_layer_simulated_once_counts_as_often_as_it_is_there():
    def deep():
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))

    def peak(model, meter, inputs):
        optimizer = build_optimizer(model, "galore", lr=1e-3, rank=4, target=["0", "1", "2", "3"])
        meter.watch(optimizer)
        for _ in range(2):
            with meter.step():
                train_step(model, inputs, optimizer, meter)
        return meter.measured()

    simulation = Simulation()
    with simulation.tensors():
        model = deep()
        found = peak(model, SimulatedMeter(model, on_cuda=False), torch.empty(1, 64))
    model = deep()
    real = peak(model, TrackedMeter(model), torch.ones(1, 64))
    assert (found.peak_bytes, found.parts) == (real.peak_bytes, real.parts)


def test_a_refresh_is_simulated_with_all_state_there():
    def of(model):
        return make(
            ("galore", {"lr": 1e-2, "rank": 4, "refresh_every": 1000, "projection": "svd"}),
            model.parameters(),
        )

    meter = simulated(of, rows=1, refresh=True)
    first, later, refresh = (moment.peak_bytes for moment in meter.moments)
    assert later < first < refresh


def test_the_fullest_moment_says_where_it_is():
    def of(model):
        return torch.optim.AdamW(model.parameters(), foreach=True)

    wide = simulated(of, rows=4096).moments[-1]
    assert (wide.phase, wide.place) == ("backward", "after the gradient of 2.weight")
    narrow = simulated(of, rows=1).moments[-1]
    assert narrow.phase == "optimizer"


def test_what_is_alive_at_the_peak_is_named_and_adds_up():
    moment = simulated(lambda model: torch.optim.AdamW(model.parameters(), fused=True), rows=8).moments[-1]
    assert sum(held.nbytes for held in moment.held) == moment.peak_bytes
    names = {held.what for held in moment.held}
    assert "*.weight (128, 64) float32" in names
    assert "exp_avg of *.weight (128, 64) float32" in names
    assert Held("gradient of *.weight (128, 64) float32", "gradients", 1, 128 * 64 * 4) in moment.held


def test_on_cuda_the_libraries_workspace_and_the_allocators_reserve_are_added():
    def of(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    plain, cuda = simulated(of).measured(), simulated(of, on_cuda=True).measured()
    assert plain.reserved_bytes is None
    assert cuda.parts["other"] - plain.parts["other"] == CUBLAS_BYTES
    assert cuda.reserved_bytes is not None
    assert cuda.reserved_bytes % (2 * MIB) == 0
    assert cuda.reserved_bytes > cuda.peak_bytes


def test_the_reserve_is_that_of_the_allocator_model_run_by_hand():
    simulation = Simulation()
    with simulation.tensors():
        model = nn.Linear(1024, 1024, bias=False)  # 4 MiB
        meter = SimulatedMeter(model, on_cuda=True)
        for _ in range(2):
            with meter.step(), meter.phase("forward"):
                a = torch.empty(3 * MIB, dtype=torch.uint8)
                b = torch.empty(30 * MIB, dtype=torch.uint8)
                del a
                c = torch.empty(5 * MIB, dtype=torch.uint8)
                del b, c
    by_hand = CachingAllocator()
    by_hand.malloc("cublas", CUBLAS_BYTES)
    by_hand.malloc("weight", 4 * MIB)
    for _ in range(2):
        by_hand.malloc("a", 3 * MIB)
        by_hand.malloc("b", 30 * MIB)
        by_hand.free("a")
        by_hand.malloc("c", 5 * MIB)
        by_hand.free("b")
        by_hand.free("c")
    assert meter.measured().reserved_bytes == by_hand.reserved_bytes


def test_a_terabyte_is_simulated_in_no_memory():
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    simulation = Simulation()
    with simulation.tensors():
        model = nn.Linear(2**19, 2**19, bias=False, dtype=torch.float32)
        meter = SimulatedMeter(model, on_cuda=False)
        optimizer = build_optimizer(model, "sgd", lr=0.1)
        meter.watch(optimizer)
        with meter.step():
            train_step(model, torch.empty(1, 2**19), optimizer, meter)
    assert meter.measured().parts["weights"] == 2**40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB"


def test_modules_can_change_their_dtype_in_a_simulation_and_ordinary_ones_are_untouched():
    apply = nn.Module._apply
    simulation = Simulation()
    with simulation.tensors():
        layer = nn.Linear(4, 4).bfloat16()
        assert layer.weight.dtype == torch.bfloat16
        assert isinstance(layer.weight, nn.Parameter)
    assert nn.Module._apply is apply
