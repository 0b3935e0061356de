"""A recipe written by `dump_recipe` loads back equal, whatever is in it."""

from __future__ import annotations

import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.recipe.dump import dump_recipe, recipe_document
from lowmem.recipe.load import load_recipe
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import OptimizerRecipe, Recipe, SourceRecipe
from tests.recipe.written import SMALL, with_lines, write

TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).filter(str.strip)
WORDS_YAML_MISREADS = st.sampled_from(
    ["no", "null", "~", "1e-4", "010", "1:30", "2024-01-01", "=", "<<", "*a", "#x", "a: b"]
)
SOURCES: dict[str, dict[str, Any]] = {
    "builtin": {
        "builtin": st.just("arithmetic"),
        "split": st.sampled_from(["train", "held_out"]),
        "size": st.integers(1, 99),
    },
    "hub": {"hub": TEXT, "format": st.sampled_from(["alpaca", "text"]), "name": TEXT, "split": TEXT},
}


def values(annotation: Any, limits: Any) -> st.SearchStrategy[Any]:
    """Plain YAML values that the annotation of a key allows; null where it may be."""
    if typing.get_origin(annotation) is Literal:
        return st.sampled_from(typing.get_args(annotation))
    if annotation is str:
        return TEXT | WORDS_YAML_MISREADS
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(int(limits["at_least"] or 0), 2**63 - 1)
    if annotation is float:
        low = limits["at_least"] if limits["at_least"] is not None else limits["above"]
        high = limits["at_most"] if limits["at_most"] is not None else 1e300
        return st.floats(low, high, exclude_min=limits["above"] is not None)
    if typing.get_origin(annotation) is list:
        return st.lists(TEXT, min_size=1, max_size=3)
    if annotation is type(None):
        return st.none()
    if is_dataclass(annotation):
        return sections(annotation)
    return st.one_of([values(member, limits) for member in typing.get_args(annotation)])


def sections(section: Any) -> st.SearchStrategy[dict[str, Any]]:
    if section is SourceRecipe:
        return st.sampled_from(list(SOURCES)).flatmap(source)
    if section is OptimizerRecipe:
        return st.sampled_from(list(optimizer_table())).flatmap(optimizer)
    hints = typing.get_type_hints(section)
    written = {each.name: values(hints[each.name], each.metadata) for each in fields(section)}
    required = {name for name in written if section is Recipe or name in ("train", "name_or_path")}
    return st.fixed_dictionaries(
        {name: written[name] for name in required},
        optional={k: v for k, v in written.items() if k not in required},
    )


def source(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    keys = SOURCES[kind]
    required = [kind, "format"] if kind == "hub" else [kind]
    return st.fixed_dictionaries(
        {name: keys[name] for name in required}, optional={k: v for k, v in keys.items() if k not in required}
    )


def optimizer(name: str) -> st.SearchStrategy[dict[str, Any]]:
    defaults = {key: about["default"] for key, about in optimizer_table()[name]["settings"].items()}
    optional = {key: st.just(value) for key, value in defaults.items() if key != "lr"}
    optional["target"] = st.lists(TEXT, min_size=1, max_size=3)
    optional["head"] = optional["fallback"] = st.none() | st.just({"name": "adamw", "betas": [0.5, 0.9]})
    optional["groups"] = st.lists(st.just({"match": ["norm"], "name": "adamw", "eps": 1e-6}), max_size=2)
    return st.fixed_dictionaries({"name": st.just(name), "lr": st.floats(0, 1e3)}, optional=optional)


def made_consistent(document: dict[str, Any]) -> dict[str, Any]:
    """Cures what the rules between keys refuse; they have their own tests."""
    document["resume"] = "never"
    document["data"]["template"] = "plain"
    document["model"]["name_or_path"] = "some/model"
    document["eval"] = {key: value for key, value in document["eval"].items() if key.startswith("max_")}
    document["save"]["merge_lora"] = False
    impossible = "int8" if document.get("lora") is not None else "nf4"
    if document["model"].get("weights") == impossible:
        del document["model"]["weights"]
    if document["model"].get("weights") != "int8":
        document["model"]["int8"], document["save"]["int8"] = None, False
    if document["train"].get("activation_offload"):
        document["train"]["activation_checkpointing"] = True
    for each in (document["data"]["train"], document["data"].get("eval")):
        if each and "take" in each:
            del each["take"]
    return document


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sections(Recipe).map(made_consistent))
def test_a_dumped_recipe_loads_back_equal_and_holds_what_was_written(document: dict[str, Any]) -> None:
    recipe = load_recipe(write(yaml.safe_dump(document)))
    text = dump_recipe(recipe)
    assert load_recipe(write(text, "again.yaml")) == recipe
    assert_holds(recipe_document(recipe), document)


def assert_holds(found: Any, written: Any) -> None:
    """Every value of `written` stands at its place in `found`; null and a missing key are alike."""
    if isinstance(written, dict):
        for key, value in written.items():
            if value is not None and key != "dir":
                assert_holds(found[key], value)
    else:
        assert found == written


@pytest.mark.parametrize(
    "text", ["a\nb", "tab\there", "a\x85b", "a\u2028b", "emoji \U0001f600", "  spaces  ", "'\"\\", "\x1b["]
)
def test_odd_text_survives_the_round_trip(text: str) -> None:
    document = yaml.safe_load(SMALL)
    document["save"] = {"dir": text}
    recipe = load_recipe(write(yaml.safe_dump(document)))
    assert recipe.save.dir == text
    assert load_recipe(write(dump_recipe(recipe), "again.yaml")) == recipe


def test_a_dump_is_plain_yaml_in_the_layout_of_a_recipe() -> None:
    recipe = load_recipe(write(with_lines("  rank: 8\n  fallback: {name: adamw}\n")))
    document = yaml.safe_load(dump_recipe(recipe))
    assert document == recipe_document(recipe)
    assert document["optimizer"] == {
        "name": "galore",
        "lr": 1e-3,
        "rank": 8,
        "target": ["attn", "mlp"],
        "clip": "applied",
        "refresh_from": "boundary",
        "head": None,
        "fallback": {"name": "adamw"},
        "groups": [],
        "beta2_half_life_tokens": None,
    }
    assert document["data"]["train"] == {"builtin": "arithmetic"}
    assert document["train"]["max_steps"] is None
