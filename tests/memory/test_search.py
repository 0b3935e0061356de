"""What fits a card, against trying it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import fits
from lowmem.memory.estimate import BASELINES, estimate, estimate_baseline
from lowmem.memory.search import changes_that_fit, leanest_execution, search
from lowmem.memory.search_changes import LENGTH_STEP, largest, with_optimizer
from lowmem.optim.registry import OPTIMIZERS
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe

GIB = 2**30
LLAMA_32_1B = Architecture.from_config(
    {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 16384,
    }
)
TEXT = """\
model: {name_or_path: some/model}
data: {train: {builtin: arithmetic}, max_length: 4096}
optimizer: {name: adamw, lr: 1.0e-4, betas: [0.9, 0.99], weight_decay: 0.1}
train: {per_device_batch_size: 4, loss: plain}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def recipe(file: Path) -> Recipe:
    return load_recipe(file)


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
@pytest.mark.parametrize("limit", [1, 2, 7, 64, 100])
def test_the_largest_number_is_found_however_fast_the_need_grows(limit, power):
    for threshold in range(limit + 3):
        asked: list[int] = []

        def room(value: int, asked: list[int] = asked, threshold: int = threshold) -> int:
            asked.append(value)
            return int(1000 * threshold**power) - int(1000 * value**power)

        assert largest(room, limit) == min(threshold, limit)
        assert all(1 <= value <= limit for value in asked)
    assert largest(lambda value: 1, 0) == 0


def test_a_straight_line_is_found_in_a_handful_of_tries():
    asked: list[int] = []

    def room(value: int) -> int:
        asked.append(value)
        return 7_000_000 - 1000 * value

    assert largest(room, 2**20) == 7000
    assert len(asked) <= 5


def test_every_method_is_searched_with_and_without_recomputation(recipe):
    found = search(recipe, LLAMA_32_1B, 12 * GIB)
    assert {(each.method, each.activation_checkpointing) for each in found} == {
        (name, on) for name in (*OPTIMIZERS, *BASELINES) for on in (False, True)
    }


@pytest.mark.parametrize("gib", [8, 16, 80])
def test_what_is_found_fits_and_one_more_does_not(recipe, gib):
    card = gib * GIB
    for found in search(recipe, LLAMA_32_1B, card):
        lean = leanest_execution(recipe)
        train = replace(lean.train, activation_checkpointing=found.activation_checkpointing)
        work = replace(lean, train=train)

        def needs(tokens: int, rows: int, found=found, work=work, train=train) -> int:
            sized = replace(work, train=replace(train, per_device_batch_size=rows))
            if found.method in BASELINES:
                return estimate_baseline(
                    found.method, sized, LLAMA_32_1B, sequence_length=tokens
                ).reserved_bytes
            sized = with_optimizer(sized, found.method)
            return estimate(sized, LLAMA_32_1B, sequence_length=tokens).reserved_bytes

        assert found.longest % LENGTH_STEP == 0
        if found.longest:
            assert fits(needs(found.longest, 1), card)
        if found.longest < LLAMA_32_1B.longest:
            assert not fits(needs(found.longest + LENGTH_STEP, 1), card)
        for tokens, rows in found.batches.items():
            if rows:
                assert fits(needs(tokens, rows), card)
            assert not fits(needs(tokens, rows + 1), card)


def test_a_recipe_that_fits_gets_no_suggestion(recipe):
    assert changes_that_fit(recipe, LLAMA_32_1B, 80 * GIB) == []


def test_every_single_change_is_one_that_the_command_line_takes_and_that_fits(recipe, file):
    card = 24 * GIB
    changes = changes_that_fit(recipe, LLAMA_32_1B, card)
    assert changes
    for change in changes:
        assert len(change.overrides) == 1
        changed = load_recipe(file, change.overrides)
        needed = estimate(changed, LLAMA_32_1B)
        assert (needed.peak_bytes, needed.reserved_bytes) == (change.peak_bytes, change.reserved_bytes)
        assert fits(change.reserved_bytes, card)


