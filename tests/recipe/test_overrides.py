"""`a.b=c` of the command line over the keys of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe
from tests.recipe.written import SMALL, problems_of, with_lines, write


def loaded(text: str, *overrides: str) -> Recipe:
    return load_recipe(write(text), overrides)


@pytest.fixture(autouse=True)
def rows() -> Path:
    return write("{}\n", "rows.jsonl")


def test_an_override_wins_over_the_file_and_the_last_one_over_the_others() -> None:
    recipe = loaded(SMALL, "optimizer.lr=1e-4", "train.seed=1", "train.seed=2", "optimizer.rank=8")
    assert recipe.optimizer.settings == {"lr": 1e-4, "rank": 8}
    assert recipe.train.seed == 2


def test_sections_on_the_way_are_created_also_where_the_file_says_null() -> None:
    assert loaded(SMALL, "lora.r=4", "train.lr_scheduler.name=linear").lora is not None
    recipe = loaded(with_lines("lora: null\n"), "lora.r=4")
    assert recipe.lora is not None
    assert recipe.lora.r == 4


def test_values_are_yaml() -> None:
    recipe = loaded(
        SMALL,
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.fallback={name: sgd, momentum: 0.5}",
        "optimizer.target=[q_proj]",
        "data.packing=true",
        'save.dir="2024"',
        "train.max_grad_norm=null",
    )
    assert recipe.optimizer.settings["betas"] == [0.8, 0.9]
    assert recipe.optimizer.fallback == {"name": "sgd", "momentum": 0.5}
    assert recipe.optimizer.target == ["q_proj"]
    assert recipe.data.packing is True
    assert recipe.save.dir == "2024"
    assert recipe.train.max_grad_norm is None


def test_null_takes_an_optional_section_away() -> None:
    assert loaded(with_lines("lora: {r: 3}\n"), "lora=null").lora is None


def test_a_value_may_hold_an_equals_sign() -> None:
    assert loaded(SMALL, "save.dir=runs/lr=3").save.dir == "runs/lr=3"


WRONG = {
    "optimizer.ranks=3": "optimizer.ranks is not a key. Did you mean optimizer.rank?",
    "optimizer.rank=zero": "optimizer.rank is zero; it must be a whole number >= 1, or null.",
    "lr=1": "lr is not a key. Did you mean optimizer.lr?",
    "nonsense": "is not of the form key=value, as in optimizer.lr=1e-4 (no blanks around the =).",
    "--optimizer.lr=1": "is no option. Keys of the recipe are set without dashes, as in optimizer.lr=1e-4.",
    "=3": "has no dotted key before the =, as in optimizer.lr=1e-4.",
    "a..b=3": "has no dotted key before the =, as in optimizer.lr=1e-4.",
    "train.seed=": "has no value. Write train.seed=null to take a value away.",
    "train.seed=null": "train.seed is null; it must be a whole number >= 0.",
    "resume.path=x": "resume is auto (r.yaml:7), not a section that has keys.",
    "save.dir=*x": "is not valid YAML: found undefined alias 'x'. "
    "Put text with special characters in quotes twice: 'save.dir=\"...\"'.",
    "save.dir=3": 'save.dir is 3; it must be text, or null. Put it in quotes: "3".',
    "train={a: 1, a: 2}": "a is given twice in one section. Keep one.",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_with_an_override_is_said_of_the_command_line(override: str) -> None:
    problems = problems_of(with_lines("resume: auto\n"), override)
    assert f"command line: {override}: {WRONG[override]}" in problems


def test_problems_of_the_file_and_of_all_overrides_come_together() -> None:
    problems = problems_of(with_lines("train: {sed: 1}\n"), "optimizer.lr=fast", "oops", "save.keep=0")
    assert [problem.partition(": ")[0] for problem in problems] == ["r.yaml:7", *["command line"] * 3]


def test_a_wrong_value_of_the_file_that_an_override_replaces_is_no_problem() -> None:
    assert loaded(with_lines("train: {seed: wrong}\n"), "train.seed=3").train.seed == 3


def test_a_path_over_a_builtin_replaces_the_whole_source() -> None:
    text = SMALL.replace("{builtin: arithmetic}", "{builtin: arithmetic, size: 9, split: train, take: 5}")
    source = loaded(text, "data.train.path=rows.jsonl", "data.train.format=alpaca").data.train
    assert (source.path, source.format, source.take) == ("rows.jsonl", "alpaca", 5.0)
    assert (source.builtin, source.size, source.split) == (None, None, None)


def test_a_new_kind_of_source_keeps_what_goes_with_both() -> None:
    hub = SMALL.replace("{builtin: arithmetic}", "{hub: a/b, name: main, split: train, format: messages}")
    source = loaded(hub, "data.train.path=rows.jsonl").data.train
    assert (source.path, source.format, source.hub, source.name, source.split) == (
        "rows.jsonl",
        "messages",
        None,
        None,
        None,
    )
    source = loaded(hub, "data.train.builtin=arithmetic").data.train
    assert (source.builtin, source.format, source.split) == ("arithmetic", None, None)
    path = SMALL.replace("{builtin: arithmetic}", "{path: gone.jsonl, format: messages}")
    source = loaded(path, "data.train.hub=a/b").data.train
    assert (source.hub, source.format, source.path) == ("a/b", "messages", None)


def test_keys_given_on_the_command_line_are_never_dropped() -> None:
    text = SMALL.replace("{builtin: arithmetic}", "{builtin: arithmetic, size: 9}")
    problems = problems_of(text, "data.train.path=rows.jsonl", "data.train.format=text", "data.train.size=3")
    assert problems == ["command line: data.train.size=3: data.train.size does not go with path. Delete it."]
    problems = problems_of(text, "data.train.path=rows.jsonl", "data.train.builtin=arithmetic")
    assert "found path and builtin" in problems[0]


def test_the_same_kind_of_source_again_keeps_its_keys() -> None:
    text = SMALL.replace("{builtin: arithmetic}", "{hub: a/b, name: main, split: test, format: text}")
    source = loaded(text, "data.train.hub=c/d").data.train
    assert (source.hub, source.name, source.split) == ("c/d", "main", "test")


def test_a_held_out_source_that_the_file_lacks_can_be_given_alone() -> None:
    source = loaded(SMALL, "data.eval.path=rows.jsonl", "data.eval.format=text").data.eval
    assert source is not None
    assert source.path == "rows.jsonl"


def test_another_optimizer_drops_only_the_settings_it_does_not_have() -> None:
    text = with_lines("  rank: 8\n  weight_decay: 0.1\n  betas: [0.8, 0.9]\n")
    recipe = loaded(text, "optimizer.name=sgd", "optimizer.momentum=0.9")
    assert recipe.optimizer.settings == {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9}


def test_another_fallback_drops_only_the_settings_it_does_not_have() -> None:
    text = with_lines("  fallback: {name: adamw, betas: [0.8, 0.9], lr: 1.0e-5}\n")
    assert loaded(text, "optimizer.fallback.name=sgd").optimizer.fallback == {"name": "sgd", "lr": 1e-5}


def test_a_setting_on_the_command_line_that_the_new_optimizer_lacks_is_an_error() -> None:
    (problem,) = problems_of(with_lines("  rank: 8\n"), "optimizer.name=adamw", "optimizer.rank=4")
    assert problem.startswith(
        "command line: optimizer.rank=4: optimizer.rank is a setting of galore, q_galore"
    )
    assert "not of adamw." in problem


def test_a_misspelt_setting_of_the_file_stays_an_error_under_another_optimizer() -> None:
    (problem,) = problems_of(with_lines("  rnak: 8\n"), "optimizer.name=adamw")
    assert problem.startswith("r.yaml:7: optimizer.rnak is not a key.")


def test_the_same_optimizer_again_drops_nothing() -> None:
    assert loaded(with_lines("  rank: 8\n"), "optimizer.name=galore").optimizer.settings == {
        "lr": 1e-3,
        "rank": 8,
    }
