"""FRUGAL by what has state, what is drawn and when it changes."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem.hf.make_optimizer import make_optimizer
from lowmem.memory.architecture import Architecture
from lowmem.memory.state_formulas import state_bytes, treatments
from lowmem.numerics.seeding import seeded_choice
from lowmem.optim import FRUGAL, AdamW, build_optimizer
from lowmem.recipe.load import load_recipe
from tests.optim.device_calls import WAITS, Calls
from tests.optim.live_bytes import PeakOfNewBytes

MIB = 1 << 20
SMALL_LLAMA = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
each_side = pytest.mark.parametrize("projection", ["columns", "rows"])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def stepped(optimizer: FRUGAL, weight: torch.nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
    """What one update subtracts from the weight."""
    before = weight.detach().clone()
    weight.grad = grad
    optimizer.step()
    return before - weight.detach()


def numbers(optimizer: FRUGAL, weight: torch.nn.Parameter) -> list[int]:
    return optimizer.state[weight]["chosen"].flatten().int().tolist()


# ------------------------------------------------------------------ what moves how


@each_side
def test_a_quarter_moves_as_adam_moves_it_and_the_rest_by_a_tenth_of_its_sign(projection):
    weight, whole = weight_of(12, 20), weight_of(12, 20)
    optimizer, adam = FRUGAL([weight], lr=1.0, projection=projection), AdamW([whole], lr=1.0, weight_decay=0)
    for seed in range(4):
        step = stepped(optimizer, weight, gaussian(12, 20, seed=seed))
        adams = stepped(adam, whole, gaussian(12, 20, seed=seed))
        chosen = numbers(optimizer, weight)
        if projection == "rows":
            step, adams = step.T, adams.T
        assert len(chosen) == step.shape[1] // 4
        others = [each for each in range(step.shape[1]) if each not in chosen]
        torch.testing.assert_close(step[:, chosen], adams[:, chosen], rtol=1e-5, atol=1e-5)
        signs = weight.grad.T.sign() if projection == "rows" else weight.grad.sign()
        torch.testing.assert_close(step[:, others], 0.1 * signs[:, others], rtol=1e-5, atol=1e-5)


def test_the_rest_moves_by_the_gradient_or_not_at_all():
    G = gaussian(8, 12)
    for residual, expected in (("sgd", 0.5 * G), ("none", 0 * G)):
        weight = weight_of(8, 12)
        optimizer = FRUGAL([weight], lr=1.0, residual=residual, residual_scale=0.5)
        step = stepped(optimizer, weight, G)
        others = [each for each in range(12) if each not in numbers(optimizer, weight)]
        torch.testing.assert_close(step[:, others], expected[:, others])


def test_at_density_one_it_is_adamw_to_the_bit():
    ours, theirs = weight_of(12, 20), weight_of(12, 20)
    a, b = FRUGAL([ours], lr=1e-2, density=1.0, refresh_every=2), AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for seed in range(5):
        stepped(a, ours, gaussian(12, 20, seed=seed)), stepped(b, theirs, gaussian(12, 20, seed=seed))
    assert torch.equal(ours, theirs)


def test_at_density_zero_matrices_have_no_state():
    weight = weight_of(12, 20)
    optimizer = FRUGAL([weight], lr=1.0, density=0.0)
    step = stepped(optimizer, weight, gaussian(12, 20))
    torch.testing.assert_close(step, 0.1 * weight.grad.sign())
    assert set(optimizer.state[weight]) == {"step"}


def test_a_part_of_a_model_may_have_another_density():
    """Attention split, the other linear layers without state, norms with Adam's."""
    model = torch.nn.ModuleDict(
        {"attn": torch.nn.Linear(8, 12), "mlp": torch.nn.Linear(8, 12), "norm": torch.nn.LayerNorm(8)}
    )
    optimizer = build_optimizer(
        model, "frugal", lr=1e-3, target=["attn"], fallback={"name": "frugal", "density": 0.0}
    )
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(optimizer.state[model["attn"].weight]) == {"chosen", "exp_avg", "exp_avg_sq", "step"}
    assert set(optimizer.state[model["mlp"].weight]) == {"step"}
    assert set(optimizer.state[model["norm"].weight]) == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("number", [0, 1])