def test_a_suggested_number_is_the_largest_that_fits(recipe, file):
    card = 24 * GIB
    numbers = dict(
        change.overrides[0].split("=")
        for change in changes_that_fit(recipe, LLAMA_32_1B, card)
        if change.overrides[0].startswith(("data.max_length", "train.per_device_batch_size"))
    )
    assert set(numbers) == {"data.max_length", "train.per_device_batch_size"}
    for key, value in numbers.items():
        more = int(value) + (LENGTH_STEP if key == "data.max_length" else 1)
        needed = estimate(load_recipe(file, [f"{key}={more}"]), LLAMA_32_1B)
        assert not fits(needed.reserved_bytes, card)


def test_where_no_single_change_does_the_combination_holds_nothing_needless(recipe, file):
    card = 10 * GIB
    (change,) = changes_that_fit(recipe, LLAMA_32_1B, card)
    assert len(change.overrides) > 1
    assert fits(estimate(load_recipe(file, change.overrides), LLAMA_32_1B).reserved_bytes, card)
    for left_out in change.overrides:
        rest = [override for override in change.overrides if override != left_out]
        assert not fits(estimate(load_recipe(file, rest), LLAMA_32_1B).reserved_bytes, card)


def test_a_smaller_rank_is_suggested_where_it_is_enough(file):
    overrides = ["optimizer.name=galore", "optimizer.rank=1024", "train.loss=chunked"]
    overrides += ["train.per_device_batch_size=1", "train.activation_checkpointing=true"]
    recipe = load_recipe(file, overrides)
    needed = estimate(recipe, LLAMA_32_1B).reserved_bytes
    leaner = estimate(load_recipe(file, [*overrides, "optimizer.rank=512"]), LLAMA_32_1B).reserved_bytes
    card = next(size for size in range(4 * GIB, 40 * GIB, 2**26) if fits(leaner, size))
    assert not fits(needed, card)
    written = [change.overrides for change in changes_that_fit(recipe, LLAMA_32_1B, card)]
    assert [each for each in written if "optimizer.rank" in each[0]] == [["optimizer.rank=512"]]
    assert ["train.activation_checkpointing=true"] not in written


def test_a_simulation_that_found_more_makes_the_suggestions_stricter(recipe):
    card = 24 * GIB
    mild = changes_that_fit(recipe, LLAMA_32_1B, card)
    found = estimate(recipe, LLAMA_32_1B).reserved_bytes
    strict = changes_that_fit(recipe, LLAMA_32_1B, card, planned_reserved_bytes=int(1.3 * found))
    length = {change.overrides[0] for change in mild} & {change.overrides[0] for change in strict}
    assert not any(override.startswith("data.max_length") for override in length)
    for change in strict:
        assert fits(change.reserved_bytes, card)


def test_nothing_is_suggested_where_nothing_helps(recipe):
    assert changes_that_fit(recipe, LLAMA_32_1B, 2 * GIB) == []


def written(changes) -> list[list[str]]:
    return [change.overrides for change in changes]


def card_between(needed: int, leaner: int) -> int:
    """A card that the second fits and the first does not."""
    card = next(size for size in range(GIB, 80 * GIB, 2**24) if fits(leaner, size))
    assert not fits(needed, card)
    return card


def test_gradients_that_are_freed_as_they_arrive_are_suggested_before_smaller_batches(file):
    recipe = load_recipe(file, ["train.loss=chunked", "train.activation_checkpointing=true"])
    leaner = load_recipe(
        file, ["train.loss=chunked", "train.activation_checkpointing=true", "optimizer.clip=tensor"]
    )
    found, freed = (estimate(each, LLAMA_32_1B) for each in (recipe, leaner))
    assert (found.conditions["execution"], freed.conditions["execution"]) == ("plain", "fused")
    card = card_between(found.reserved_bytes, freed.reserved_bytes)
    assert written(changes_that_fit(recipe, LLAMA_32_1B, card))[0] == ["optimizer.clip=tensor"]


