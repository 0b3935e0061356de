"""Plain, project and fused make the same steps, and hold the gradients that they say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem.errors import RefusedError
from lowmem.memory.measure import TrackedMeter
from lowmem.optim import build_optimizer
from lowmem.run.choose import (
    COMPILED_AS_A_WHOLE,
    EXECUTIONS,
    SCALED,
    Situation,
    chosen_mode,
    gradient_bytes,
    objection,
    situation_of,
)
from tests.optim.cases import CASES, LOW_BIT, LOW_BIT_CASES, case_id

WIDTH, DEPTH = 24, 3


class Block(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp_up = nn.Linear(width, 2 * width)
        self.mlp_down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.mlp_down(torch.tanh(self.mlp_up(self.norm(x))))


class Net(nn.Module):
    """Token embedding, blocks, and a head tied to the embedding."""

    def __init__(self, depth: int = DEPTH, width: int = WIDTH, recompute: bool = False):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.recompute = recompute

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = (x @ self.embed.weight.T).flatten(0, 1)
        return nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), ids.roll(-1, 1).flatten()
        )


def net(dtype=torch.float32, **shape) -> Net:
    torch.manual_seed(0)
    return Net(**shape).to(dtype)


def batches(steps: int, micro_batches: int, rows: int = 2):
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randint(11, (rows, 7), generator=generator) for _ in range(micro_batches)]
        for _ in range(steps)
    ]


def optimizer_for(case, model):
    name, settings = case
    settings = {key: value for key, value in settings.items() if key != "lr"}
    return build_optimizer(model, name, lr=3e-3, target=["mlp"], **settings)


GALORE = ("galore", {"rank": 4, "refresh_every": 9})


def execution_for(mode, optimizer, model, **settings):
    execution = EXECUTIONS[mode](optimizer, **settings)
    execution.attach(model)
    return execution


def train(model, optimizer, execution, data, meter=None, on_norms=None):
    """What a Trainer does, without a Trainer."""
    for micro_batches in data:
        for number, ids in enumerate(micro_batches):
            execution.begin_micro_batch(is_first=number == 0, is_last=number == len(micro_batches) - 1)
            (model(ids) / len(micro_batches)).backward()
        norms = execution.finish_backward()
        if on_norms is not None:
            on_norms(norms)
        optimizer.step()
        model.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def run(mode, case, data, *, dtype=torch.float32, recompute=False, **settings):
    model = net(dtype, recompute=recompute)
    optimizer = optimizer_for(case, model)
    return train(model, optimizer, execution_for(mode, optimizer, model, **settings), data)


def furthest(ours, theirs) -> float:
    """Largest difference relative to how far the weights have moved at all."""
    start = list(net().parameters())
    moved = max((one - begin).abs().max().item() for one, begin in zip(theirs, start, strict=True))
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / moved


def adds_to_momentum(case) -> bool:
    model = net()
    at = situation_of(optimizer_for(case, model), micro_batches=4, clip="applied", max_norm=None)
    return at.accumulates


# ------------------------------------------------------------------ the same steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES + LOW_BIT_CASES, ids=case_id)
def test_fused_makes_the_bits_of_plain_for_every_optimizer(case, dtype):
    data = batches(20, 1)
    plain, fused = run("plain", case, data, dtype=dtype), run("fused", case, data, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


@pytest.mark.parametrize(
    ("mode", "clip"), [("plain", "full"), ("plain", "applied"), ("project", "applied"), ("fused", "tensor")]
)
def test_a_float64_model_is_clipped_like_a_float32_one(mode, clip):
    ours, theirs = (
        run(mode, GALORE, batches(6, 1), dtype=dtype, clip=clip, max_norm=0.05)
        for dtype in (torch.float64, torch.float32)
    )
    assert all(each.dtype == torch.float64 for each in ours)
    assert furthest([each.float() for each in ours], theirs) < 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if not adds_to_momentum(case)], ids=case_id)
def test_fused_with_accumulation_makes_the_bits_of_plain(case):
    data = batches(10, 3)
    plain, fused = run("plain", case, data), run("fused", case, data)
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


PROJECTED = [
    GALORE,
    ("galore", {"rank": 4, "refresh_every": 9, "stagger": False, "projection": "svd"}),
    ("galore", {"rank": 4, "refresh_every": 9, "on_refresh": "rotate", "weight_decay": 0.1}),
    ("galore", {"rank": 4, "refresh_every": 9, "on_refresh": "reset", "scale": 0.5}),
    (
        "galore",
        {
            "rank": 4,
            "refresh_every": 9,
            "storage": {"moment": "bf16", "basis": "bf16"},
            "rounding": "nearest",
        },
    ),
    ("galore", {"rank": 4, "refresh_every": 9, "storage": LOW_BIT, "rounding": "nearest"}),
]


def apart(ours, theirs, order: float) -> float:
    """The norm of the difference relative to that of the weights, of the worst tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).norm(p=order) / b.norm(p=order)).item() for a, b in pairs)


