"""The folder of one run: whose it is, what it holds, and which checkpoint a run continues from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import FaultError, RecipeError
from lowmem.hf.atomic_folder import delete_folder_, publish_folder, recover_replaced_
from lowmem.hf.metrics import MetricsFile
from lowmem.recipe.dump import recipe_document
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe
from lowmem.run.checkpoint import (
    CHECKPOINT_PREFIX,
    WHOLE_STATE,
    Choice,
    checkpoints_in,
    choose_newest_good,
    drop_optimizer_state_,
    has_optimizer_state,
    is_complete,
    newest_with_optimizer_state,
    seal,
    set_aside_,
    step_of,
    verify,
)
from lowmem.run.checkpoint_manifest import DamagedError

STATE_FILE = "trainer_state.json"
OF_ANY_LAUNCH = ("distributed", "train.per_device_batch_size", "train.gradient_accumulation_steps")
"""What may change, too, where a run goes on from state that any launch can load."""

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
        return MetricsFile(self.path / "metrics.jsonl", self.newest_checkpoint)

    @property
    def memory(self) -> Path:
        return self.path / "memory.json"

    @property
    def processes(self) -> Path:
        return self.path / "processes.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def on_trial(self) -> Path:
        """A checkpoint of the state before the first step, which is tried out and taken away."""
        return self.unfinished / f"{CHECKPOINT_PREFIX}0"

    @property
    def unfinished(self) -> Path:
        """Where a checkpoint is written before it has its name."""
        return self.path / ".saving"

    def checkpoints(self) -> list[Path]:
        """Oldest first, damaged ones too; none is unfinished, for each got its name when it was complete."""
        return checkpoints_in(self.path)

    def newest_checkpoint(self) -> Path | None:
        """The newest whose files are all there in their sizes; their content is checked by who resumes."""
        return next((path for path in reversed(self.checkpoints()) if is_complete(path)), None)

    def publish_checkpoint_(self, unfinished: Path, *, keep: int, optimizer_states: str) -> Path:
        """Seal `unfinished`, give it its name, and only then take from older ones what is no longer kept."""
        seal(unfinished, step=step_of(unfinished) or 0)
        self.metrics.flush_to_disk()  # a checkpoint must not outlive the rows of its steps
        published = self.path / unfinished.name
        publish_folder(unfinished, published)
        self.thin_out_(keep=keep, optimizer_states=optimizer_states)
        return published

    def thin_out_(self, *, keep: int, optimizer_states: str) -> None:
        """Take from older checkpoints what is no longer kept. Also ends what a killed process had begun."""
        for folder in self.checkpoints()[:-keep]:
            delete_folder_(folder)
        newest = newest_with_optimizer_state(self.checkpoints())
        if optimizer_states == "newest" and newest is not None:
            for folder in self.checkpoints():
                if (step_of(folder) or 0) < (step_of(newest) or 0):
                    drop_optimizer_state_(folder)

    def clear_leftovers_(self) -> None:
        """Remove what a killed process was writing or deleting. Only for who holds the folder's lock."""
        recover_replaced_(self.model)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        # Of the model, and of int8 files on their way to float ones.
        for folder in self.path.glob(f".{self.model.name}.saving*"):
            shutil.rmtree(folder, ignore_errors=True)
        self.metrics.replacement.unlink(missing_ok=True)
        for path in (self.recipe, self.environment):
            path.with_name(f".{path.name}.new").unlink(missing_ok=True)
        for path in (self.memory, self.processes):
            if path.is_file() and not _is_json(path):
                path.unlink()
        for folder in self.path.glob(f".{CHECKPOINT_PREFIX}*.deleting"):
            shutil.rmtree(folder, ignore_errors=True)

    def holds_a_run(self) -> bool:
        """Something that training produced; a recipe alone is left by a run that failed at set-up."""
        trained = [self.model, self.metrics.path, *self.checkpoints()]
        return any(path.exists() for path in trained)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def flat_keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.seed": 0, ...} of nested mappings; pairs and lists are alike, as in YAML."""
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {} if value or not prefix else {prefix: {}}
    for name, inner in value.items():
        flat.update(flat_keys(inner, f"{prefix}.{name}" if prefix else name))
    return flat


