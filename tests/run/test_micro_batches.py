"""Fused with several micro-batches: gradients are added to the momentum as they arrive, and nothing is undone."""

from __future__ import annotations

import copy

import pytest
import torch

from lowmem.memory.measure import TrackedMeter
from lowmem.optim import SGD, SGDSaI, build_optimizer
from lowmem.optim.micro_batches import accumulates, may_accumulate
from lowmem.run.choose import chosen_mode, gradient_bytes, situation_of
from tests.run.test_execution import Net, batches, execution_for, net, optimizer_for, run, train

SGD_CASES = [
    ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.5, "dampening": 0.3}),
]
SAI_CASES = [
    ("sgd_sai", {"gsnr": "paper"}),
    ("sgd_sai", {"momentum": 0.5, "gsnr": "paper", "weight_decay": 0.0}),
]
TODAYS_WAY = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("sgd_sai", {"momentum": 0.0}),
    ("adamw", {}),
]


def apart(ours, theirs) -> float:
    """The largest difference relative to the largest value, of the worst tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("case", [*SGD_CASES, *SAI_CASES], ids=str)
def test_sums_in_the_momentum_make_the_steps_of_plain(case):
    data = batches(30, 4)
    plain, fused = run("plain", case, data), run("fused", case, data)
    assert apart(fused, plain) < 1e-6
    assert not all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True)), "added up in another order"


@pytest.mark.parametrize("case", TODAYS_WAY, ids=str)
def test_what_needs_the_gradient_itself_adds_gradients_up_and_makes_the_bits_of_plain(case):
    data = batches(6, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(run("fused", case, data), run("plain", case, data), strict=True)
    )


@pytest.mark.parametrize("case", SGD_CASES, ids=str)
def test_clipping_each_tensor_clips_the_whole_steps_gradient(case):
    data = batches(8, 3)
    plain, fused = (run(mode, case, data, clip="tensor", max_norm=0.02) for mode in ("plain", "fused"))
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    assert apart(plain, run("plain", case, data)) > 1e-3, "the clipping must bite for this to mean anything"


def test_the_ratio_of_sgd_sai_is_that_of_a_whole_steps_gradient():
    ratios = []
    for mode in ("plain", "fused"):
        model = net()
        optimizer = optimizer_for(("sgd_sai", {}), model)
        train(model, optimizer, execution_for(mode, optimizer, model), batches(3, 4))
        ratios.append([optimizer.state[param]["gsnr"].item() for param in model.parameters()])
    assert ratios[0] == ratios[1]


# ------------------------------------------------------------------ gradients that live


def gradients_held(name: str, **settings) -> int:
    model = Net(depth=12, width=64)
    meter = TrackedMeter(model)
    optimizer = build_optimizer(model, name, lr=1e-3, **settings)
    meter.watch(optimizer)
    execution = execution_for("fused", optimizer, model)
    for number, micro_batches in enumerate(batches(3, 3)):
        if number == 0:  # that of SGD-SaI wants the whole gradient, and has no state yet
            train(model, optimizer, execution, [micro_batches])
            continue
        with meter.step():
            for index, ids in enumerate(micro_batches):
                execution.begin_micro_batch(is_first=index == 0, is_last=index == 2)
                with meter.phase("forward"):
                    loss = model(ids)
                with meter.phase("backward"):
                    loss.backward()
                del loss
            with meter.phase("optimizer"):
                execution.finish_backward()
                optimizer.step()
            model.zero_grad()
    return meter.measured().parts["gradients"]


MATRIX = 64 * 128 * 4


@pytest.mark.parametrize(("name", "settings"), [("sgd", {"momentum": 0.9}), ("sgd_sai", {})], ids=str)
def test_one_layers_gradient_at_a_time_is_alive_over_all_micro_batches(name, settings):
    assert gradients_held(name, **settings) <= MATRIX + 512 * 4


def test_without_momentum_gradients_are_held():
    assert gradients_held("sgd") > 24 * MATRIX


def test_gradient_bytes_are_those_of_one_gradient_and_of_what_is_added_up():
    def of(name, max_norm=None, **settings):
        optimizer = build_optimizer(model, name, lr=1e-3, **settings)
        at = situation_of(optimizer, micro_batches=4, clip="tensor", max_norm=max_norm)
        return gradient_bytes(optimizer, "fused", at), chosen_mode("auto", at)

    model = net(depth=1)
    largest, whole = max(p.nbytes for p in model.parameters()), sum(p.nbytes for p in model.parameters())
    assert of("sgd", momentum=0.9) == (largest, "fused")
    assert of("sgd_sai") == (largest, "fused")
    assert of("sgd", momentum=0.9, max_norm=1.0) == (whole, "plain")
    assert of("sgd", momentum=0.9, nesterov=True) == (whole, "plain")
    # One parameter that does not accumulate keeps `auto` from it, and costs its own gradient only.
    mixed = {"momentum": 0.9, "target": ["mlp"], "fallback": {"name": "adamw"}}
    targeted = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert of("sgd", **mixed) == (max(largest, whole - targeted), "plain")


# ------------------------------------------------------------------ odd moments


def test_a_weight_whose_last_micro_batch_has_no_gradient_still_moves():
    """Experts of a mixture see no token now and then."""

    class Picky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))

        def forward(self, number):
            return (self.experts[number](torch.ones(1, 3)) ** 2).sum()

    def trained(mode):
        model = Picky()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return train(
            model, optimizer, execution_for(mode, optimizer, model), [[0, 1, 0], [1, 0], [0, 1], [1, 1]]
        )

    assert apart(trained("fused"), trained("plain")) < 1e-6


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_micro_batch_that_is_not_finite_is_dropped_before_it_touches_the_momentum(broken):
    data = batches(4, 3)

    def trained(skips):
        model = net()
        optimizer = optimizer_for(("sgd", {"momentum": 0.9}), model)
        execution = execution_for("fused", optimizer, model)
        train(model, optimizer, execution, data[:2])
        counted = set()
        for number, ids in enumerate(data[2]):
            if skips and number == broken:
                continue
            is_last = number == 2 or (skips and broken == 2 and number == 1)
            is_first = number == 0 or (skips and broken == 0 and number == 1)
            execution.begin_micro_batch(is_first=is_first, is_last=is_last)
            loss = model(ids) / 3 * (float("nan") if number == broken else 1)
            execution.note_loss(loss.detach())
            loss.backward()
            counted |= set(execution.not_finite)
        execution.finish_backward()
        optimizer.step()
        assert len(counted) == (0 if skips else len(list(model.parameters())))
        return train(model, optimizer, execution, data[3:])

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_a_gradient_that_is_not_finite_is_dropped_alone():
    model = net()
    optimizer = optimizer_for(("sgd", {"momentum": 0.9}), model)
    execution = execution_for("fused", optimizer, model)
    up = model.blocks[1].mlp_up.weight
    spoil = up.register_hook(lambda grad: grad * float("inf"))
    execution.begin_micro_batch(is_first=True, is_last=False)
    model(batches(1, 1)[0][0]).backward()
    assert list(execution.not_finite) == [up]
    assert up not in optimizer.accumulated
    assert optimizer.accumulated[model.blocks[1].mlp_down.weight] == 1
    spoil.remove()
    execution.begin_micro_batch(is_first=False, is_last=True)
    model(batches(1, 1)[0][0]).backward()
    assert execution.first_not_finite() is not None
    assert all(param.isfinite().all() for param in model.parameters())
    assert all(state["momentum_buffer"].isfinite().all() for state in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [SGD_CASES[0], SAI_CASES[0]], ids=str)
def test_a_state_saved_between_steps_goes_on_as_if_it_had_not_been(case, dtype):
    data = batches(12, 3)
    whole = run("fused", case, data, dtype=dtype)
    model = net(dtype)
    optimizer = optimizer_for(case, model)
    train(model, optimizer, execution_for("fused", optimizer, model), data[:5])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model = net(dtype)
    model.load_state_dict(weights)
    optimizer = optimizer_for(case, model)
    optimizer.load_state_dict(state)
    rest = train(model, optimizer, execution_for("fused", optimizer, model), data[5:])
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))


# ------------------------------------------------------------------ the storage


def summed_in_bf16(rounding: str) -> torch.Tensor:
    """The momentum of 1 after 64 micro-batches whose gradients are each below half a unit of its last place."""
    param = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = SGD([param], lr=0.0, momentum=0.5, storage={"moment": "bf16"}, rounding=rounding)
    group = optimizer.param_groups[0]
    param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    for _ in range(64):
        param.grad = torch.full_like(param, 1e-3)
        assert may_accumulate(optimizer, param, group)
        optimizer.accumulate_grad_(param, group)
    return optimizer.state[param]["momentum_buffer"].float()


def test_a_bf16_momentum_keeps_the_mean_of_gradients_below_its_last_place():
    assert summed_in_bf16("stochastic").mean() == pytest.approx(1.064, abs=2e-3)
    assert summed_in_bf16("nearest").mean() == 1.0, "which rounding to nearest would lose"


def test_fused_with_a_bf16_momentum_follows_a_float_one():
    data = batches(30, 4)
    case = ("sgd", {"momentum": 0.9, "storage": {"moment": "bf16"}})
    start, exact = list(net().parameters()), run("plain", ("sgd", {"momentum": 0.9}), data)
    found = run("fused", case, data)
    moved = torch.cat([(b - a).flatten() for a, b in zip(start, exact, strict=True)]).norm()
    off = torch.cat([(b - a).flatten() for a, b in zip(found, exact, strict=True)]).norm()
    assert off < 0.02 * moved


def test_a_weight_with_gaps_in_its_memory_is_added_to_like_any_other():
    start = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    plain, strided = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.T.contiguous().T)
    for param in (plain, strided):
        optimizer = SGDSaI([param], lr=1e-3)
        group = optimizer.param_groups[0]
        for step in range(4):
            for number in range(3):
                param.grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 * step + number))
                if step > 0 and number < 2:
                    optimizer.accumulate_grad_(param, group)
            optimizer.step()
            param.grad = None
    torch.testing.assert_close(plain, strided.contiguous(), rtol=1e-6, atol=1e-6)


def test_only_momentum_that_is_linear_in_the_gradient_takes_micro_batches():
    param = torch.nn.Parameter(torch.zeros(3))

    def takes(**settings):
        optimizer = SGD([param], **settings)
        return accumulates(optimizer, param, optimizer.param_groups[0])

    assert takes(momentum=0.9)
    assert not takes()
    assert not takes(momentum=0.9, nesterov=True)