class GivenGradients(Net):
    """Its gradients are random numbers that do not depend on the weights."""

    def forward(self, ids):
        draw = torch.Generator().manual_seed(int((ids.flatten() * torch.arange(1, 15)).sum()))
        return (
            sum((param * torch.randn(param.shape, generator=draw)).sum() for param in self.parameters()) / 100
        )


def with_given_gradients(mode, case, data, **settings):
    torch.manual_seed(0)
    model = GivenGradients()
    optimizer = optimizer_for(case, model)
    return train(model, optimizer, execution_for(mode, optimizer, model, **settings), data)


each_projection = pytest.mark.parametrize("case", PROJECTED, ids=case_id)
each_refresh = pytest.mark.parametrize("refresh_from", ["boundary", "first_micro_batch"])


@each_refresh
@each_projection
def test_project_with_accumulation_equals_plain_over_several_refreshes(case, refresh_from):
    """Within 1e-6 of the largest value of each tensor: nothing but the order of the sums differs."""
    data = batches(30, 4)
    plain, project = (
        with_given_gradients(mode, case, data, refresh_from=refresh_from) for mode in ("plain", "project")
    )
    coarse = "storage" in case[1]  # a sum rounded the other way in bf16 is one unit in its last place
    assert apart(project, plain, order=math.inf) < (1e-2 if coarse else 1e-6)


@each_refresh
@each_projection
def test_project_with_accumulation_trains_a_network_as_plain_does(case, refresh_from):
    """Training amplifies a rounding; here plain steps differ by as much when their micro-batches change places."""
    data = batches(30, 4)
    plain, project = (run(mode, case, data, refresh_from=refresh_from) for mode in ("plain", "project"))
    coarse = "storage" in case[1]
    assert apart(project, plain, order=2) < (1e-2 if coarse else 1e-6)


@pytest.mark.parametrize("mode", ["project", "fused"])
def test_recomputed_activations_change_nothing(mode):
    data = batches(12, 2)
    assert furthest(run(mode, GALORE, data, recompute=True), run(mode, GALORE, data)) < 1e-6


@pytest.mark.parametrize("accumulator", ["bf16", "fp32"])
def test_the_accumulator_has_the_dtype_that_was_asked_for(accumulator):
    model = net(torch.float32)
    optimizer = optimizer_for(("galore", {"rank": 4, "accumulator": accumulator}), model)
    execution = execution_for("project", optimizer, model)
    for number, ids in enumerate(batches(1, 2)[0]):
        execution.begin_micro_batch(is_first=number == 0, is_last=number == 1)
        model(ids).backward()
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}[accumulator]
    assert {each.dtype for each in optimizer.projected.values()} == {expected}
    assert len(optimizer.projected) == 2 * DEPTH


