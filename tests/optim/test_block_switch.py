"""Tensors that have state in turn: who, when, and that what is freed is free."""

from __future__ import annotations

import weakref

import pytest
import torch

from lowmem.optim import FRUGAL, build_optimizer
from lowmem.optim.block_switch import active_count, active_in_turn

ORDERS = ["random", "ascending", "descending", "mirror"]


def weights(count: int = 8) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(10 + i, 20)) for i in range(count)]


def step(optimizer, params, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def with_state(optimizer, params) -> list[int]:
    return [i for i, param in enumerate(params) if set(optimizer.state[param]) > {"step"}]


def bytes_held(optimizer) -> int:
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]),
        ("descending", [[6, 7], [4, 5], [2, 3], [0, 1], [6, 7]]),
        ("mirror", [[0, 1], [2, 3], [4, 5], [6, 7], [4, 5], [2, 3], [0, 1], [2, 3]]),
    ],
)
def test_blocks_take_turns_in_the_order_asked_for(order, expected):
    params = weights()
    optimizer = FRUGAL(params, lr=1e-3, projection="block", order=order, refresh_every=2)
    found = []
    for number in range(2 * len(expected)):
        step(optimizer, params, number)
        if number % 2 == 0:
            found.append(with_state(optimizer, params))
    assert found == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("count", "density"), [(1, 0.3), (5, 0.3), (7, 0.25), (12, 0.9), (3, 0.01)])
def test_a_share_is_active_and_everyone_has_a_turn(order, count, density):
    k = active_count(density, count)
    turns = [active_in_turn(turn, count, k, order, 0) for turn in range(200)]
    assert k == max(1, round(density * count))
    assert all(1 <= len(turn) <= k and turn <= set(range(count)) for turn in turns)
    assert order == "mirror" or all(len(turn) == k for turn in turns)
    assert set().union(*turns) == set(range(count))


def test_random_turns_depend_on_seed_and_turn_alone():
    one = [active_in_turn(turn, 20, 5, "random", 0) for turn in range(6)]
    active_in_turn.cache_clear()
    torch.manual_seed(5)
    assert one == [active_in_turn(turn, 20, 5, "random", 0) for turn in range(6)]
    assert one != [active_in_turn(turn, 20, 5, "random", 1) for turn in range(6)]
    assert len(set(one)) == 6


@pytest.mark.parametrize("order", ORDERS)
def test_state_is_never_more_than_that_of_one_turn_and_is_freed_before_the_next_begins(order):
    params = weights()
    optimizer = FRUGAL(params, lr=1e-3, projection="block", order=order, refresh_every=3)
    largest = 2 * sum(4 * param.numel() for param in params[-2:]) + 4 * len(params)
    for number in range(12):
        declared = optimizer.state_bytes()
        alive = [
            weakref.ref(tensor.untyped_storage())
            for state in optimizer.state.values()
            for name, tensor in state.items()
            if name != "step"
        ]
        step(optimizer, params, number)
        is_last = number % 3 == 2
        assert declared <= largest
        assert bytes_held(optimizer) == (0 if is_last else declared)
        if is_last:
            assert alive
            assert all(each() is None for each in alive), "the memory itself is gone"


def test_active_blocks_step_as_adam_from_nothing_and_the_others_by_signs():
    params = weights(4)
    optimizer = FRUGAL(params, lr=1.0, projection="block", order="ascending", refresh_every=2)
    for number in range(4):
        before = [param.detach().clone() for param in params]
        step(optimizer, params, number)
        active = number // 2
        for i, param in enumerate(params):
            moved = before[i] - param.detach()
            if i != active:
                torch.testing.assert_close(moved, 0.1 * param.grad.sign(), rtol=1e-4, atol=1e-5)
            elif number % 2 == 0:
                torch.testing.assert_close(moved, param.grad.sign(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_stopped_inside_or_between_turns_goes_on_to_the_same_bits(stop):
    def made(params):
        return FRUGAL(params, lr=1e-2, projection="block", refresh_every=3, storage={"moment": "int8"})

    params = weights()
    optimizer = made(params)
    for number in range(stop):
        step(optimizer, params, number)
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = made(copies)
    resumed.load_state_dict(optimizer.state_dict())
    for number in range(stop, 10):
        step(optimizer, params, number), step(resumed, copies, number)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_who_gets_a_gradient_late_has_the_turn_that_all_have():
    params = weights(4)
    optimizer = FRUGAL(params, lr=1e-2, projection="block", order="ascending", refresh_every=3)
    step(optimizer, params[1:], 0)
    assert with_state(optimizer, params) == []
    step(optimizer, params, 1)
    assert with_state(optimizer, params) == [0]
    assert int(optimizer.state[params[0]]["step"]) == 1
    step(optimizer, params, 2), step(optimizer, params[:2], 3)
    assert with_state(optimizer, params) == [1]


def test_adams_count_in_a_turn_is_that_of_the_gradients_it_saw():
    params, whole = weights(1), weights(1)
    ours = FRUGAL(params, lr=1e-2, projection="block", refresh_every=5)
    theirs = torch.optim.AdamW(whole, lr=1e-2, weight_decay=0.0)
    for number in range(5):
        seen = [] if number == 1 else params
        step(ours, seen, number)
        if seen:
            step(theirs, whole, number)
        for param in params:
            param.grad = None
    torch.testing.assert_close(params[0], whole[0])


def test_a_step_left_out_belongs_to_no_turn():
    params, others = weights(4), weights(4)
    ours, theirs = (FRUGAL(each, lr=1e-2, projection="block", refresh_every=2) for each in (params, others))
    for number in range(7):
        if number in (1, 2, 5):
            for param in params:
                param.grad = torch.full_like(param, torch.nan)
            ours.skip_next_step()
            ours.step()
        step(ours, params, number), step(theirs, others, number)
        assert with_state(ours, params) == with_state(theirs, others)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_stochastic_rounding_does_not_repeat_from_turn_to_turn():
    """Updates are counted from the beginning of a turn, but their rounding must not be the same in each."""
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = FRUGAL([param], lr=1e-4, projection="block", refresh_every=1)
    changed = []
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        changed.append(param.detach() != before)
    assert all(0 < each.float().mean() < 1 for each in changed)
    assert not torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[1], changed[2])


def test_only_the_matrices_of_a_model_take_turns():
    model = torch.nn.ModuleDict(
        {f"mlp{i}": torch.nn.Linear(8, 8) for i in range(4)} | {"norm": torch.nn.LayerNorm(8)}
    )
    optimizer = build_optimizer(model, "frugal", lr=1e-3, target=["mlp"], projection="block")
    step(optimizer, list(model.parameters()))
    matrices = [model[f"mlp{i}"].weight for i in range(4)]
    assert len(with_state(optimizer, matrices)) == 1
    assert "exp_avg" in optimizer.state[model["norm"].weight]
