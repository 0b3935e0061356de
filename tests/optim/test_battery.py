"""What every registered optimizer must do, whatever its algorithm."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from lowmem.numerics import tiles
from tests.optim.cases import (
    CASES,
    LOW_BIT_CASES,
    SHAPES,
    STORAGE_CASES,
    as_parameters,
    case_id,
    gradients,
    is_in_codes,
    make,
    run,
    takes_storage,
    weights,
)

DTYPES = [torch.float32, torch.bfloat16]
each_case = pytest.mark.parametrize("case", CASES + LOW_BIT_CASES, ids=case_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def fresh(case, dtype=torch.float32, **changes):
    params = as_parameters(weights(dtype))
    return make(case, params, **changes), params


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@each_dtype
@each_case
def test_the_same_run_twice_gives_the_same_bits(case, dtype):
    outcomes = []
    for _ in range(2):
        optimizer, params = fresh(case, dtype)
        torch.manual_seed(len(outcomes))  # the global generator must not matter
        run(optimizer, params, range(9), dtype)
        outcomes.append(params)
    assert equal(*outcomes)
    assert not equal(outcomes[0], weights(dtype))


@each_dtype
@each_case
def test_a_saved_and_loaded_optimizer_continues_bit_for_bit(case, dtype):
    optimizer, params = fresh(case, dtype)
    run(optimizer, params, range(9), dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copies = as_parameters(params)
    resumed = make(case, copies)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    run(optimizer, params, range(9, 20), dtype)
    run(resumed, copies, range(9, 20), dtype)
    assert equal(params, copies)


@each_dtype
@each_case
def test_loading_keeps_the_dtype_of_every_state_tensor(case, dtype):
    wider = {"storage": {"moment": "fp32", "variance": "fp32"}} if takes_storage(case) else {}
    optimizer, params = fresh(case, dtype, **wider)
    run(optimizer, params, range(2), dtype)
    resumed = make(case, as_parameters(params))
    resumed.load_state_dict(optimizer.state_dict())
    for state, loaded in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert {name: tensor.dtype for name, tensor in state.items()} == {
            name: tensor.dtype for name, tensor in loaded.items()
        }
        assert all(state[name].data_ptr() != loaded[name].data_ptr() for name in state)


STORAGES = [
    None,
    {"moment": "fp32"},
    {"variance": "bf16", "basis": "fp32"},
    {"moment": "int8", "basis": "int8"},
]


@each_dtype
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *((name, {**own, "storage": storage}) for name, own in STORAGE_CASES for storage in STORAGES),
        *LOW_BIT_CASES,
    ],
    ids=case_id,
)
def test_state_bytes_are_those_of_the_allocated_storages(case, dtype):
    optimizer, params = fresh(case, dtype)
    declared = optimizer.state_bytes()
    run(optimizer, params, range(2), dtype)
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
    }
    assert sum(storages.values()) == declared == optimizer.state_bytes()


@each_case
def test_state_bytes_need_no_memory(case):
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    real, _ = fresh(case)
    assert make(case, params).state_bytes() == real.state_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_case
def test_gradients_are_never_changed(case, dtype):
    optimizer, params = fresh(case, dtype)
    for step in range(9):
        grads = gradients(step, dtype)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        assert equal(grads, gradients(step, dtype))


@each_dtype
@each_case
def test_missing_and_zero_gradients_leave_no_nan(case, dtype):
    optimizer, params = fresh(case, dtype, weight_decay=0.0)
    for param in params:
        param.grad = None
    optimizer.step()
    assert equal(params, weights(dtype))
    assert not optimizer.state
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert equal(params, weights(dtype))
    run(optimizer, params, range(9), dtype)
    assert all(param.isfinite().all() for param in params)
    assert all((param != start).any() for param, start in zip(params, weights(dtype), strict=True))


@each_case
def test_tiny_and_huge_gradients_stay_finite(case):
    for scale in (1e-22, 1e15):
        optimizer, params = fresh(case, lr=1e-22)
        for step in range(9):
            for param, grad in zip(params, gradients(step), strict=True):
                param.grad = grad * scale
            optimizer.step()
        assert all(param.isfinite().all() for param in params)


@each_case
def test_each_group_keeps_its_own_learning_rate_and_decay(case):
    params = as_parameters(weights())
    half = len(params) // 2
    optimizer = make(
        case,
        [
            {"params": params[:half], "lr": 0.0, "weight_decay": 0.5},
            {"params": params[half:], "weight_decay": 0.0},
        ],
    )
    run(optimizer, params, range(3))
    assert equal(params[:half], weights()[:half])
    assert all((param != start).any() for param, start in zip(params[half:], weights()[half:], strict=True))


@each_case
def test_weight_decay_shrinks_by_lr_times_decay_whatever_the_algorithm(case):
    """The direction does not depend on the weight, so two runs differ by the decay alone."""
    (plain, bare), (decayed, shrunk) = fresh(case, weight_decay=0.0), fresh(case, weight_decay=0.1)
    lr = case[1]["lr"]
    run(plain, bare, [0]), run(decayed, shrunk, [0])
    for without, with_decay, start in zip(bare, shrunk, weights(), strict=True):
        torch.testing.assert_close(without - with_decay, lr * 0.1 * start, rtol=1e-3, atol=1e-6)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "warmup": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_case
def test_a_torch_scheduler_steers_the_step(case, scheduler):
    """The applied update is proportional to the scheduled learning rate."""
    optimizer, params = fresh(case, weight_decay=0.0)
    schedule = SCHEDULERS[scheduler](optimizer)
    plain, others = fresh(case, weight_decay=0.0)
    for step in range(4):
        before = [param.detach().clone() for param in params]
        plain.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        run(optimizer, params, [step]), run(plain, others, [step])
        assert equal(params, others)
        assert not equal(params, before)
        schedule.step(*([1.0] if scheduler == "plateau" else []))


@each_case
def test_a_closure_is_evaluated_once_with_gradients_on(case):
    optimizer, params = fresh(case)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(sum((w**2).sum() for w in weights()).item())
    assert not equal(params, weights())


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
@each_case
def test_a_copy_continues_bit_for_bit(case, clone):
    optimizer, params = fresh(case)
    run(optimizer, params, range(9))
    twin, twin_params = clone((optimizer, params))
    run(optimizer, params, range(9, 20)), run(twin, twin_params, range(9, 20))
    assert equal(params, twin_params)


@each_dtype
@each_case
def test_slicing_a_parameter_changes_nothing_but_memory(case, dtype, monkeypatch):
    optimizer, params = fresh(case, dtype, rounding="nearest")
    run(optimizer, params, range(9), dtype)
    # Blocks of codes that share a scale are not cut, so slices hold whole ones.
    monkeypatch.setattr(tiles, "TILE_NUMEL", 256 if is_in_codes(case) else 7)
    sliced, sliced_params = fresh(case, dtype, rounding="nearest")
    run(sliced, sliced_params, range(9), dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for whole, piecewise in zip(params, sliced_params, strict=True):
        torch.testing.assert_close(whole, piecewise, rtol=tolerance, atol=tolerance)


@each_case
def test_non_contiguous_parameters_and_gradients_are_updated_alike(case):
    start = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
    plain, strided = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone().T.contiguous().T)
    assert not strided.is_contiguous()
    ours, theirs = make(case, [plain]), make(case, [strided])
    for step in range(9):
        plain.grad = gradients(step, shapes=[(20, 12)])[0]
        strided.grad = plain.grad.T.contiguous().T
        ours.step(), theirs.step()
    torch.testing.assert_close(plain, strided.contiguous(), rtol=1e-5, atol=1e-5)


@each_case
def test_frozen_parameters_hold_no_state(case):
    params = as_parameters(weights())
    params[0].requires_grad_(False)
    optimizer = make(case, params)
    for param, grad in zip(params[1:], gradients(0)[1:], strict=True):
        param.grad = grad
    optimizer.step()
    assert params[0] not in optimizer.state
    allocated = sum(
        t.untyped_storage().nbytes() for state in optimizer.state.values() for t in state.values()
    )
    assert optimizer.state_bytes() == allocated


@each_case
def test_named_parameters_give_the_same_kind_of_run(case):
    params = as_parameters(weights())
    optimizer = make(case, [(f"layer{i}.weight", param) for i, param in enumerate(params)])
    run(optimizer, params, range(9))
    assert optimizer.param_groups[0]["param_names"][0] == "layer0.weight"
    assert all(param.isfinite().all() for param in params)


@each_case
def test_state_and_groups_hold_only_what_a_safe_checkpoint_may(case):
    optimizer, params = fresh(case)
    run(optimizer, params, range(2))
    for state in optimizer.state.values():
        assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
    for group in optimizer.state_dict()["param_groups"]:
        assert all(
            isinstance(value, (int, float, str, tuple, list, dict, type(None))) for value in group.values()
        )