def test_an_accumulator_in_bfloat16_holds_the_sum_of_projected_gradients_to_its_precision():
    micro_batches = batches(1, 4)[0]
    sums = {}
    for accumulator in ("bf16", "fp32"):
        model = net(torch.float32)
        optimizer = optimizer_for(("galore", {"rank": 4, "accumulator": accumulator}), model)
        execution = execution_for("project", optimizer, model)
        for number, ids in enumerate(micro_batches):
            execution.begin_micro_batch(is_first=number == 0, is_last=number == 3)
            model(ids).backward()
        sums[accumulator] = list(optimizer.projected.values())
    assert len(sums["bf16"]) == 2 * DEPTH
    for low, full in zip(sums["bf16"], sums["fp32"], strict=True):
        error = (low.double() - full.double()).norm() / full.double().norm()
        assert 0 < error < 4 * 2**-8, "rounded at each of four additions, and no worse"


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clip", ["applied", "tensor"])
def test_clipping_is_the_same_in_plain_and_project(clip, micro_batches):
    data = batches(15, micro_batches)
    plain, project = (run(mode, GALORE, data, clip=clip, max_norm=0.05) for mode in ("plain", "project"))
    assert furthest(project, plain) < 1e-5
    assert furthest(plain, run("plain", GALORE, data)) > 1e-3, (
        "the clipping must bite for this to mean anything"
    )


def test_clipping_each_tensor_is_the_same_in_fused():
    data = batches(15, 1)
    plain, fused = (run(mode, GALORE, data, clip="tensor", max_norm=0.05) for mode in ("plain", "fused"))
    assert furthest(fused, plain) < 1e-6


def after_one_clipped_step(name, **settings):
    """The model, its optimizer, what was taken from each parameter at learning rate 1, and the norms."""
    clipping = {key: settings.pop(key) for key in ("clip", "max_norm")}
    torch.manual_seed(0)
    model = GivenGradients()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = build_optimizer(model, name, lr=1.0, target=["mlp"], **settings)
    seen = []
    execution = execution_for("plain", optimizer, model, **clipping)
    train(model, optimizer, execution, batches(1, 1), on_norms=seen.append)
    return model, optimizer, [old - new for old, new in zip(before, model.parameters(), strict=True)], seen[0]


def norm_of(tensors) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@pytest.mark.parametrize("clip", ["applied", "full"])
def test_the_applied_update_has_the_norm_that_was_asked_for(clip):
    """SGD's step is lr times the clipped gradient, so what moved measures the clipping itself."""
    _, _, moved, norms = after_one_clipped_step("sgd", clip=clip, max_norm=0.01)
    assert norms.applied > 0.02
    assert norm_of(moved) == pytest.approx(0.01, rel=1e-4)


def test_the_applied_update_of_each_tensor_has_the_root_mean_square_that_was_asked_for():
    model = GivenGradients()
    model(batches(1, 1)[0][0]).backward()
    grads = [param.grad for param in model.parameters()]
    limit = norm_of(grads)  # so that some tensors are above the mean square of all, and others below
    bounds = [limit * math.sqrt(grad.numel() / sum(each.numel() for each in grads)) for grad in grads]
    expected = [min(grad.norm().item(), most) for grad, most in zip(grads, bounds, strict=True)]
    assert 0 < sum(norm == most for norm, most in zip(expected, bounds, strict=True)) < len(grads)
    _, _, moved, _ = after_one_clipped_step("sgd", clip="tensor", max_norm=limit)
    assert [one.norm().item() for one in moved] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("clip", ["applied", "full"])
def test_what_galore_applies_is_clipped_by_the_norm_of_what_it_projects_or_of_the_whole(clip):
    """Adam's first moment after one step is (1 - beta1) times the projected gradient that it was given."""
    settings = {"rank": 4, "fallback": {"name": "sgd"}, "betas": [0.9, 0.999]}
    model, optimizer, moved, norms = after_one_clipped_step("galore", clip=clip, max_norm=0.01, **settings)
    projected = {
        param: state["exp_avg"] / 0.1 for param, state in optimizer.state.items() if "exp_avg" in state
    }
    assert len(projected) == 2 * DEPTH
    others = [one for one, param in zip(moved, model.parameters(), strict=True) if param not in projected]
    applied = norm_of([*projected.values(), *others])
    if clip == "applied":
        assert norms.applied < 0.9 * norms.full
        assert applied == pytest.approx(0.01, rel=1e-3)
    else:
        unclipped = after_one_clipped_step("galore", clip="applied", max_norm=1e9, **settings)[-1].applied
        assert applied == pytest.approx(0.01 * unclipped.item() / norms.full.item(), rel=1e-3)


