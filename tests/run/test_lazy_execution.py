"""Q-GaLore in every execution: refreshes at gaps that grow, low-bit state, and a resume in the midst of them."""

from __future__ import annotations

import copy

import pytest
import torch

from lowmem.optim.lazy_refresh import SCHEDULE
from tests.optim.cases import FLOAT
from tests.run.test_execution import batches, execution_for, furthest, net, optimizer_for, run, train

# Some of the twelve matrices are alike at their refreshes and some are not.
SETTINGS = {
    "rank": 4,
    "refresh_every": 3,
    "similarity_threshold": 0.75,
    "similarity_window": 2,
    "max_refresh_every": 7,
}
EXACT = ("q_galore", {**SETTINGS, "storage": FLOAT})
INT4 = ("q_galore", {**SETTINGS, "storage": {**FLOAT, "basis": "int4"}})
LOW_BIT = ("q_galore", {**SETTINGS, "rounding": "nearest"})


def schedules(optimizer) -> set[tuple[int, ...]]:
    """(times grown, step it has held from) of every matrix."""
    return {tuple(map(int, state[SCHEDULE][:2])) for state in optimizer.state.values() if SCHEDULE in state}


def test_gaps_grow_each_on_its_own_in_these_tests():
    model = net()
    optimizer = optimizer_for(EXACT, model)
    train(model, optimizer, execution_for("project", optimizer, model), batches(30, 4))
    grown = {times for times, _ in schedules(optimizer)}
    assert len(grown) > 1, "otherwise every matrix does the same"
    assert len({since for _, since in schedules(optimizer)}) > 2


@pytest.mark.parametrize("refresh_from", ["boundary", "first_micro_batch"])
@pytest.mark.parametrize("case", [EXACT, INT4], ids=["float", "int4"])
def test_project_with_accumulation_equals_plain_over_refreshes_at_growing_gaps(case, refresh_from):
    data = batches(30, 4)
    plain, project = (run(mode, case, data, refresh_from=refresh_from) for mode in ("plain", "project"))
    assert furthest(project, plain) < 1e-5


def test_int8_moments_differ_by_a_code_here_and_there():
    """A sum that is added up in another order may round to the neighbouring code."""
    data = batches(30, 4)
    plain, project = (run(mode, LOW_BIT, data) for mode in ("plain", "project"))
    assert furthest(project, plain) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_makes_the_bits_of_plain_at_growing_gaps(dtype):
    data = batches(30, 1)
    case = ("q_galore", SETTINGS)
    plain, fused = run("plain", case, data, dtype=dtype), run("fused", case, data, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


@pytest.mark.parametrize("stop", [4, 14, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["plain", "project", "fused"])
def test_a_run_resumed_within_a_grown_gap_is_the_run_that_was_not_stopped(mode, dtype, stop):
    data, case = batches(30, 2), ("q_galore", SETTINGS)
    whole = run(mode, case, data, dtype=dtype)
    model = net(dtype)
    optimizer = optimizer_for(case, model)
    train(model, optimizer, execution_for(mode, optimizer, model), data[:stop])
    if stop > 4:
        assert max(schedules(optimizer)) > (0, 0), "a gap has grown"
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model = net(dtype)
    model.load_state_dict(weights)
    optimizer = optimizer_for(case, model)
    optimizer.load_state_dict(state)
    rest = train(model, optimizer, execution_for(mode, optimizer, model), data[stop:])
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))


def test_a_skipped_step_does_not_count_a_similarity_twice():
    """The basis was fitted in the step that is left out; the next one has the same number and fits none."""
    model, case = net(), ("q_galore", {**SETTINGS, "stagger": False, "storage": FLOAT})
    optimizer = optimizer_for(case, model)
    execution = execution_for("project", optimizer, model)
    train(model, optimizer, execution, batches(3, 1))
    optimizer.skip_next_step()
    train(model, optimizer, execution, batches(1, 1))
    train(model, optimizer, execution, batches(1, 1))
    held = {tuple(state[SCHEDULE].tolist()) for state in optimizer.state.values() if SCHEDULE in state}
    assert held == {(0, 0, 1)}
