"""A run that stops after any step ends with the bits of one that did not: every optimizer, execution and storage."""

from __future__ import annotations

import io

import pytest
import torch

from lowmem.run.choose import EXECUTIONS, objection, situation_of
from tests.optim.cases import CASES, LOW_BIT_CASES, case_id
from tests.run.test_execution import batches, execution_for, net, optimizer_for, train

STEPS = 4
MICRO_BATCHES = 2


def often_refreshed(case):
    name, settings = case
    return name, {**settings, **({"refresh_every": 2} if "refresh_every" in settings else {})}


def ways():
    for case in map(often_refreshed, CASES + LOW_BIT_CASES):
        optimizer = optimizer_for(case, net(depth=1))
        at = situation_of(optimizer, micro_batches=MICRO_BATCHES, clip="applied", max_norm=None)
        for mode in EXECUTIONS:
            if objection(mode, at) is None:
                yield pytest.param(mode, case, id=f"{mode}-{case_id(case)}")


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "case"), list(ways()))
def test_a_run_stopped_after_any_step_ends_with_the_bits_of_one_that_was_not(mode, case, dtype):
    data = batches(STEPS, MICRO_BATCHES)

    def begun(saved=None):
        model = net(dtype, depth=1)
        optimizer = optimizer_for(case, model)
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        return model, optimizer, execution_for(mode, optimizer, model)

    model, optimizer, execution = begun()
    saved = []
    for step in range(STEPS):
        whole = train(model, optimizer, execution, [data[step]])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved.append(through_a_file(state))
    for step in range(1, STEPS):
        rest = train(*begun(saved[step - 1]), data[step:])
        assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True)), f"stopped after step {step}"