def test_both_norms_are_given_and_an_unknown_one_is_none():
    def norms(mode, micro_batches):
        model, seen = net(), []
        optimizer = optimizer_for(GALORE, model)
        train(
            model,
            optimizer,
            execution_for(mode, optimizer, model),
            batches(1, micro_batches),
            on_norms=seen.append,
        )
        return seen[0]

    plain = norms("plain", 1)
    model = net()
    model(batches(1, 1)[0][0]).backward()
    by_torch = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    assert plain.full == pytest.approx(by_torch.item(), rel=1e-6)
    assert plain.applied is None, "nothing has been projected yet"
    project = norms("project", 1)
    assert project.full == pytest.approx(by_torch.item(), rel=1e-6)
    assert project.applied < project.full
    assert norms("project", 2).full is None
    assert norms("fused", 1).applied is None


# ------------------------------------------------------------------ gradients that live


@pytest.mark.parametrize("mode", ["plain", "project", "fused"])
def test_one_layers_gradient_at_a_time_is_alive(mode):
    model = net(depth=12, width=64)
    meter = TrackedMeter(model)
    optimizer = build_optimizer(model, "galore", lr=1e-3, rank=4, target=["mlp"])
    meter.watch(optimizer)
    execution = execution_for(mode, optimizer, model)
    data = batches(3, 2 if mode == "project" else 1)
    for micro_batches in data:
        with meter.step():
            for number, ids in enumerate(micro_batches):
                execution.begin_micro_batch(is_first=number == 0, is_last=number == len(micro_batches) - 1)
                with meter.phase("forward"):
                    loss = model(ids)
                with meter.phase("backward"):
                    loss.backward()
                del loss
            with meter.phase("optimizer"):
                execution.finish_backward()
                optimizer.step()
            model.zero_grad()
    held = meter.measured().parts["gradients"]
    matrix = 64 * 128 * 4
    everything = sum(param.nbytes for param in model.parameters())
    others = everything - 24 * matrix
    accumulators = 24 * 4 * 128 * 4
    if mode == "plain":
        assert held >= 0.9 * everything
    elif mode == "project":
        assert held <= accumulators + others + matrix + 512 * 100
    else:
        # The head of this model takes the embedding's weight by itself, and that part waits for the embedding's.
        assert held <= matrix + model.embed.weight.nbytes + 512 * 4


