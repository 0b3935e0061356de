"""Gradients that are not made, because their parameters rest, and a backward pass that ends above them."""

from __future__ import annotations

import copy

import pytest
import torch

from lowmem.optim import build_optimizer
from lowmem.run.choose import gradient_bytes, situation_of
from tests.run.test_execution import Net, batches, execution_for, net, train

SETTINGS = {"lr": 3e-3, "refresh_every": 2, "order": "ascending"}


def begun(mode: str, model=None, **settings):
    model = net() if model is None else model
    optimizer = build_optimizer(model, "block_adam", **SETTINGS)
    return model, optimizer, execution_for(mode, optimizer, model, **settings)


def trained_alone(model, data, max_norm=None) -> list[torch.Tensor]:
    """The class by itself in a loop that makes all gradients."""
    optimizer = build_optimizer(model, "block_adam", **SETTINGS)
    for micro_batches in data:
        for ids in micro_batches:
            (model(ids) / len(micro_batches)).backward()
        if max_norm is not None:
            active = [
                param
                for group in optimizer.param_groups
                for param in group["params"]
                if optimizer.rule_of(param, group).needs_gradient
            ]
            torch.nn.utils.clip_grad_norm_(active, max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_steps_are_those_of_a_loop_that_makes_all_gradients(mode, micro_batches, recompute):
    data = batches(10, micro_batches)
    found = train(*begun(mode, net(recompute=recompute)), data)
    assert all(torch.equal(a, b) for a, b in zip(found, trained_alone(net(), data), strict=True))


def test_clipping_is_by_the_norm_of_the_block_that_moves():
    data = batches(10, 2)
    found = train(*begun("plain", max_norm=0.05), data)
    expected = trained_alone(net(), data, max_norm=0.05)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-6


def test_only_the_active_block_has_gradients_and_only_during_the_step_do_others_not_require_them():
    model, optimizer, execution = begun("plain")
    names = {param: name for name, param in model.named_parameters()}
    blocks = ["embed", "blocks.0", "blocks.1", "blocks.2"]
    for number, (ids,) in enumerate(batches(10, 1)):
        execution.begin_micro_batch(is_first=True, is_last=True)
        model(ids).backward()
        active = blocks[number // 2 % 4]
        with_gradient = {names[param] for param in names if param.grad is not None}
        assert with_gradient == {name for name in names.values() if name.startswith(active)}
        assert with_gradient == {names[param] for param in names if param.requires_grad}
        execution.finish_backward()
        assert all(param.requires_grad for param in names)
        optimizer.step()
        model.zero_grad()


def test_backward_ends_at_the_active_block_and_keeps_nothing_for_those_below():
    model, optimizer, execution = begun("plain")
    weights = {param.data_ptr() for param in model.parameters()}
    kept = []
    for (ids,) in batches(8, 1):
        saved: dict[int, int] = {}

        def pack(tensor, saved=saved):
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        execution.begin_micro_batch(is_first=True, is_last=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids)
        loss.backward()
        execution.finish_backward(), optimizer.step(), model.zero_grad()
        kept.append(sum(saved.values()))
    embedding, first, second, third = kept[::2]
    assert kept[1::2] == kept[::2]
    assert embedding > first > second > third
    assert third < 0.6 * first


def test_gradients_are_said_to_take_what_the_active_block_takes():
    model = Net(depth=8, width=32)
    optimizer = build_optimizer(model, "block_adam", **SETTINGS | {"others": "frozen"})
    at = situation_of(optimizer, micro_batches=1, clip="applied", max_norm=None)
    values = 4 * 32 * 32 + 4 * 32
    assert gradient_bytes(optimizer, "plain", at) == 4 * values
    assert gradient_bytes(optimizer, "fused", at) == 4 * 2 * 32 * 32


@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_a_resumed_run_stops_the_same_gradients(mode, stop):
    data = batches(10, 1)
    model, optimizer, execution = begun(mode)
    train(model, optimizer, execution, data[:stop])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    whole = train(model, optimizer, execution, data[stop:])
    model, optimizer, execution = begun(mode)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    rest = train(model, optimizer, execution, data[stop:])
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))


def test_a_parameter_that_was_frozen_stays_so():
    model = net()
    model.blocks[1].norm.weight.requires_grad_(False)
    model, optimizer, execution = begun("plain", model)
    start = model.blocks[1].norm.weight.detach().clone()
    train(model, optimizer, execution, batches(8, 1))
    assert not model.blocks[1].norm.weight.requires_grad
    assert torch.equal(model.blocks[1].norm.weight, start)


def test_a_step_that_broke_off_leaves_nothing_stopped_for_ever():
    model, _, execution = begun("plain")
    execution.begin_micro_batch(is_first=True, is_last=True)
    assert not all(param.requires_grad for param in model.parameters())
    execution.detach()
    assert all(param.requires_grad for param in model.parameters())