def test_the_recipes_in_its_documentation_give_state_to_what_they_say(number):
    """Read from the docstring, built as a recipe builds it, and foreseen by the memory formulas."""
    lines = inspect.getdoc(FRUGAL).split("optimizer: ")[1:]
    settings = yaml.safe_load(lines[number].split("\n\n")[0])
    recipe = load_recipe("quickstart", [f"optimizer={json.dumps(settings)}"])
    config = AutoConfig.for_model("llama", **SMALL_LLAMA)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = make_optimizer(model, recipe)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    kinds: dict[str, set[frozenset[str]]] = {}
    for name, param in model.named_parameters():
        kind = name.split(".")[-2]
        kinds.setdefault(kind, set()).add(frozenset(optimizer.state[param]) - {"step"})
    adam, none = {frozenset({"exp_avg", "exp_avg_sq"})}, {frozenset()}
    split = {frozenset({"chosen", "exp_avg", "exp_avg_sq"})}
    assert kinds["norm"] == kinds["lm_head"] == kinds["input_layernorm"] == adam
    if number == 0:
        assert kinds["embed_tokens"] == adam
        assert (
            set().union(*(kinds[f"{each}_proj"] for each in ("q", "k", "v", "o", "up", "down")))
            == adam | none
        )
    else:
        assert kinds["q_proj"] == kinds["v_proj"] == split
        assert kinds["k_proj"] == kinds["o_proj"] == kinds["up_proj"] == kinds["embed_tokens"] == none
    foreseen = treatments(recipe.optimizer, Architecture.from_config(config.to_dict()).parameters)
    sizes = [state_bytes(each.algorithm, each.settings, each.parameter.shape, 4) for each in foreseen]
    assert sum(sizes) >= optimizer.state_bytes()
    if number == 1:
        assert sum(sizes) == optimizer.state_bytes()


# ------------------------------------------------------------------ when it changes


@each_side
def test_at_a_switch_other_columns_take_over_and_their_moments_start_anew(projection):
    weight = weight_of(32, 40)
    optimizer = FRUGAL([weight], lr=1.0, projection=projection, refresh_every=3)
    drawn = []
    for seed in range(9):
        stepped(optimizer, weight, gaussian(32, 40, seed=seed))
        drawn.append(numbers(optimizer, weight))
        if seed % 3 == 0:
            new = drawn[-1]
            G = weight.grad[:, new] if projection == "columns" else weight.grad[new]
            torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.1 * G)
            torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], 0.001 * G.square())
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3] == drawn[5] != drawn[6]


def test_the_first_step_after_a_switch_is_as_long_as_one_of_signs():
    weight = weight_of(32, 40)
    optimizer = FRUGAL([weight], lr=1.0, refresh_every=3)
    for seed in range(4):
        step = stepped(optimizer, weight, gaussian(32, 40, seed=seed))
    chosen = numbers(optimizer, weight)
    torch.testing.assert_close(step[:, chosen], weight.grad[:, chosen].sign(), rtol=1e-4, atol=1e-4)


@each_side
def test_a_switch_in_few_bits_leaves_nothing_of_the_old_moments(projection):
    """Values of two blocks of rows share a scale, which must not be that of moments a million times as large."""
    storage = {"moment": "int8", "variance": "int8"}
    late, fresh = weight_of(50, 70), weight_of(50, 70)
    after = FRUGAL([late], lr=0.0, projection=projection, refresh_every=2, storage=storage, density=0.9)
    for seed in range(2):
        stepped(after, late, 1e6 * gaussian(50, 70, seed=seed))
    new = FRUGAL([fresh], lr=0.0, projection=projection, refresh_every=2, storage=storage, density=0.9)
    stepped(after, late, gaussian(50, 70, seed=2)), stepped(new, fresh, gaussian(50, 70, seed=2))
    scales = (optimizer.state[weight]["exp_avg_scale"] for optimizer, weight in ((after, late), (new, fresh)))
    largest, usual = (each.max() for each in scales)
    assert largest < 2 * usual


def test_columns_depend_on_seed_name_and_step_alone():
    def drawn(name: str, *, seed: int, gradients: int) -> list[list[int]]:
        weight, found = weight_of(16, 64), []
        other = weight_of(5, 5)
        optimizer = FRUGAL([("other", other), (name, weight)], lr=1e-3, seed=seed, refresh_every=2)
        torch.manual_seed(gradients)
        for _ in range(4):
            stepped(optimizer, weight, torch.randn(16, 64))
            found.append(numbers(optimizer, weight))
        return found

    one = drawn("q_proj", seed=0, gradients=0)
    assert one == drawn("q_proj", seed=0, gradients=1)
    assert one != drawn("q_proj", seed=1, gradients=0)
    assert one != drawn("k_proj", seed=0, gradients=0)


