"""The decay of a second moment given in tokens."""

from __future__ import annotations

import pytest

from lowmem.recipe.half_life import beta2_of, with_beta2
from lowmem.recipe.load import load_recipe
from tests.recipe.written import SMALL, problems_of, write

START = SMALL.partition("optimizer:")[0]


def with_optimizer(text: str) -> str:
    return f"{START}optimizer: {{{text}}}\n"


def chosen(text: str):
    return load_recipe(write(with_optimizer(text))).optimizer


@pytest.mark.parametrize(
    ("beta2", "batch", "smaller_batch", "expected"),
    [(0.95, 512, 1, 0.99990), (0.999, 16, 1, 0.99994)],  # the paper's examples
)
def test_a_half_life_kept_over_batch_sizes_gives_the_betas_of_the_paper(
    beta2, batch, smaller_batch, expected
):
    squares, steps = 1.0, 0
    while squares > 0.5:  # how long the larger batch remembers, counted
        squares, steps = squares * beta2, steps + 1
    assert beta2_of(steps * batch, smaller_batch) == pytest.approx(expected, abs=1e-5)


def test_the_decay_of_lions_mean_is_no_second_moments():
    both = (
        "name: lion8bit, lr: 1, betas: [0.9, 0.98], fallback: {name: adamw8bit}, beta2_half_life_tokens: 1e6"
    )
    found = with_beta2(chosen(both), 2e6, rest=None)
    assert found.settings["betas"] == [0.9, 0.98]
    assert found.fallback["betas"] == [0.9, 0.25]
    (problem,) = problems_of(with_optimizer("name: lion8bit, lr: 1, beta2_half_life_tokens: 1e6"))
    assert "is for a second moment, and lion8bit has none" in problem
    assert "adamw8bit" in problem


def test_own_rule_and_the_rule_of_the_rest_get_it():
    own = with_beta2(chosen("name: adamw, lr: 1, beta2_half_life_tokens: 1e6"), 2e6, rest=None)
    assert own.settings["betas"] == [0.9, 0.25]
    assert own.fallback is None
    both = with_beta2(chosen("name: galore, lr: 1, beta2_half_life_tokens: 1e6"), 2e6, rest="adamw")
    assert both.settings["betas"] == both.fallback["betas"] == [0.9, 0.25]
    factored = with_beta2(
        chosen("name: sinkgd, lr: 1, beta2_half_life_tokens: 1e6, fallback: {name: adafactor}"),
        2e6,
        rest="adamw",
    )
    assert factored.fallback == {"name": "adafactor", "beta2": 0.25}
    assert factored.settings["betas"] == [0.9, 0.25], "for its vectors"


def test_a_fallback_with_a_beta2_of_its_own_keeps_it():
    text = "name: galore, lr: 1, beta2_half_life_tokens: 1e6, fallback: {name: adamw, betas: [0.9, 0.95]}"
    assert with_beta2(chosen(text), 2e6, rest="adamw").fallback["betas"] == [0.9, 0.95]


def test_a_group_of_another_optimizer_gets_it_and_one_of_the_same_takes_it_from_there():
    text = "name: sgd, lr: 1, beta2_half_life_tokens: 1e6, groups: [{match: [norm], name: adamw}, {match: [head]}]"
    found = with_beta2(chosen(text), 2e6, rest=None)
    assert found.groups == [{"match": ["norm"], "name": "adamw", "betas": [0.9, 0.25]}, {"match": ["head"]}]


def test_two_ways_to_give_beta2_are_refused_and_so_is_one_without_a_second_moment():
    (both,) = problems_of(
        with_optimizer("name: adamw, lr: 1, betas: [0.9, 0.95], beta2_half_life_tokens: 1e6")
    )
    assert "gives beta2, and so does optimizer.betas. Delete one of them." in both
    (none,) = problems_of(with_optimizer("name: sgd, lr: 1, beta2_half_life_tokens: 1e6"))
    assert "is for a second moment, and sgd has none" in none
    (negative,) = problems_of(with_optimizer("name: adamw, lr: 1, beta2_half_life_tokens: -1"))
    assert "optimizer.beta2_half_life_tokens is -1; it must be a number > 0" in negative
