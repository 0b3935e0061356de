"""The folder of one run: whose it is, what it holds, and which checkpoint a run continues from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import RecipeError
from lowmem.hf.metrics import MetricsFile
from lowmem.recipe.dump import recipe_document
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe

CHECKPOINT_PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"  # the last file a checkpoint gets
MAY_CHANGE = ("train.max_steps", "train.epochs", "save", "resume", "report", "eval")
"""Keys that do not change what has been trained so far, so a run may continue with other values."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder. `lowmem report` and other programs rely on these names."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.path / "metrics.jsonl")

    @property
    def memory(self) -> Path:
        return self.path / "memory.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [
            folder for folder in self.path.glob(CHECKPOINT_PREFIX + "*") if (folder / STATE_FILE).is_file()
        ]
        return sorted(
            (folder for folder in found if step_of(folder) is not None), key=lambda f: step_of(f) or 0
        )

    def newest_checkpoint(self) -> Path | None:
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def delete_old_checkpoints_(self, keep: int) -> None:
        for folder in self.checkpoints()[:-keep]:
            shutil.rmtree(folder)

    def holds_a_run(self) -> bool:
        """Something that training produced; a recipe alone is left by a run that failed at set-up."""
        trained = [self.model, self.metrics.path, *self.checkpoints()]
        return any(path.exists() for path in trained)


def step_of(checkpoint: Path) -> int | None:
    """120 for .../checkpoint-120; None for other names."""
    number = checkpoint.name.removeprefix(CHECKPOINT_PREFIX)
    return int(number) if number.isdigit() and number != checkpoint.name else None


def flat_keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.seed": 0, ...} of nested mappings; pairs and lists are alike, as in YAML."""
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {} if value or not prefix else {prefix: {}}
    for name, inner in value.items():
        flat.update(flat_keys(inner, f"{prefix}.{name}" if prefix else name))
    return flat


def differing_keys(old: Recipe, new: Recipe) -> list[str]:
    """Lines `key: old, now new` for what must be equal when a run continues."""
    left, right = flat_keys(recipe_document(old)), flat_keys(recipe_document(new))
    lines = []
    for name in sorted(left.keys() | right.keys()):
        may_change = any(name == free or name.startswith(free + ".") for free in MAY_CHANGE)
        if not may_change and left.get(name) != right.get(name):
            lines.append(f"{name}: {left.get(name)!r} there, {right.get(name)!r} in this recipe")
    return lines


def refuse_other_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Raise RecipeError when `folder` holds the run of a recipe that trains something else."""
    if not folder.holds_a_run():
        return
    mend = "Choose another save.dir, or delete the folder if its run is no longer wanted."
    if not folder.recipe.is_file():
        raise RecipeError(
            f"save.dir: {folder.path} holds a run without its recipe.yaml, so it cannot be continued. {mend}"
        )
    try:
        old = load_recipe(folder.recipe, files_must_exist=False)
    except RecipeError as error:
        raise RecipeError(
            f"save.dir: {folder.path} holds a run whose recipe.yaml this version cannot read ({error}). {mend}"
        ) from error
    lines = differing_keys(old, recipe)
    if lines:
        raise RecipeError([f"save.dir: {folder.path} holds the run of another recipe. {mend}", *lines])


def open_run_folder(recipe: Recipe) -> RunFolder:
    """Make the folder, or accept the one that is there.

    Raises RecipeError when it belongs to another recipe, and with `resume: never` when it holds checkpoints.
    """
    if recipe.save.dir is None:
        raise RecipeError("save.dir: a recipe that was not read from a file needs it; name the run's folder.")
    folder = RunFolder(Path(recipe.save.dir).expanduser())
    if folder.path.exists() and not folder.path.is_dir():
        raise RecipeError(f"save.dir: {folder.path} is a file; choose another save.dir.")
    refuse_other_recipe(folder, recipe)
    checkpoints = folder.checkpoints()
    if recipe.resume == "never" and checkpoints:
        raise RecipeError(
            f"resume: never, but {folder.path} holds {len(checkpoints)} checkpoint(s), the newest "
            f"{checkpoints[-1].name}. Delete them, choose another save.dir, or set resume: auto to continue."
        )
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / ".writable").touch()
        (folder.path / ".writable").unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise RecipeError(f"save.dir: {folder.path} cannot be written: {error.strerror}.") from error
    return folder


def checkpoint_to_resume(recipe: Recipe, folder: RunFolder) -> Path | None:
    """The checkpoint the run starts from, None for a fresh start. Raises RecipeError for a path that is none."""
    newest = folder.newest_checkpoint()
    if recipe.resume == "auto":
        return newest
    if recipe.resume == "never":
        return None
    chosen = Path(recipe.resume).expanduser()
    if not (chosen / STATE_FILE).is_file() or step_of(chosen) is None:
        known = ", ".join(str(path) for path in folder.checkpoints()) or "none"
        raise RecipeError(
            f"resume: {chosen} is not a checkpoint folder (checkpoint-<step> with {STATE_FILE}). Use auto, never "
            f"or the path of a checkpoint; {folder.path} holds: {known}."
        )
    if newest is not None and (step_of(newest) or 0) > (step_of(chosen) or 0):
        raise RecipeError(
            f"resume: {chosen}, but {folder.path} also holds the newer {newest.name}, which the new run would mix "
            "with its own. Delete the newer checkpoints or choose another save.dir."
        )
    refuse_other_recipe(RunFolder(chosen.parent), recipe)
    return chosen