def test_each_matrix_of_a_batch_has_columns_of_its_own():
    weight = weight_of(3, 16, 64)
    optimizer = FRUGAL([weight], lr=1e-3)
    stepped(optimizer, weight, gaussian(3, 16, 64))
    rows = [tuple(each) for each in optimizer.state[weight]["chosen"].int().tolist()]
    assert len(set(rows)) == 3
    assert all(len(set(each)) == 16 and list(each) == sorted(each) for each in rows)


def test_every_number_is_drawn_equally_often():
    counts = torch.zeros(20)
    for step in range(4000):
        for number in seeded_choice(5, 20, "columns", step):
            counts[number] += 1
    # 1000 of each expected with a standard deviation of 27
    assert (counts - 1000).abs().max() < 5 * 27


def test_numbers_drawn_stay_what_they_were():
    """A checkpoint of an older release goes on with the same columns."""
    assert seeded_choice(5, 20, 0, "q_proj", 1) == [3, 4, 5, 8, 11]


# ------------------------------------------------------------------ memory and speed


@pytest.mark.parametrize(
    "settings", [{}, {"projection": "rows"}, {"density": 0.9}, {"density": 0.0}], ids=str
)
def test_a_step_holds_a_few_tiles_also_at_a_switch(settings):
    weight = weight_of(2048, 8192, dtype=torch.bfloat16)
    weight.grad = torch.ones_like(weight)
    optimizer = FRUGAL([weight], refresh_every=2, **settings)
    optimizer.step()
    for _ in range(2):
        with PeakOfNewBytes() as seen:
            optimizer.step()
        assert seen.peak <= 40 * MIB


@each_side
def test_between_switches_no_step_waits_for_the_device(projection):
    """Nothing is read from it, and no numbers are sent to it."""
    weight = weight_of(12, 20, dtype=torch.bfloat16)
    optimizer = FRUGAL([weight], projection=projection, refresh_every=3)
    seen = []
    for seed in range(4):
        with Calls() as calls:
            stepped(optimizer, weight, gaussian(12, 20, seed=seed).bfloat16())
        seen.append(calls.names & WAITS)
    assert seen[1] == seen[2] == set()
    assert "lift_fresh" in seen[0], "the switch does send numbers, so the test would see it"


class RowsOnDemand:
    """A gradient that exists some rows at a time."""

    is_sparse = False

    def __init__(self, whole: torch.Tensor):
        self._whole, self.shape, self.dtype, self.device = whole, whole.shape, whole.dtype, whole.device

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._whole[rows]


@each_side
def test_a_gradient_that_gives_only_rows_is_enough(projection):
    weight, whole = weight_of(9, 16), weight_of(9, 16)
    optimizer, expected = (FRUGAL([each], lr=1.0, projection=projection) for each in (weight, whole))
    step = stepped(expected, whole, gaussian(9, 16))
    group = optimizer.param_groups[0]
    rule = optimizer.rule_of(weight, group)
    assert rule.takes_rows
    state, ctx = optimizer._loaded(weight, group), optimizer.coming_context(weight, group)
    G = RowsOnDemand(gaussian(9, 16))
    state.save_(rule.refresh(G, state, ctx), None)
    blocks, _ = rule.update(G, state, ctx)
    torch.testing.assert_close(torch.cat([blocks.of(0, slice(0, 4)), blocks.of(0, slice(4, 9))]), step)


# ------------------------------------------------------------------ bad settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"density": 1.5}, "density must be a finite number >= 0 and <= 1, found 1.5"),
        (
            {"density": 0.0, "residual": "none"},
            "would leave matrices as they are. Raise density, or set residual",
        ),
        ({"residual": "sing"}, "residual must be one of sign, sgd, none, found 'sing'. Did you mean 'sign'"),
        ({"projection": "column"}, "Did you mean 'columns'"),
        ({"inner": "adamm"}, "Did you mean 'adam'"),
        ({"refresh_every": 0}, "refresh_every must be a whole number >= 1"),
    ],
)
def test_wrong_settings_are_one_clear_error_at_construction(changes, words):
    with pytest.raises(ValueError, match=words):
        FRUGAL([weight_of(8, 8)], **changes)
