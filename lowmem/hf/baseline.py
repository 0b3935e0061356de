"""What AdamW needs for the same steps: the same model, batches, Trainer settings and meter, in a fresh process.

    python -m lowmem.hf.baseline RECIPE BATCHES OUT

RECIPE is a resolved recipe, BATCHES the micro-batches that the run recorded, OUT becomes JSON: for each
variant either {"measured": ...} or {"reason": why it could not be measured}.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.model_setup import trainable_model
from lowmem.hf.recorded_batches import BatchRecorder, RecordedBatches
from lowmem.hf.replayed_steps import replay, replay_arguments
from lowmem.hf.training_arguments import training_arguments
from lowmem.memory.measure import Measured, meter_for
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import ModelRecipe, Recipe

VARIANTS = tuple(adamw_variants(0.0, 0.0))
LAUNCH_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)


def measure_baselines(recipe_file: Path, batches: BatchRecorder) -> dict[str, Measured | str]:
    """Start the fresh process and wait for it. A variant that failed has the reason in its place."""
    if not batches.steps:
        return dict.fromkeys(VARIANTS, "no step of this run was recorded")
    with tempfile.TemporaryDirectory() as scratch:
        saved, out = Path(scratch, "batches.safetensors"), Path(scratch, "baselines.json")
        batches.save(saved)
        command = [sys.executable, "-m", "lowmem.hf.baseline", str(recipe_file), str(saved), str(out)]
        done = subprocess.run(
            command, env=single_process_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return dict.fromkeys(VARIANTS, f"the baseline process ended with code {done.returncode}: {last}")
        found = json.loads(out.read_text(encoding="utf-8"))
    return {
        name: Measured(**entry["measured"]) if "measured" in entry else str(entry["reason"])
        for name, entry in found.items()
    }


def single_process_environment() -> dict[str, str]:
    """This process's environment without what a distributed launcher has added."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return {
        name: value for name, value in kept.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }


def measure_variant(
    recipe: Recipe,
    data: RecordedBatches,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    output_dir: Path,
) -> Measured:
    """Run the recorded steps with one AdamW and return what the meter saw."""
    args = replay_arguments(training_arguments(recipe, output_dir), data)
    model = trainable_model(recipe, device=args.device, probe_batch=data[0], say=lambda text: None)
    meter = meter_for(model, args.device)
    replay(recipe, model, data, optimizer_of, meter, args)
    return meter.measured()


def trained_by_others(model: ModelRecipe) -> ModelRecipe:
    """torch's optimizers know no int8 weights: they train the same model in float."""
    return replace(model, weights="bf16") if model.weights == "int8" else model


def main(arguments: list[str]) -> int:
    recipe_file, batches, out = (Path(argument) for argument in arguments)
    recipe = load_recipe(recipe_file, files_must_exist=False)
    # The checks of packing and of the loss were made by the run itself; data is not read at all.
    recipe = replace(recipe, data=replace(recipe.data, packing=False), model=trained_by_others(recipe.model))
    data = RecordedBatches(batches)
    settings = recipe.optimizer.settings
    found: dict[str, dict[str, Any]] = {}
    for name, optimizer_of in adamw_variants(settings["lr"], settings.get("weight_decay", 0.0)).items():
        try:
            with tempfile.TemporaryDirectory() as scratch:
                found[name] = {"measured": asdict(measure_variant(recipe, data, optimizer_of, Path(scratch)))}
        except torch.OutOfMemoryError:
            found[name] = {"reason": "out of memory: AdamW does not fit this device"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
