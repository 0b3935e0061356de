"""bitsandbytes' optimizers in the engine: against the library's own, and against its codes in float64."""

from __future__ import annotations

import importlib.util
import io
import warnings

import pytest
import torch

from lowmem.optim import FRUGAL, AdamW, AdamW8bit, GaLore, Lion8bit, build_optimizer, library_codes
from tests.optim.cases import as_parameters
from tests.reference import bitsandbytes_codes as reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes", reason="these are bitsandbytes' optimizers")

SHAPES = [(64, 100), (70, 61), (5000,), (3, 40, 50), (4096,), (4095,), (12, 20), (1,)]
"""Blocks that are whole and blocks that are not, one to three dimensions, and sizes around the smallest with codes."""

PAIRS = {
    "adamw8bit": (AdamW8bit, bnb.optim.AdamW8bit, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw8bit, other betas": (AdamW8bit, bnb.optim.AdamW8bit, {"betas": (0.8, 0.95), "eps": 1e-4}),
    "lion8bit": (Lion8bit, bnb.optim.Lion8bit, {"lr": 1e-3, "weight_decay": 0.1}),
}
TABLE_STEP = 2 / 2**16
"""On a CPU the library looks codes up in a table of so wide steps from -1 to 1, in shares of the scale."""

each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
each_of_ours = pytest.mark.parametrize("make", [AdamW8bit, Lion8bit])


def weights(shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(step, shapes=SHAPES):
    """Some values are a thousand times larger than their neighbours, some are 0, as all of one tensor are at first."""
    generator = torch.Generator().manual_seed(1000 + step)
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    for each in found:
        flat = each.view(-1)
        flat[::17] *= 1000
        flat[5::11] = 0
    if step == 0:
        found[0].zero_()
    return found


def run(optimizer, params, steps, shapes=SHAPES):
    for step in steps:
        for param, grad in zip(params, gradients(step, shapes), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


@each_pair
def test_thirty_steps_on_float32_weights_are_those_of_the_library(pair):
    """Codes and scales bit for bit, weights up to float32's rounding: the decay and the step are rounded separately."""
    make, theirs, settings = pair
    params, others = as_parameters(weights()), as_parameters(weights())
    ours, library = make(params, **settings), theirs(others, **settings)
    run(ours, params, range(30)), run(library, others, range(30))
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)
        state, expected = ours.state[param], library.state[other]
        if param.numel() < 4096:
            assert state["exp_avg"].dtype == expected["state1"].dtype == torch.float32
            largest = expected["state1"].abs().max().item()
            torch.testing.assert_close(state["exp_avg"], expected["state1"], rtol=0, atol=1e-6 * largest)
            continue
        for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
            if name in state:
                assert torch.equal(state[name], expected[f"state{number}"])
                assert torch.equal(state[f"{name}_scale"], expected[f"absmax{number}"])


@each_pair
def test_bfloat16_weights_to_nearest_stay_near_those_of_the_library(pair):
    """The library's kernel and ours round the same float32 weight, but for the order above, once a step."""
    make, theirs, settings = pair
    params = as_parameters([each.bfloat16() for each in weights()])
    others = as_parameters([each.bfloat16() for each in weights()])
    ours, library = make(params, **settings, rounding="nearest"), theirs(others, **settings)
    run(ours, params, range(10)), run(library, others, range(10))
    different = sum((a != b).sum().item() for a, b in zip(params, others, strict=True))
    assert different < 1e-3 * sum(param.numel() for param in params)


def test_the_levels_of_the_reference_are_those_of_the_library():
    for signed in (True, False):
        levels = library_codes.code_levels(torch.device("cpu"), signed=signed)
        torch.testing.assert_close(reference.levels(signed=signed), levels.double(), rtol=1e-6, atol=0)


def test_codes_are_read_and_written_as_the_reference_does():
    """For what asks for float32: state that goes from one division over processes to another."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(10, 70, generator=generator) * torch.logspace(-3, 2, 70)
    for signed in (True, False):
        codec = library_codes.LibraryBlocks(name="m", shape=(10, 70), signed=signed)
        stored, given = codec.allocate(torch.device("cpu")), values if signed else values.abs()
        assert not codec.load(stored).any()
        codec.save_(stored, given, slice(None), None)
        torch.testing.assert_close(stored["m_scale"].double(), reference.scales_of(given))
        assert reference.excess(stored["m"], given, signed=signed).max() < TABLE_STEP
        expected = reference.decoded(stored["m"], stored["m_scale"], signed=signed)
        torch.testing.assert_close(codec.load(stored).view(-1).double(), expected, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(
            codec.load(stored, slice(256, 700)).double(), expected[256:], rtol=1e-5, atol=1e-9
        )


@each_of_ours
def test_each_step_is_that_of_the_paper_on_what_the_codes_stand_for(make):
    """Step by step from the same state, for whichever of two codes is taken moves all that follows."""
    shapes, lr = SHAPES[:4], 1e-2
    params = as_parameters(weights(shapes))
    optimizer = make(params, lr=lr, weight_decay=0.0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    run(optimizer, params, range(1), shapes)
    for step in range(1, 8):
        before = [param.detach().double() for param in params]
        states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
        run(optimizer, params, [step], shapes)
        for param, start, state, g in zip(params, before, states, gradients(step, shapes), strict=True):
            g = g.double().view(-1)
            m = reference.decoded(state["exp_avg"], state["exp_avg_scale"], signed=True)
            if make is Lion8bit:
                u = (beta1 * m + (1 - beta1) * g).sign()
                means = {"exp_avg": beta2 * m + (1 - beta2) * g}
            else:
                v = reference.decoded(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False)
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
                root = (v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
                u, means = m / (1 - beta1 ** (step + 1)) / root, {"exp_avg": m, "exp_avg_sq": v}
            torch.testing.assert_close(
                param.detach().double(), start - lr * u.view_as(start), rtol=1e-6, atol=1e-6
            )
            for name, mean in means.items():
                found, signed = optimizer.state[param], name == "exp_avg"
                scales = found[f"{name}_scale"].double()
                torch.testing.assert_close(scales, reference.scales_of(mean), rtol=1e-6, atol=0)
                assert reference.excess(found[name], mean, signed=signed).max() < TABLE_STEP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_of_ours
def test_what_is_saved_has_its_dtypes_after_a_load_and_goes_on_with_the_same_bits(make, dtype):
    params = as_parameters([each.to(dtype) for each in weights()])
    optimizer = make(params, lr=1e-3)
    run(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copies = as_parameters(params)
    resumed = make(copies, lr=1e-3)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert {value.dtype for value in resumed.state[copies[0]].values()} == {torch.uint8, torch.float32}
    assert {value.dtype for value in resumed.state[copies[-1]].values()} == {torch.float32}
    run(optimizer, params, range(4, 9)), run(resumed, copies, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_zero_gradients_leave_zero_moments_and_the_weight_but_for_its_decay():
    for make in (AdamW8bit, Lion8bit):
        (param,) = as_parameters([torch.ones(5000)])
        optimizer = make([param], lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        torch.testing.assert_close(param.detach(), torch.full((5000,), (1 - 1e-3) ** 3))
        assert not optimizer.state[param]["exp_avg_scale"].any()


def test_moments_take_two_bytes_a_value_and_scales_eight_for_a_block():
    (param,) = as_parameters([torch.zeros(40, 256)])
    step = 4
    assert AdamW8bit([param]).state_bytes() == 2 * 40 * 256 + 8 * 40 + step
    assert Lion8bit([param]).state_bytes() == 40 * 256 + 4 * 40 + step
    assert AdamW8bit([param], min_8bit_size=40 * 256 + 1).state_bytes() == 8 * 40 * 256 + step


def test_a_fallback_and_a_head_may_have_other_moments():
    model = torch.nn.Sequential(
        torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 100)
    )
    wide = {"name": "adamw", "storage": {"moment": "fp32", "variance": "fp32"}}
    optimizer = build_optimizer(model, "adamw8bit", lr=1e-3, target=["1", "2"], fallback=wide)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model[2].weight]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("make", "instead"),
    [
        (AdamW8bit, "adamw with storage {moment: int8, variance: int8}"),
        (Lion8bit, "frugal with density 1.0, inner lion and storage {moment: int8}"),
        (lambda params: GaLore([{"params": params, "algorithm": "adamw8bit"}]), "adamw with storage"),
    ],
    ids=["adamw8bit", "lion8bit", "adamw8bit in a group"],
)
def test_without_the_library_construction_names_how_to_get_it_and_what_needs_none(make, instead, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        library_codes, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ValueError, match="pip install 'bitsandbytes>=0.50'") as raised:
        make([torch.nn.Parameter(torch.zeros(8, 8))])
    assert instead in str(raised.value)
    AdamW([torch.nn.Parameter(torch.zeros(8, 8))], storage={"moment": "int8", "variance": "int8"})
    FRUGAL([torch.nn.Parameter(torch.zeros(8, 8))], density=1.0, inner="lion", storage={"moment": "int8"})
