"""Reading a run folder whatever state a crash left it in. What is not there or torn is said, never guessed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem.errors import RecipeError
from lowmem.memory.processes import FILE as PROCESSES
from lowmem.memory.processes import is_processes_document

FILES = ("memory.json", "metrics.jsonl", "recipe.yaml", "environment.json")


@dataclass
class RunFiles:
    """What a run folder holds. `training` and `evaluations` are rows of metrics.jsonl in step order."""

    path: Path
    memory: dict[str, Any] | None = None
    processes: dict[str, Any] | None = None
    """Of a run that was divided."""
    training: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str | None = None
    environment: dict[str, Any] | None = None
    gaps: list[str] = field(default_factory=list)
    """One sentence for everything that a report would show and that is not there."""


def read_run(run_dir: str | Path) -> RunFiles:
    """Read what there is. Raises RecipeError where there is no run at all."""
    path = Path(run_dir)
    if not path.is_dir():
        raise RecipeError(f"{path} is not a folder. Give the folder of a run (save.dir of its recipe).")
    if not any((path / name).is_file() for name in FILES):
        raise RecipeError(
            f"{path} holds no run: none of {', '.join(FILES)} is there. Give the folder of a run (save.dir of its "
            "recipe), or run `lowmem train` first."
        )
    run = RunFiles(path)
    run.memory = _memory(run)
    run.processes = _processes(run)
    _read_metrics(run)
    _read_recipe(run)
    run.environment = _json_object(run, "environment.json", "what the run ran on")
    return run


def _text(run: RunFiles, name: str, holds: str) -> str | None:
    file = run.path / name
    if not file.is_file():
        run.gaps.append(f"{name} is missing: {holds} is unknown.")
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        run.gaps.append(f"{name} cannot be read ({error}): {holds} is unknown.")
        return None


def _json_object(run: RunFiles, name: str, holds: str) -> dict[str, Any] | None:
    text = _text(run, name, holds)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        run.gaps.append(f"{name} is not JSON (line {error.lineno}: {error.msg}): {holds} is unknown.")
        return None
    if not isinstance(value, dict):
        run.gaps.append(f"{name} holds no JSON object: {holds} is unknown.")
        return None
    return value


def _memory(run: RunFiles) -> dict[str, Any] | None:
    """memory.json if it has the shape that `memory_document` gives it."""
    value = _json_object(run, "memory.json", "the memory the run needed")
    if value is None:
        return None
    baselines, conditions = value.get("baselines"), value.get("conditions")
    if isinstance(baselines, dict) and isinstance(conditions, dict):
        named = [value, *(account for account in baselines.values() if account is not None)]
        if all(_is_account(account) for account in named):
            return value
    run.gaps.append("memory.json is not a memory document of lowmem: the memory the run needed is unknown.")
    return None


def _processes(run: RunFiles) -> dict[str, Any] | None:
    """processes.json, which only a divided run has."""
    if not (run.path / PROCESSES).is_file():
        return None
    value = _json_object(run, PROCESSES, "what each process held")
    if value is None or is_processes_document(value):
        return value
    run.gaps.append(f"{PROCESSES} is not a document of lowmem: what each process held is unknown.")
    return None


def _is_account(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("parts"), dict):
        return False
    if value.get("source") == "measured" and ("measured_by" not in value or "steps" not in value):
        return False
    peak = value.get("peak_bytes")
    return isinstance(peak, int) and peak > 0 and "source" in value and "reserved_bytes" in value


def _read_metrics(run: RunFiles) -> None:
    text = _text(run, "metrics.jsonl", "how training went")
    if text is None:
        return
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            torn = "the run ended while it was written" if number == len(lines) else "left out"
            run.gaps.append(f"metrics.jsonl:{number} is not a row of metrics ({torn}).")
            continue
        (run.evaluations if "eval_loss" in row else run.training).append(row)
    run.training.sort(key=lambda row: row["step"])
    run.evaluations.sort(key=lambda row: row["step"])
    if not run.training:
        run.gaps.append("metrics.jsonl holds no training step yet.")


def _read_recipe(run: RunFiles) -> None:
    import yaml

    run.recipe_text = _text(run, "recipe.yaml", "what was asked for")
    if run.recipe_text is None:
        return
    try:
        value = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, dict):
        run.recipe = value
    else:
        run.gaps.append("recipe.yaml is not a YAML mapping: the names of model and optimizer are unknown.")