def test_gradient_bytes_are_those_of_the_tensors_that_are_held():
    model = net()
    optimizer = optimizer_for(GALORE, model)
    whole = sum(param.nbytes for param in model.parameters())
    one = situation_of(optimizer, micro_batches=1, clip="applied", max_norm=None)
    assert gradient_bytes(optimizer, "plain", one) == whole
    assert gradient_bytes(optimizer, "fused", one) == 2 * WIDTH * WIDTH * 4
    execution = execution_for("project", optimizer, model)
    execution.begin_micro_batch(is_first=True, is_last=True)
    model(batches(1, 1)[0][0]).backward()
    held = [*optimizer.projected.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert gradient_bytes(optimizer, "project", one) == sum(tensor.nbytes for tensor in held)


# ------------------------------------------------------------------ odd models and moments


@pytest.mark.parametrize("mode", ["project", "fused"])
def test_a_weight_used_twice_is_updated_once_and_a_frozen_one_not_at_all(mode):
    model = net()
    model.blocks[1] = model.blocks[0]
    model.blocks[2].requires_grad_(False)
    frozen = copy.deepcopy(model.blocks[2].state_dict())
    optimizer = optimizer_for(GALORE, model)
    train(model, optimizer, execution_for(mode, optimizer, model), batches(4, 1))
    counts = {int(state["step"]) for state in optimizer.state.values() if state}
    assert counts == {4}
    assert all(torch.equal(value, frozen[name]) for name, value in model.blocks[2].state_dict().items())


@pytest.mark.parametrize("mode", ["project", "fused"])
def test_schedulers_are_followed_step_by_step_also_after_loading(mode):
    def steps(mode):
        model = net()
        optimizer = optimizer_for(GALORE, model)
        execution = execution_for(mode, optimizer, model)
        optimizer.load_state_dict(optimizer.state_dict())  # puts other groups in the place of the first
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for micro_batches in batches(6, 1):
            result = train(model, optimizer, execution, [micro_batches])
            schedule.step()
        return result

    assert furthest(steps(mode), steps("plain")) < 1e-6


@pytest.mark.parametrize("mode", ["plain", "project", "fused"])
def test_a_state_saved_between_steps_goes_on_as_if_it_had_not_been(mode):
    data = batches(12, 2)
    whole = run(mode, GALORE, data)
    model = net()
    optimizer = optimizer_for(GALORE, model)
    train(model, optimizer, execution_for(mode, optimizer, model), data[:5])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model = net()
    model.load_state_dict(weights)
    optimizer = optimizer_for(GALORE, model)
    optimizer.load_state_dict(state)
    rest = train(model, optimizer, execution_for(mode, optimizer, model), data[5:])
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))


def train_and_skip(model, optimizer, execution, data, skipped):
    """Steps in `skipped` are left out, as a Trainer does with gradients that are not finite."""
    for number, micro_batches in data:
        if number in skipped:
            optimizer.skip_next_step()
        result = train(model, optimizer, execution, [micro_batches])
    return result


@pytest.mark.parametrize("refresh_from", ["boundary", "first_micro_batch"])
@pytest.mark.parametrize("mode", ["plain", "project"])
@pytest.mark.parametrize("name", ["galore", "q_galore"])
def test_a_run_resumed_after_a_skipped_step_that_had_refreshed_is_the_run_that_was_not_stopped(
    name, mode, refresh_from
):
    case = (name, {"rank": 4, "refresh_every": 3, "stagger": False})
    data, skipped = list(enumerate(batches(12, 2))), {0, 4}  # the refreshes of steps 1 and 4
    clipped = {"max_norm": 0.05, "refresh_from": refresh_from}

    def begun():
        model = net()
        optimizer = optimizer_for(case, model)
        return model, optimizer, execution_for(mode, optimizer, model, **clipped)

    whole = train_and_skip(*begun(), data, skipped)
    for stop in range(1, 7):
        model, optimizer, execution = begun()
        train_and_skip(model, optimizer, execution, data[:stop], skipped)
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        model, optimizer, execution = begun()
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        rest = train_and_skip(model, optimizer, execution, data[stop:], skipped)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True)), stop


def test_a_refresh_from_a_gradient_that_is_not_finite_is_made_again_in_the_next_step():
    model = net()
    optimizer = optimizer_for(("galore", {"rank": 4, "refresh_every": 3, "stagger": False}), model)
    execution = execution_for("project", optimizer, model)
    data = batches(5, 2)
    train(model, optimizer, execution, data[:3])
    param = model.blocks[0].mlp_up.weight
    basis = optimizer.state[param]["basis"].clone()
    broken = param.register_hook(lambda grad: grad * math.nan)
    optimizer.skip_next_step()
    train(model, optimizer, execution, [data[3]])
    broken.remove()
    assert torch.equal(optimizer.state[param]["basis"], basis)
    train(model, optimizer, execution, [data[4]])
    assert not torch.equal(optimizer.state[param]["basis"], basis)


