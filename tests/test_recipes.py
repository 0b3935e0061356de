"""Every shipped recipe is valid and says at its top how to run it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from lowmem.recipe.dump import dump_recipe
from lowmem.recipe.load import load_recipe
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import DistributedRecipe

ROOT = Path(__file__).parent.parent
LAUNCHES = ROOT / "recipes" / "accelerate"
"""Files for Accelerate's launcher, which are no recipes."""
RECIPES = sorted(
    path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml") if LAUNCHES not in path.parents
)


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_shipped_recipe_loads_without_a_problem_and_survives_a_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_comment_at_the_top_says_what_it_is_and_the_command_that_runs_it(path: Path) -> None:
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# ").rstrip())
    assert len(header[0].split()) >= 3
    commands = [line.split() for line in header]
    assert ["lowmem", "train", str(path)] in [words[:3] for words in commands] or [
        *("accelerate", "launch", "-m", "lowmem.train", str(path))
    ] in [words[:5] for words in commands]


def test_every_optimizer_has_a_recipe() -> None:
    assert {load_recipe(path).optimizer.name for path in RECIPES} >= set(optimizer_table())


@pytest.mark.parametrize("path", sorted(LAUNCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_there_is_a_launch_file_for_each_strategy_that_says_how_to_use_it(path: Path) -> None:
    assert path.stem in get_args(get_type_hints(DistributedRecipe)["strategy"])
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch --config_file recipes/accelerate/{path.name} -m lowmem.train RECIPE" in text
