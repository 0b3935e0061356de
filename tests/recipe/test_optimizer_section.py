"""The `optimizer:` section is checked against the settings of the algorithm it names."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lowmem.recipe.load import load_recipe
from lowmem.recipe.optimizer_table import optimizer_table
from tests.recipe.written import SMALL, problems_of, write

START = SMALL.partition("optimizer:")[0]


def with_optimizer(text: str) -> str:
    """A recipe whose optimizer section is `text`, on line 4."""
    return f"{START}optimizer: {{{text}}}\n"


def test_settings_arrive_as_written_and_others_are_left_to_the_algorithm() -> None:
    recipe = load_recipe(
        write(with_optimizer("name: galore, lr: 1e-3, rank: 8, betas: [0.8, 1e-1], scale: 2"))
    )
    assert recipe.optimizer.name == "galore"
    assert recipe.optimizer.settings == {"lr": 1e-3, "rank": 8, "betas": [0.8, 0.1], "scale": 2.0}
    assert type(recipe.optimizer.settings["scale"]) is float
    assert recipe.optimizer.target == ["attn", "mlp"]
    assert recipe.optimizer.fallback is None


def test_every_optimizer_is_accepted_with_each_of_its_settings_at_the_default() -> None:
    for name, entry in optimizer_table().items():
        settings = {key: about["default"] for key, about in entry["settings"].items()}
        text = ", ".join(
            f"{key}: {str(value).lower() if value is not None else 'null'}" for key, value in settings.items()
        )
        recipe = load_recipe(write(with_optimizer(f"name: {name}, {text}")))
        assert recipe.optimizer.settings == settings


def test_an_unknown_optimizer_is_answered_with_the_nearest_and_all_names() -> None:
    (problem,) = problems_of(with_optimizer("name: GaLore2, lr: 1"))
    known = ", ".join(optimizer_table())
    assert (
        problem
        == f"r.yaml:4: optimizer.name is GaLore2, which is no optimizer. Did you mean galore? Known: {known}."
    )


def test_under_an_unknown_optimizer_only_keys_that_no_optimizer_has_are_reported_too() -> None:
    problems = problems_of(with_optimizer("name: zzz, lr: 1, rank: 4, rnak: 4"))
    assert len(problems) == 2
    assert "optimizer.rnak is not a key. Did you mean optimizer.rank?" in problems[1]


def test_a_setting_of_another_optimizer_says_whose_it_is() -> None:
    (problem,) = problems_of(with_optimizer("name: adamw, lr: 1, rank: 4"))
    assert "optimizer.rank is a setting of galore" in problem
    assert "not of adamw. Settings of adamw: lr, betas, eps" in problem


def test_a_misspelt_setting_is_not_answered_with_one_that_this_optimizer_lacks() -> None:
    (problem,) = problems_of(with_optimizer("name: adamw, lr: 1, ranks: 4"))
    assert "optimizer.rank?" not in problem
    assert (
        "Keys of optimizer: name, target, clip, refresh_from, head, fallback, groups, beta2_half_life_tokens, lr, betas"
        in problem
    )


def test_the_learning_rate_is_required_but_a_fallback_takes_the_main_one() -> None:
    assert problems_of(with_optimizer("name: galore, fallback: {name: adamw}")) == [
        "r.yaml:4: optimizer.lr is missing. Add it under optimizer:, for example lr: 1.0e-4."
    ]
    recipe = load_recipe(
        write(with_optimizer("name: galore, lr: 1e-3, fallback: {name: adamw, betas: [0, 0.9]}"))
    )
    assert recipe.optimizer.fallback == {"name": "adamw", "betas": [0.0, 0.9]}


def test_a_head_is_read_and_checked_like_a_fallback() -> None:
    recipe = load_recipe(write(with_optimizer("name: sgd, lr: 1, head: {name: adamw, lr: 1e-3}")))
    assert recipe.optimizer.head == {"name": "adamw", "lr": 1e-3}
    (problem,) = problems_of(with_optimizer("name: sgd, lr: 1, head: {name: adamw, momentum: 0.9}"))
    assert "optimizer.head.momentum is a setting of sgd" in problem


def test_groups_take_settings_of_the_main_optimizer_or_of_one_that_they_name() -> None:
    text = (
        "name: galore, lr: 1, groups: [{match: [v_proj], rank: 4}, {match: [norm], name: sgd, momentum: 0.5}]"
    )
    recipe = load_recipe(write(with_optimizer(text)))
    assert recipe.optimizer.groups == [
        {"match": ["v_proj"], "rank": 4},
        {"match": ["norm"], "name": "sgd", "momentum": 0.5},
    ]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("{match: [a]}", "optimizer.groups is a section with match; it must be a list of sections"),
        ("[v_proj]", "optimizer.groups[0] is v_proj; it must be a section with match and settings"),
        ("[{rank: 4}]", "optimizer.groups[0].match is missing"),
        ("[{match: []}]", "optimizer.groups[0].match is empty"),
        ("[{match: v_proj}]", "optimizer.groups[0].match is v_proj; it must be a list"),
        (
            "[{match: [a], rnk: 4}]",
            "optimizer.groups[0].rnk is not a key. Did you mean optimizer.groups[0].rank?",
        ),
        ("[{match: [a], name: sgd, rank: 4}]", "optimizer.groups[0].rank is a setting of galore"),
        (
            "[{match: [a], name: sdg}]",
            "optimizer.groups[0].name is sdg, which is no optimizer. Did you mean sgd?",
        ),
        ("[{match: [a], rank: 0}]", "optimizer.groups[0].rank is 0; it must be a whole number >= 1"),
    ],
)
def test_a_group_that_is_wrong_is_named_by_its_number(groups: str, words: str) -> None:
    (problem,) = problems_of(with_optimizer(f"name: galore, lr: 1, groups: {groups}"))
    assert words in problem


def test_another_optimizer_drops_the_groups_that_refine_the_old_one() -> None:
    text = "name: galore, lr: 1, groups: [{match: [v_proj], rank: 4}, {match: [norm], name: sgd}]"
    recipe = load_recipe(write(with_optimizer(text)), ["optimizer.name=adamw"])
    assert recipe.optimizer.groups == [{"match": ["norm"], "name": "sgd"}]
    recipe = load_recipe(write(with_optimizer(text)), ["optimizer.rank=8"])
    assert len(recipe.optimizer.groups) == 2


def test_a_fallback_is_checked_like_the_main_optimizer() -> None:
    text = "name: galore, lr: 1, fallback: {name: sgd, rank: 3, momentum: 2, target: [a], momentm: 1}"
    problems = problems_of(with_optimizer(text))
    assert len(problems) == 4
    assert "optimizer.fallback.rank is a setting of galore, q_galore" in problems[0]
    assert "not of sgd." in problems[0]
    assert "optimizer.fallback.momentum is 2; it must be a number >= 0 and < 1." in problems[1]
    assert "optimizer.fallback.target is not a key." in problems[2]
    assert "Did you mean optimizer.fallback.momentum?" in problems[3]


@pytest.mark.parametrize("key", ["fallback", "head"])
@pytest.mark.parametrize("written", ["adamw", "[adamw]", "3", "{}", "{lr: 1}"])
def test_a_fallback_or_head_without_a_name_says_how_to_write_one(written: str, key: str) -> None:
    (problem,) = problems_of(with_optimizer(f"name: galore, lr: 1, {key}: {written}"))
    assert f"optimizer.{key}" in problem
    assert "name" in problem


REFUSED = {
    "lr: -1": "optimizer.lr is -1; it must be a number >= 0.",
    "lr: .nan": "optimizer.lr is .nan; it must be a number >= 0.",
    "lr: true": "optimizer.lr is true; it must be a number >= 0.",
    "lr: '1e-4'": 'optimizer.lr is "1e-4"; it must be a number >= 0. Remove the quotes.',
    "lr: 1, rank: 0": "optimizer.rank is 0; it must be a whole number >= 1, or null.",
    "lr: 1, rank: 2.5": "optimizer.rank is 2.5; it must be a whole number >= 1, or null.",
    "lr: 1, betas: 0.9": "optimizer.betas is 0.9; it must be two numbers >= 0 and < 1, as in [0.9, 0.999].",
    "lr: 1, betas: [0.9]": "optimizer.betas is [0.9]; it must be two numbers >= 0 and < 1, as in [0.9, 0.999].",
    "lr: 1, betas: [0.9, 1]": "optimizer.betas is 1; it must be a number >= 0 and < 1.",
    "lr: 1, betas: [a, 0.9]": "optimizer.betas is a; it must be a number >= 0 and < 1.",
    "lr: 1, projection: SVD": "optimizer.projection is SVD; it must be one of subspace, svd, dct. Did you mean svd?",
    "lr: 1, target: attn": "optimizer.target is attn; it must be a list, as in [a, b]. Write [attn].",
    "lr: 1, target: []": "optimizer.target is empty. Name modules, as in [attn, mlp].",
    "lr: 1, settings: {rank: 3}": "optimizer.settings is not a key. Write the settings directly under optimizer:.",
}


@pytest.mark.parametrize("written", REFUSED)
def test_a_setting_out_of_range_says_what_was_found_and_what_is_allowed(written: str) -> None:
    assert problems_of(with_optimizer(f"name: galore, {written}")) == [f"r.yaml:4: {REFUSED[written]}"]


@pytest.fixture
def storage_of_two_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, Any] = copy.deepcopy(optimizer_table())
    about = {"type": "storage", "optional": True, "default": None, "doc": ""}
    table["galore"]["settings"]["storage"] = {
        **about,
        "roles": {"moment": ["fp32", "int8"], "basis": ["bf16"]},
    }
    monkeypatch.setattr("lowmem.recipe.optimizer_section.optimizer_table", lambda: table)


@pytest.mark.usefixtures("storage_of_two_roles")
def test_storage_is_a_section_from_role_to_format() -> None:
    recipe = load_recipe(write(with_optimizer("name: galore, lr: 1, storage: {moment: int8}")))
    assert recipe.optimizer.settings["storage"] == {"moment": "int8"}
    assert (
        load_recipe(write(with_optimizer("name: galore, lr: 1, storage: null"))).optimizer.settings["storage"]
        is None
    )


@pytest.mark.usefixtures("storage_of_two_roles")
def test_storage_with_unknown_roles_or_formats_is_refused() -> None:
    text = "name: galore, lr: 1, storage: {momnt: int8, moment: int7, basis: fp32}"
    assert [problem.partition("storage")[2] for problem in problems_of(with_optimizer(text))] == [
        ".momnt is not a role of state. Did you mean moment? Roles: moment, basis.",
        ".moment is int7; it must be one of fp32, int8. Did you mean int8?",
        ".basis is fp32; it must be one of bf16.",
    ]
    (problem,) = problems_of(with_optimizer("name: galore, lr: 1, storage: int8"))
    assert "it must be a section from role to format, as in {moment: int8}." in problem


def test_state_in_few_bits_can_be_asked_for_and_only_bases_have_four() -> None:
    bits = "storage: {moment: int8, variance: int8, basis: int4}"
    fallback = "fallback: {name: adamw, storage: {moment: int8}}"
    recipe = load_recipe(write(with_optimizer(f"name: galore, lr: 1, {bits}, {fallback}")))
    assert recipe.optimizer.settings["storage"] == {"moment": "int8", "variance": "int8", "basis": "int4"}
    assert recipe.optimizer.fallback == {"name": "adamw", "storage": {"moment": "int8"}}
    (problem,) = problems_of(with_optimizer("name: galore, lr: 1, storage: {moment: int4}"))
    assert "optimizer.storage.moment is int4; it must be one of param, fp32, bf16, int8" in problem
