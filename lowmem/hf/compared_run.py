"""One method of a comparison: N recorded steps with one optimizer, in a process of its own.

    python -m lowmem.hf.compared_run RECIPE WORK OUT [VARIANT]

RECIPE is a resolved recipe with the method's optimizer, WORK a folder with the micro-batches that every
method is given, OUT becomes JSON: either what was measured, or {"reason": why nothing was}. VARIANT names
one of torch's AdamWs, which takes lr and weight_decay from the recipe and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem.errors import LowMemError
from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.baseline import trained_by_others
from lowmem.hf.callbacks import MeterBorders
from lowmem.hf.compared_batches import HELD_OUT, TRAIN, checksum, num_tokens
from lowmem.hf.environment import describe_environment
from lowmem.hf.held_out import held_out_loss
from lowmem.hf.make_optimizer import make_optimizer
from lowmem.hf.metering import StepWatch, steps_to_watch
from lowmem.hf.metrics import printable_number
from lowmem.hf.model_setup import trainable_model
from lowmem.hf.quiet import quiet_transformers
from lowmem.hf.recorded_batches import RecordedBatches, only_item
from lowmem.hf.replayed_steps import replay_arguments
from lowmem.hf.trainer import LowMemTrainer
from lowmem.hf.training_arguments import training_arguments
from lowmem.memory.measure import meter_for
from lowmem.memory.owners import owned_bytes
from lowmem.numerics.held_weights import numel_of
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe

Batch = dict[str, Tensor]

WARM_UP = 2  # steps in which state is created and libraries choose their kernels
ADAMW_IN_BACKWARD = "adamw_fused_backward"


def timed_steps(steps: int) -> list[int]:
    """1-based steps of `steps` whose seconds count: after the warm-up, and not slowed by the meter."""
    return sorted(set(range(WARM_UP + 1, steps + 1)) - steps_to_watch(1, steps))


class StepClock(TrainerCallback):
    """Seconds of each step, from the first forward to the end of the optimizer, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = _now(args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(_now(args.device) - self._began)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class ReplayingTrainer(LowMemTrainer):
    """Notes what the model is really given at each step, before its clock runs."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.checksums: list[str] = []
        self.tokens: list[int] = []

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        batches, trained_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.checksums.append(checksum(batches))
        self.tokens.append(num_tokens(batches))
        return batches, trained_tokens


def measure_method(recipe: Recipe, work: Path, variant: str | None, output_dir: Path) -> dict[str, Any]:
    """Train on the recorded steps; memory of the watched ones, seconds of the others, losses of all."""
    data = RecordedBatches(work / TRAIN)
    args = replay_arguments(training_arguments(recipe, output_dir), data)
    args.logging_strategy, args.logging_steps = "steps", 1
    notes: list[str] = []
    model = trainable_model(recipe, device=args.device, probe_batch=data[0], say=notes.append)
    meter = meter_for(model, args.device)
    watch, clock = StepWatch(meter), StepClock()
    tokens_per_step = num_tokens([data[index] for index in range(len(data))]) / data.num_steps
    trainer = ReplayingTrainer(
        model=model,
        args=args,
        optimizer_of=lambda trained: _optimizer(trained, recipe, variant, tokens_per_step),
        schedule=recipe.train.lr_scheduler,
        train_dataset=data,
        collate=only_item,
        watch=watch,
        callbacks=[MeterBorders(watch), clock],
    )
    optimizer = trainer.create_optimizer()
    meter.watch(optimizer)
    with watch.closed_at_the_end():
        trainer.train()
    timed = timed_steps(data.num_steps)
    seconds = [clock.seconds[step - 1] for step in timed]
    rates = [trainer.tokens[step - 1] / clock.seconds[step - 1] for step in timed]
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    follows_recipe = variant != ADAMW_IN_BACKWARD
    memory = asdict(meter.measured())
    return {
        "measured_by": memory.pop("source"),
        "measured_steps": memory.pop("steps"),
        **memory,
        "optimizer_state_bytes": owned_bytes(model, optimizer, args.device)["optimizer_state"],
        "step_seconds": {"median": median(seconds), "min": min(seconds), "max": max(seconds)},
        "timed_seconds": seconds,
        "tokens_per_second": median(rates),
        "losses": [printable_number(loss) for loss in losses],
        "losses_compare": follows_recipe,
        **(_held_out(model, work / HELD_OUT) if follows_recipe else {}),
        "batch_checksums": trainer.checksums,
        "notes": notes,
        "environment": describe_environment(args.world_size),
        "conditions": _conditions(model, args.device),
    }


def _optimizer(
    model: torch.nn.Module, recipe: Recipe, variant: str | None, tokens_per_step: float
) -> torch.optim.Optimizer:
    if variant is None:
        return make_optimizer(model, recipe, tokens_per_step=tokens_per_step)
    settings = recipe.optimizer.settings
    return adamw_variants(settings["lr"], settings["weight_decay"])[variant](model)


def _held_out(model: torch.nn.Module, saved: Path) -> dict[str, Any]:
    if not saved.is_file():
        return {}
    data = RecordedBatches(saved)
    rows: list[Any] = [data[index] for index in range(len(data))]
    found = held_out_loss(model, rows, only_item, batch_size=1)  # type: ignore[arg-type]  # an item is a batch
    assert found is not None, "nothing asks this evaluation to stop"
    return {"held_out_loss": printable_number(found[0]), "held_out_tokens": found[1]}


def _conditions(model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    """What only a process that has the model knows of the conditions."""
    params = list(model.parameters())
    return {
        "parameters": sum(numel_of(param) for param in params),
        "trained_parameters": sum(numel_of(param) for param in params if param.requires_grad),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main(arguments: list[str]) -> int:
    recipe_file, work, out = (Path(argument) for argument in arguments[:3])
    variant = arguments[3] if len(arguments) > 3 else None
    # The rows were read by the process that recorded the batches, so their files are not looked for.
    recipe = load_recipe(recipe_file, files_must_exist=False)
    if variant is not None:
        recipe = replace(recipe, model=trained_by_others(recipe.model))
    found: dict[str, Any]
    try:
        with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
            found = measure_method(recipe, work, variant, Path(scratch))
    except LowMemError as error:
        found = {"reason": str(error)}
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_full and "DefaultCPUAllocator: " not in str(error):
            raise
        found = {"reason": f"out of memory: {(str(error).splitlines() or ['the device is full'])[0]}"}
    out.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
