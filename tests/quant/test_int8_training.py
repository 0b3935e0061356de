"""Int8 weights under every optimizer and execution: the right steps, nothing float beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem.memory.measure import TrackedMeter
from lowmem.optim import SGD, build_optimizer
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.quant.int8_embedding import Int8Embedding, Int8TiedLinear
from lowmem.quant.int8_linear import Int8Linear
from tests.optim.cases import CASES, case_id
from tests.optim.live_bytes import PeakOfNewBytes
from tests.optim.test_temporaries import WHITENED
from tests.reference import int8_weights as reference
from tests.run.test_execution import GALORE, Net, batches, execution_for, optimizer_for, train

MIB = 1 << 20


def int8_net(dtype=torch.float32, *, tied=True, recompute=False, depth=3, width=24, group=16) -> Net:
    """The tests' small network with its linear layers, and its tied table, in int8."""
    torch.manual_seed(0)
    model = Net(depth=depth, width=width, recompute=recompute).to(dtype)
    for block in model.blocks:
        block.mlp_up = Int8Linear.from_linear(block.mlp_up, group_size=group)
        block.mlp_down = Int8Linear.from_linear(block.mlp_down, group_size=group)
    if tied:
        model.embed = Int8Embedding.from_embedding(model.embed, group_size=group)
        model.head = Int8TiedLinear(model.embed)
        model.forward = lambda ids: _loss(model, ids)
    return model


def _loss(model, ids):
    x = model.embed(ids)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False) if model.recompute else block(x)
    return nn.functional.cross_entropy(model.head(x).flatten(0, 1).float(), ids.roll(-1, 1).flatten())


def codes_of(model) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def run(mode, case, data, *, dtype=torch.float32, recompute=False, **settings):
    model = int8_net(dtype, recompute=recompute)
    optimizer = optimizer_for(case, model)
    train(model, optimizer, execution_for(mode, optimizer, model, **settings), data)
    return codes_of(model)


def equal(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------ the right steps


def test_steps_to_nearest_are_those_of_the_float64_reference():
    torch.manual_seed(0)
    layer = Int8Linear.from_linear(nn.Linear(37, 20, bias=False), group_size=16)
    optimizer = SGD([layer.weight], lr=0.05, weight_decay=0.1, rounding="nearest")
    codes, scales = layer.weight_codes.double(), layer.weight_scales.double()
    for step in range(10):
        grad = torch.randn(20, 37, generator=torch.Generator().manual_seed(step))
        layer.held.grad = grad.clone()
        optimizer.step()
        codes, scales = reference.sgd_step(codes, scales, grad, 0.05, 0.1, 16)
        assert torch.allclose(layer.weight_scales.double(), scales, rtol=1e-5)
        assert ((layer.weight_codes.double() - codes).abs() <= 1).all(), (
            "but for a tie, rounded the other way"
        )
        codes, scales = layer.weight_codes.double(), layer.weight_scales.double()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_optimizer_follows_the_float_run_within_the_rounding(case):
    """The same network in float, started from the int8 weights: the loss goes the same way."""
    data = batches(12, 1)

    def losses(model):
        optimizer, found = optimizer_for(case, model), []
        for (ids,) in data:
            loss = model(ids)
            loss.backward()
            found.append(loss.item())
            optimizer.step()
            model.zero_grad()
        return torch.tensor(found)

    model, twin = int8_net(tied=False), Net()
    twin.load_state_dict(float_state_of(model))
    ours, theirs = losses(model), losses(twin)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    assert torch.allclose(ours, theirs, rtol=0.05)
    assert (theirs[0] - theirs).abs().max() > 0.2 * theirs[0], "the loss must move for this to mean anything"


def float_state_of(model):
    """The state of the float network that an int8 network stands for."""
    state = {
        name: value
        for name, value in model.state_dict().items()
        if name.rpartition("_")[2] not in ("codes", "scales")
    }
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            state[f"{name}.weight"] = module.dequantized()
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_fused_makes_the_bits_of_plain(case, dtype):
    data = batches(6, 1)
    assert equal(run("plain", case, data, dtype=dtype), run("fused", case, data, dtype=dtype))


def test_project_with_accumulation_follows_plain():
    data = batches(12, 3)
    plain, project = run("plain", GALORE, data), run("project", GALORE, data)
    for ours, theirs in zip(project, plain, strict=True):
        if ours.dtype == torch.int8:
            assert (ours.int() - theirs.int()).abs().max() <= 1
            assert (ours != theirs).float().mean() < 0.01
        else:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["plain", "project", "fused"])
def test_recomputed_activations_change_nothing(mode):
    data = batches(5, 1)
    assert equal(run(mode, GALORE, data, recompute=True), run(mode, GALORE, data))


@pytest.mark.parametrize("mode", ["plain", "project", "fused"])
def test_a_run_cut_in_two_makes_the_bits_of_a_whole_one(mode):
    data = batches(10, 1)
    whole = run(mode, GALORE, data)
    model = int8_net()
    optimizer = optimizer_for(GALORE, model)
    train(model, optimizer, execution_for(mode, optimizer, model), data[:4])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model = int8_net()
    model.load_state_dict(weights)
    optimizer = optimizer_for(GALORE, model)
    optimizer.load_state_dict(state)
    train(model, optimizer, execution_for(mode, optimizer, model), data[4:])
    assert equal(codes_of(model), whole)


