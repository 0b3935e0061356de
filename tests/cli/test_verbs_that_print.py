"""ls, cp, show and validate."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import yaml

from lowmem.cli.main import VERBS
from lowmem.recipe.dump import recipe_document
from lowmem.recipe.keys import schema_keys
from lowmem.recipe.load import load_recipe
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import SourceRecipe
from tests.cli.conftest import RECIPE, Command

KINDS = ["recipes", "optimizers", "formats", "templates", "builtins"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb_and_every_exit_code(lowmem: Command, arguments: list[str]) -> None:
    done = lowmem(*arguments)
    assert done.code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in done.out
    for code in ("0 done", "2 the recipe", "4 a combination", "5 the run stopped", "130 interrupted"):
        assert code in done.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_refuses_options_it_does_not_have(lowmem: Command, verb: str) -> None:
    assert lowmem(verb, "--help").code == 0
    done = lowmem(verb, "mine.yaml", "--frobnicate")
    assert done.code == 2
    assert f"lowmem {verb}: " in done.err
    assert f"usage: lowmem {verb}" in done.err


def test_an_unknown_verb_is_answered_with_the_one_that_was_meant(lowmem: Command) -> None:
    done = lowmem("trian", "x.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("lowmem: trian is not a verb. Did you mean train?")
    assert "Verbs: ls, cp, show" in lowmem("zzzzz").err


def test_the_version_is_printed(lowmem: Command) -> None:
    assert lowmem("--version").out == "lowmem 0.1.0\n"


def test_ls_lists_everything_there_is(lowmem: Command) -> None:
    done = lowmem("ls")
    assert done.code == 0
    for name in ["shipped", *optimizer_table(), "alpaca", "chatml", "arithmetic"]:
        assert f"\n  {name} " in done.out
    assert "A tiny model learns sums." in done.out


@pytest.mark.parametrize("kind", KINDS)
def test_ls_of_one_kind_is_the_same_for_people_and_programs(lowmem: Command, kind: str) -> None:
    listed = json.loads(lowmem("ls", kind, "--json").out)
    assert list(listed) == [kind]
    assert listed[kind]
    printed = lowmem("ls", kind).out
    for entry in listed[kind]:
        assert set(entry) == {"name", "summary"}
        assert entry["summary"]
        assert f"  {entry['name']} " in printed


def test_ls_formats_are_the_formats_of_the_schema(lowmem: Command) -> None:
    literal, _ = typing.get_args(typing.get_type_hints(SourceRecipe)["format"])
    listed = json.loads(lowmem("ls", "formats", "--json").out)["formats"]
    assert {entry["name"] for entry in listed} == set(typing.get_args(literal))


def test_ls_of_an_unknown_kind_is_answered_with_the_nearest(lowmem: Command) -> None:
    done = lowmem("ls", "optimizer")
    assert done.code == 2
    assert "Did you mean optimizers?" in done.err


def test_without_shipped_recipes_ls_says_so(lowmem: Command, folder: Path) -> None:
    (folder / "recipes").rename(folder / "elsewhere")
    done = lowmem("ls", "recipes")
    assert done.code == 0
    assert "none: this installation holds no recipes" in done.out


def test_a_folder_beside_an_installed_package_is_not_taken_for_its_recipes(
    lowmem: Command, folder: Path
) -> None:
    (folder / "recipes").rename(folder / "elsewhere")
    (folder / "site-packages" / "recipes").mkdir(parents=True)
    (folder / "site-packages" / "recipes" / "pizza.yaml").write_text("dough: 1\n")
    assert "pizza" not in lowmem("ls", "recipes").out
    (folder / "site-packages" / "pyproject.toml").touch()
    assert "pizza" in lowmem("ls", "recipes").out


def test_cp_makes_a_file_of_ones_own_and_says_how_to_train_it(lowmem: Command, folder: Path) -> None:
    done = lowmem("cp", "shipped", "new.yaml")
    assert done.code == 0
    assert (folder / "new.yaml").read_text() == RECIPE
    assert "lowmem train new.yaml" in done.out
    (folder / "sub").mkdir()
    copied = json.loads(lowmem("cp", "shipped", "sub", "--json").out)
    assert copied == {"source": "recipes/shipped.yaml", "destination": "sub/shipped.yaml"}


def test_cp_never_overwrites(lowmem: Command, folder: Path) -> None:
    (folder / "mine.yaml").write_text("precious")
    done = lowmem("cp", "shipped", "mine.yaml")
    assert done.code == 2
    assert done.err == "mine.yaml: exists and is not overwritten. Choose another name.\n"
    assert (folder / "mine.yaml").read_text() == "precious"
    assert lowmem("cp", "shipped", "no/such/x.yaml").code == 2
    assert lowmem("cp", "shiped", "x.yaml").err.endswith("Did you mean shipped?\n")


def test_show_prints_the_recipe_as_written(lowmem: Command, folder: Path) -> None:
    assert lowmem("show", "shipped").out == RECIPE
    assert lowmem("show", "recipes/shipped.yaml").out == RECIPE
    (folder / "broken.yaml").write_text("oops: [1\n")
    assert lowmem("show", "broken.yaml").out == "oops: [1\n"


def test_show_resolved_prints_every_key_and_is_itself_a_recipe(lowmem: Command, folder: Path) -> None:
    done = lowmem("show", "mine.yaml", "--resolved", "train.seed=3")
    (folder / "resolved.yaml").write_text(done.out)
    assert load_recipe("resolved.yaml") == load_recipe("mine.yaml", ["train.seed=3"])
    assert (
        "# Settings of galore that the recipe leaves at their defaults:\n#   betas: [0.9, 0.999]\n"
        in done.out
    )
    assert "rank" not in done.out.partition("# Settings")[2]
    as_json = json.loads(lowmem("show", "mine.yaml", "--json", "train.seed=3").out)
    assert as_json == recipe_document(load_recipe("mine.yaml", ["train.seed=3"]))


def test_show_with_overrides_asks_for_resolved(lowmem: Command) -> None:
    done = lowmem("show", "mine.yaml", "train.seed=3")
    assert done.code == 2
    assert "add --resolved" in done.err


def test_show_schema_holds_every_key_with_its_default(lowmem: Command) -> None:
    text = lowmem("show", "--schema").out
    document = yaml.safe_load(text)
    for dotted, annotation, each in schema_keys():
        if dotted.startswith("data.eval."):
            continue
        found = document
        for name in dotted.split("."):
            found = found[name]
        if isinstance(each.default, (bool, int, float, str)):
            assert found == each.default, dotted
        assert each.metadata["doc"] in text, annotation
    for entry in optimizer_table().values():
        for name, about in entry["settings"].items():
            assert f"  # {name}:" in text
            assert about["doc"] in text


def test_show_schema_is_there_for_programs_too(lowmem: Command) -> None:
    schema = json.loads(lowmem("show", "--schema", "--json").out)
    keys = {entry["key"]: entry for entry in schema["keys"]}
    assert keys["train.max_steps"]["type"] == "a whole number >= 1, or null"
    assert keys["train.max_steps"]["default"] is None
    assert keys["model.name_or_path"]["required"] is True
    assert "default" not in keys["model.name_or_path"]
    assert set(schema["optimizers"]) == set(optimizer_table())


def test_validate_says_what_the_recipe_is_going_to_do(lowmem: Command) -> None:
    done = lowmem("validate", "mine.yaml", "train.max_steps=7")
    assert done.code == 0
    for expected in (
        "mine.yaml is valid.",
        "every parameter trained",
        "arithmetic",
        "galore: lr 0.001, rank 8",
        "7 steps",
    ):
        assert expected in done.out
    assert done.out.endswith("Start it: lowmem train mine.yaml train.max_steps=7\n")


def test_validate_prints_every_problem_and_nothing_else(lowmem: Command, folder: Path) -> None:
    (folder / "mine.yaml").write_text(RECIPE + "train: {seed: x}\nfoo: 1\n")
    done = lowmem("validate", "mine.yaml", "optimizer.ranks=3")
    assert (done.code, done.out) == (2, "")
    problems = done.err.splitlines()
    assert [problem.partition(" ")[0] for problem in problems] == ["mine.yaml:5:", "mine.yaml:6:", "command"]
    as_json = lowmem("validate", "mine.yaml", "optimizer.ranks=3", "--json")
    assert as_json.code == 2
    assert json.loads(as_json.out) == {"recipe": "mine.yaml", "valid": False, "problems": problems}
    assert json.loads(lowmem("validate", "shipped", "--json").out)["valid"] is True


def test_options_may_stand_between_overrides(lowmem: Command) -> None:
    done = lowmem("validate", "--json", "mine.yaml", "train.seed=1", "--json", "train.seed=2")
    assert json.loads(done.out)["valid"] is True