def test_micro_batches_are_put_together_where_that_frees_more_gradients_than_it_keeps_activations(file):
    overrides = ["train.loss=chunked", "train.activation_checkpointing=true", "data.max_length=512"]
    overrides += [
        "train.per_device_batch_size=1",
        "train.gradient_accumulation_steps=2",
        "optimizer.clip=tensor",
    ]
    recipe = load_recipe(file, overrides)
    together = ["train.gradient_accumulation_steps=1", "train.per_device_batch_size=2"]
    freed = estimate(load_recipe(file, [*overrides, *together]), LLAMA_32_1B).reserved_bytes
    card = card_between(estimate(recipe, LLAMA_32_1B).reserved_bytes, freed)
    assert written(changes_that_fit(recipe, LLAMA_32_1B, card))[0] == together


def test_offloading_is_suggested_where_it_is_enough_together_with_what_it_needs(file):
    base = ["train.loss=chunked", "optimizer.name=sgd", "optimizer.clip=tensor"]
    for recomputed in ([], ["train.activation_checkpointing=true"]):
        recipe = load_recipe(file, [*base, *recomputed])
        checkpointing = load_recipe(file, [*base, "train.activation_checkpointing=true"])
        offloading = ["train.activation_checkpointing=true", "train.activation_offload=true"]
        leaner = estimate(load_recipe(file, [*base, *offloading]), LLAMA_32_1B).reserved_bytes
        card = card_between(estimate(checkpointing, LLAMA_32_1B).reserved_bytes, leaner)
        wanted = [each for each in offloading if each not in recomputed]
        assert wanted in written(changes_that_fit(recipe, LLAMA_32_1B, card))
        assert wanted not in written(changes_that_fit(checkpointing, LLAMA_32_1B, 79 * GIB))


def test_adapters_are_suggested_a_base_in_four_bits(file):
    recipe = load_recipe(file, ["lora.r=16", "train.activation_checkpointing=true", "train.loss=chunked"])
    packed = load_recipe(
        file, ["lora.r=16", "train.activation_checkpointing=true", "train.loss=chunked", "model.weights=nf4"]
    )
    card = card_between(*(estimate(each, LLAMA_32_1B).reserved_bytes for each in (recipe, packed)))
    assert ["model.weights=nf4"] in written(changes_that_fit(recipe, LLAMA_32_1B, card))
    assert ["model.weights=nf4"] not in written(changes_that_fit(packed, LLAMA_32_1B, 2 * GIB))


def test_the_recipes_own_execution_is_questioned(file):
    overrides = ["optimizer.name=galore", "train.loss=chunked", "train.activation_checkpointing=true"]
    overrides += ["data.max_length=512", "train.per_device_batch_size=1"]
    recipe = load_recipe(file, [*overrides, "train.execution=plain"])
    projected = estimate(load_recipe(file, overrides), LLAMA_32_1B)
    assert projected.conditions["execution"] == "project"
    card = card_between(estimate(recipe, LLAMA_32_1B).reserved_bytes, projected.reserved_bytes)
    assert written(changes_that_fit(recipe, LLAMA_32_1B, card))[0] == ["train.execution=auto"]


def test_a_change_that_the_execution_cannot_go_with_takes_it_along(file):
    overrides = [
        "optimizer.name=galore",
        "train.execution=project",
        "optimizer.clip=tensor",
    ]
    overrides += ["train.loss=chunked", "train.activation_checkpointing=true", "data.max_length=512"]
    recipe = load_recipe(file, overrides)
    card = estimate(recipe, LLAMA_32_1B).reserved_bytes
    changes = written(changes_that_fit(recipe, LLAMA_32_1B, card))
    assert ["optimizer.name=sgd", "train.execution=auto"] in changes
    for change in changes:
        estimate(load_recipe(file, [*overrides, *change]), LLAMA_32_1B)  # nothing refuses it


def test_a_search_frees_each_gradient_as_it_arrives(recipe):
    lean = leanest_execution(recipe)
    for name in OPTIMIZERS:
        found = estimate(with_optimizer(lean, name), LLAMA_32_1B, sequence_length=512)
        assert found.conditions["execution"] == "fused"