def test_a_skipped_step_changes_nothing_and_leaves_no_gradient():
    model = int8_net()
    optimizer = optimizer_for(("sgd", {}), model)
    before = codes_of(model)
    model(batches(1, 1)[0][0]).backward()
    optimizer.skip_next_step()
    optimizer.step()
    assert equal(codes_of(model), before)
    assert all(block.mlp_up.held.grad is None for block in model.blocks)


@pytest.mark.parametrize("clip", ["applied", "full", "tensor"])
def test_clipping_reaches_int8_weights(clip):
    def moved(max_norm):
        model = int8_net()
        before = model.blocks[0].mlp_up.dequantized()
        optimizer = build_optimizer(model, "sgd", lr=1.0)
        train(
            model,
            optimizer,
            execution_for("plain", optimizer, model, clip=clip, max_norm=max_norm),
            batches(1, 1),
        )
        return (model.blocks[0].mlp_up.dequantized() - before).norm().item()

    assert moved(0.01) < 0.7 * moved(None)


def test_norms_and_biases_are_not_decayed_and_int8_matrices_are():
    model = int8_net()
    optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1)
    decayed = {
        param for group in optimizer.param_groups if group["weight_decay"] for param in group["params"]
    }
    assert decayed == {
        module.weight for module in model.modules() if isinstance(module, Int8Linear | Int8Embedding)
    }


# ------------------------------------------------------------------ what is alive


def test_fused_holds_one_gradient_and_no_float_weight():
    model = int8_net(torch.bfloat16, depth=8, width=64, tied=False)
    meter = TrackedMeter(model)
    optimizer = build_optimizer(model, "sgd", lr=1e-3)
    meter.watch(optimizer)
    execution = execution_for("fused", optimizer, model)
    for micro_batches in batches(2, 1):
        with meter.step():
            execution.begin_micro_batch(is_first=True, is_last=True)
            with meter.phase("forward"):
                loss = model(micro_batches[0])
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                execution.finish_backward()
                optimizer.step()
            model.zero_grad()
    parts = meter.measured().parts
    matrix = 64 * 128
    assert parts["gradients"] <= 2 * matrix + 512 * 8
    floats = sum(param.nbytes + 512 for param in model.parameters())
    assert parts["weights"] <= 16 * matrix * (1 + 4 / 16) + floats + 512 * 40


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in WHITENED])
def test_a_step_of_a_large_int8_matrix_needs_at_most_64_mib(name):
    """Tiles are made float, updated and rounded; the float32 matrix alone would be 172 MiB."""
    layer = Int8Linear(11008, 4096, bias=False, dtype=torch.bfloat16)
    optimizer = optimizer_class(name)([layer.weight], lr=1e-3)
    grad = torch.ones(4096, 11008, dtype=torch.bfloat16)
    grad[::7, ::3] = -1.0
    layer.held.grad = grad
    optimizer.step()
    layer.held.grad = grad
    with PeakOfNewBytes() as steady:
        optimizer.step()
    assert steady.peak <= 64 * MIB
    assert layer.weight_codes.any()


@pytest.mark.parametrize("name", WHITENED)
def test_whitening_an_int8_matrix_adds_matrices_of_its_smaller_side_alone(name, monkeypatch):
    """Of 512 x 1408, whose float32 copy would be 2.75 MiB, in tiles of 64 KiB."""
    for module in ("numerics.tiles", "quant.int8_weight"):
        monkeypatch.setattr(f"lowmem.{module}.TILE_NUMEL", 1 << 14)
    layer = Int8Linear(1408, 512, bias=False, dtype=torch.bfloat16)
    optimizer = optimizer_class(name)([layer.weight], lr=1e-3)
    for seed in range(2):
        layer.held.grad = torch.randn(512, 1408, generator=torch.Generator().manual_seed(seed)).bfloat16()
        with PeakOfNewBytes() as steady:
            optimizer.step()
    assert steady.peak <= WHITENED[name] * MIB + 8 * 65536
    assert layer.weight_codes.any()


def test_the_forward_and_backward_pass_hold_tiles_only():
    layer = Int8Linear(8192, 8192, bias=False, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    x = torch.zeros(4, 8192, dtype=torch.bfloat16, requires_grad=True)
    with PeakOfNewBytes() as peak:
        layer(x).sum().backward()
    assert peak.peak <= 48 * MIB, "the bfloat16 matrix alone would be 128 MiB"


# ------------------------------------------------------------------ compiled layers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's own, about what it traces
def test_layers_compiled_one_by_one_make_the_same_steps():
    def steps(compiled):
        model = int8_net()
        if compiled:
            for block in model.blocks:
                block.compile()
        optimizer = optimizer_for(("sgd", {}), model)
        train(model, optimizer, execution_for("fused", optimizer, model), batches(3, 1))
        return codes_of(model)

    for ours, theirs in zip(steps(True), steps(False), strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= (1 if ours.dtype == torch.int8 else 1e-4)