def differing_keys(old: Recipe, new: Recipe, may_change: Sequence[str] = MAY_CHANGE) -> list[str]:
    """Lines `key: old, now new` for what must be equal when a run continues."""
    left, right = flat_keys(recipe_document(old)), flat_keys(recipe_document(new))
    lines = []
    for name in sorted(left.keys() | right.keys()):
        is_free = any(name == free or name.startswith(free + ".") for free in may_change)
        if not is_free and left.get(name) != right.get(name):
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
    is_whole = any((checkpoint / WHOLE_STATE).is_file() for checkpoint in folder.checkpoints())
    lines = differing_keys(old, recipe, (*MAY_CHANGE, *OF_ANY_LAUNCH) if is_whole else MAY_CHANGE)
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


def checkpoint_to_resume(
    recipe: Recipe, folder: RunFolder, say: Callable[[str], Any], *, is_main: bool = True
) -> Path | None:
    """The checkpoint the run starts from, every file of it verified; None for a fresh start.

    With `resume: auto` a damaged checkpoint is passed over, said in one line, and set aside by the main
    process. Raises RecipeError for a path that is no checkpoint or has no optimizer state any more, FaultError
    when the chosen checkpoint, or every one, is damaged.
    """
    if recipe.resume == "never":
        return None
    if recipe.resume == "auto":
        return _newest_good_checkpoint(folder, say, is_main=is_main)
    chosen = Path(recipe.resume).expanduser()
    if step_of(chosen) is None or chosen not in checkpoints_in(chosen.parent):
        known = ", ".join(str(path) for path in folder.checkpoints()) or "none"
        raise RecipeError(
            f"resume: {chosen} is not a checkpoint folder (checkpoint-<step>, with files in it). Use auto, never "
            f"or the path of a checkpoint; {folder.path} holds: {known}."
        )
    newest = folder.newest_checkpoint()
    if newest is not None and (step_of(newest) or 0) > (step_of(chosen) or 0):
        raise RecipeError(
            f"resume: {chosen}, but {folder.path} also holds the newer {newest.name}, which the new run would mix "
            "with its own. Delete the newer checkpoints or choose another save.dir."
        )
    try:
        verify(chosen)
    except DamagedError as error:
        raise FaultError(
            f"resume: {chosen} is damaged: {error}. Restore that file from a copy, resume from another checkpoint, "
            "or set resume: auto, which continues from the newest one without damage."
        ) from error
    refuse_other_recipe(RunFolder(chosen.parent), recipe)
    if not has_optimizer_state(chosen):
        able = newest_with_optimizer_state(checkpoints_in(chosen.parent))
        newest_able = f"the newest that has it is {able}" if able else "no other checkpoint beside it has one"
        raise RecipeError(
            f"resume: the optimizer state of {chosen} is gone (save.optimizer_states: newest keeps one); "
            f"{newest_able}. Resume from that one. To train on from the weights alone, set "
            "model.name_or_path to this checkpoint and choose another save.dir."
        )
    return chosen


def _newest_good_checkpoint(folder: RunFolder, say: Callable[[str], Any], *, is_main: bool) -> Path | None:
    choice = choose_newest_good(folder.checkpoints())
    if choice.damaged and choice.checkpoint is None:
        raise FaultError(
            f"{folder.path} holds no checkpoint without damage. {'; '.join(map(str, choice.damaged))}. Restore the "
            "files from a copy, or delete the checkpoints to start afresh."
        )
    gone = _optimizer_state_is_gone(folder, choice)
    for damage in choice.damaged:
        assert choice.checkpoint is not None
        text = f"{damage.checkpoint.name} is damaged ({damage.reason}); falling back to {choice.checkpoint.name}{gone}"
        if is_main:
            text += f". The damaged one is now {set_aside_(damage.checkpoint).name}"
        say(text + ".")
    if gone and not choice.damaged:
        assert choice.checkpoint is not None
        say(f"continuing from {choice.checkpoint.name}{gone}.")
    return choice.checkpoint


def _optimizer_state_is_gone(folder: RunFolder, choice: Choice) -> str:
    """The end of a sentence about the chosen checkpoint; empty where it has its optimizer state."""
    if choice.checkpoint is None or has_optimizer_state(choice.checkpoint):
        return ""
    passed_over = [one.checkpoint for one in choice.damaged]
    able = newest_with_optimizer_state(path for path in folder.checkpoints() if path not in passed_over)
    where = f"the newest that has it is {able.name}" if able else "no checkpoint without damage has one"
    return (
        ", whose optimizer state is gone (save.optimizer_states: newest) and starts anew, so this run will differ "
        f"from an undisturbed one; {where}"
    )
