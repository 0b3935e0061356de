"""The turn that a simulation of parameters in turn looks at."""

from __future__ import annotations

import pytest
import torch

from lowmem.optim import FRUGAL
from lowmem.optim.fullest_turn import pretend_fullest_turn_

ORDERS = ["random", "ascending", "descending", "mirror"]
WIDTHS = [3, 9, 1, 7, 2, 9, 4]


def stepped_once(order: str, gap: int) -> tuple[FRUGAL, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.zeros(5, width)) for width in WIDTHS]
    optimizer = FRUGAL(params, lr=1e-3, projection="block", density=0.3, order=order, refresh_every=gap)
    step(optimizer, params)
    return optimizer, params


def step(optimizer, params) -> None:
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


def bytes_held(optimizer) -> int:
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_its_step_holds_as_much_as_the_fullest_of_a_long_run(order, gap):
    optimizer, params = stepped_once(order, gap)
    most = 0
    for _ in range(100 * gap):
        most = max(most, optimizer.state_bytes())
        step(optimizer, params)
    pretended, _ = stepped_once(order, gap)
    assert pretend_fullest_turn_(pretended)
    assert pretended.state_bytes() == most
    assert bytes_held(pretended) == (most if gap > 1 else 0)
    step(pretended, [param for group in pretended.param_groups for param in group["params"]])


def test_nothing_is_pretended_where_nobody_takes_turns():
    params = [torch.nn.Parameter(torch.zeros(5, 7))]
    optimizer = FRUGAL(params, lr=1e-3)
    step(optimizer, params)
    before = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
    assert not pretend_fullest_turn_(optimizer)
    assert all(torch.equal(before[name], value) for name, value in optimizer.state[params[0]].items())


def test_a_frozen_parameter_fills_no_turn():
    params = [torch.nn.Parameter(torch.zeros(5, width)) for width in (2, 3, 50)]
    params[2].requires_grad_(False)
    optimizer = FRUGAL(params, lr=1e-3, projection="block", order="ascending", refresh_every=2)
    step(optimizer, params[:2])
    pretend_fullest_turn_(optimizer)
    assert optimizer.state_bytes() == bytes_held(optimizer) == 2 * 4 * 15 + 2 * 4
