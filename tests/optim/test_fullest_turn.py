"""The turn that a simulation of parameters in turn looks at."""

from __future__ import annotations

import pytest
import torch

from lowmem.optim import FRUGAL, BlockAdam
from lowmem.optim.fullest_turn import fullest_turns, pretend_turn_

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
    turns = fullest_turns(pretended)
    assert len(turns) == 1, "every parameter has a gradient in every turn"
    pretend_turn_(pretended, turns[0])
    assert pretended.state_bytes() == most
    assert bytes_held(pretended) == (most if gap > 1 else 0)
    step(pretended, [param for group in pretended.param_groups for param in group["params"]])


def test_there_is_none_where_nobody_takes_turns():
    params = [torch.nn.Parameter(torch.zeros(5, 7))]
    optimizer = FRUGAL(params, lr=1e-3)
    step(optimizer, params)
    assert fullest_turns(optimizer) == []


def test_a_frozen_parameter_fills_no_turn():
    params = [torch.nn.Parameter(torch.zeros(5, width)) for width in (2, 3, 50)]
    params[2].requires_grad_(False)
    optimizer = FRUGAL(params, lr=1e-3, projection="block", order="ascending", refresh_every=2)
    step(optimizer, params[:2])
    pretend_turn_(optimizer, fullest_turns(optimizer)[0])
    assert optimizer.state_bytes() == bytes_held(optimizer) == 2 * 4 * 15 + 2 * 4


@pytest.mark.parametrize(
    ("widths", "expected"),
    [((3, 8, 8, 9), [3, 1]), ((9, 8, 8, 9), [0]), ((3, 8, 1000, 1000), [2, 1]), ((2, 3, 1), [1, 0])],
)
def test_with_gradients_of_the_active_block_alone_a_longer_way_back_counts_too(widths, expected):
    """Ascending blocks of a step each: number i has its turn in step i."""
    params = [(f"layers.{i}.weight", torch.nn.Parameter(torch.zeros(5, n))) for i, n in enumerate(widths)]
    optimizer = BlockAdam(params, refresh_every=1, order="ascending")
    found = fullest_turns(optimizer)
    assert found[0] == expected[0]
    assert found[1:] == expected[1:2]