@pytest.mark.parametrize("mode", ["plain", "project"])
def test_a_skipped_step_changes_nothing_and_leaves_nothing(mode):
    model = net()
    optimizer = optimizer_for(GALORE, model)
    execution = execution_for(mode, optimizer, model)
    train(model, optimizer, execution, batches(2, 2))
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.skip_next_step()
    after = train(model, optimizer, execution, batches(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not optimizer.projected
    assert not torch.equal(train(model, optimizer, execution, batches(1, 2))[0], before[0])


def test_detached_hooks_do_nothing():
    model = net()
    optimizer = optimizer_for(GALORE, model)
    execution = execution_for("fused", optimizer, model)
    execution.detach()
    model(batches(1, 1)[0][0]).backward()
    assert all(param.grad is not None for param in model.parameters())


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("situation", "mode"),
    [
        (Situation(is_projected=True, micro_batches=1, clip="applied", clips=False), "fused"),
        (Situation(is_projected=True, micro_batches=1, clip="tensor", clips=True), "fused"),
        (Situation(is_projected=True, micro_batches=1, clip="applied", clips=True), "project"),
        (Situation(is_projected=True, micro_batches=1, clip="full", clips=True), "project"),
        (Situation(is_projected=True, micro_batches=8, clip="applied", clips=True), "project"),
        (Situation(is_projected=True, micro_batches=8, clip="full", clips=True), "plain"),
        (Situation(is_projected=False, micro_batches=1, clip="applied", clips=False), "fused"),
        (
            Situation(
                is_projected=True,
                micro_batches=1,
                clip="applied",
                clips=False,
                keeps_gradients="something does",
            ),
            "plain",
        ),
        (Situation(is_projected=False, micro_batches=1, clip="applied", clips=True), "plain"),
        (Situation(is_projected=False, micro_batches=8, clip="applied", clips=False), "plain"),
        (
            Situation(is_projected=False, micro_batches=8, clip="applied", clips=False, accumulates=True),
            "fused",
        ),
        (
            Situation(is_projected=False, micro_batches=8, clip="tensor", clips=True, accumulates=True),
            "plain",
        ),
        (
            Situation(is_projected=False, micro_batches=8, clip="applied", clips=True, accumulates=True),
            "plain",
        ),
    ],
    ids=str,
)
def test_auto_takes_the_leanest_way_that_does_what_is_asked(situation, mode):
    assert chosen_mode("auto", situation) == mode
    assert objection(mode, situation) is None


@pytest.mark.parametrize(
    ("mode", "situation", "says"),
    [
        ("fused", Situation(True, 1, "applied", True), "optimizer.clip: tensor"),
        ("project", Situation(False, 4, "applied", True), "such as galore"),
        ("project", Situation(True, 4, "full", True), "optimizer.clip: applied or tensor"),
        (
            "fused",
            Situation(True, 1, "applied", False, keeps_gradients=COMPILED_AS_A_WHOLE),
            "layers one by one",
        ),
        ("project", Situation(True, 1, "applied", True, keeps_gradients=SCALED), "Train in bfloat16, or use"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_that_does(mode, situation, says):
    with pytest.raises(RefusedError, match=says):
        chosen_mode(mode, situation)


def test_fused_cannot_clip_by_a_norm_that_comes_after_the_update():
    """The experiment behind the refusal: when the first parameter is updated, gradients are still missing."""
    model = net()
    missing = []
    first = list(model.parameters())[-1]
    first.register_post_accumulate_grad_hook(
        lambda _: missing.extend(param for param in model.parameters() if param.grad is None)
    )
    model(batches(1, 1)[0][0]).backward()
    assert missing


def test_the_norm_of_a_step_cannot_be_had_from_its_micro_batches():
    """The experiment behind the refusal of `full` in project: the same norms of the parts, other norms of the sum."""

    def norms(parts):
        whole = sum(parts)
        return [part.norm().item() for part in parts], whole.norm().item()

    G = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    (parts, whole), (others, other_whole) = norms([G, G]), norms([G, -G])
    assert parts == others
    assert whole == pytest.approx(2 * parts[0])
    assert other_whole == 0
