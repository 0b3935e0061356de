"""One configuration: its plan by simulation, and the same batches trained for real under the meter."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gpu_validation.configurations import Configuration
from gpu_validation.driver import bytes_in_use, free_bytes, settled
from lowmem.data.example import IGNORED
from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.make_optimizer import make_optimizer
from lowmem.hf.metering import STEADY_STEP
from lowmem.hf.model_from_config import model_without_weights
from lowmem.hf.model_setup import offload_of
from lowmem.hf.planned_batches import planned_batch
from lowmem.hf.recorded_batches import Batch, StepBatches
from lowmem.hf.replayed_steps import replay, replay_arguments
from lowmem.hf.simulated_run import simulate_run
from lowmem.hf.training_arguments import training_arguments
from lowmem.memory.measure import meter_for
from lowmem.memory.readings import Measured
from lowmem.recipe.schema import Recipe

PLANNED_STEPS = 3
LAST_WATCHED_STEP = 1 + STEADY_STEP
TIMED_STEPS = 5


class Run:
    """A configuration made concrete for a device. `small` runs are a rehearsal's."""

    def __init__(self, chosen: Configuration, *, small: bool):
        self.recipe: Recipe = chosen.recipe(small=small)
        self.shape = chosen.shape(small=small)
        self.step: list[Batch] = _step(self.recipe, self.shape["vocab_size"], full_rows=chosen.rows == "full")
        self.torch_adamw = chosen.torch_adamw

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.torch_adamw is None:
            return make_optimizer(model, self.recipe)
        settings = self.recipe.optimizer.settings
        variants = adamw_variants(settings["lr"], settings.get("weight_decay", 0.0))
        return variants[self.torch_adamw](model)

    def tokens(self) -> int:
        """Of one optimizer step, padding included."""
        return sum(batch["input_ids"].numel() for batch in self.step)

    def plan(self, *, on_cuda: bool) -> dict[str, Any]:
        """JSON values. No device is touched."""
        start = time.perf_counter()
        found = simulate_run(
            self.recipe,
            [self.step] * PLANNED_STEPS,
            on_cuda=on_cuda,
            config=LlamaConfig(**self.shape),
            optimizer_of=self.optimizer,
        )
        moments = [
            {"step": each.name, "peak_bytes": each.peak_bytes, "phase": each.phase, "place": each.place}
            for each in found.moments
        ]
        return _account(found.measured) | {
            "moments": moments,
            "parameters": found.parameters,
            "trained_parameters": found.trained_parameters,
            "state_bytes": found.state_bytes,
            "notes": found.notes,
            "seconds": round(time.perf_counter() - start, 1),
        }

    def measure(self, device: torch.device, *, timed_steps: int = TIMED_STEPS) -> dict[str, Any]:
        """JSON values: the steps 1, 2 and 5 of a replay are metered, `timed_steps` later ones timed.

        Raises what the model, the optimizer or the device raise, torch.OutOfMemoryError among it.
        """
        on_cuda = device.type == "cuda"
        free_before = settled(free_bytes) if on_cuda else None
        data = StepBatches([self.step] * (LAST_WATCHED_STEP + timed_steps))
        clock = StepClock(device)
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a Trainer that saves nothing and a model that is never used
            args = replay_arguments(training_arguments(self.recipe, Path(scratch), use_cpu=not on_cuda), data)
            with device:
                offload = offload_of(self.recipe, device, lambda text: None)
                model, _ = model_without_weights(self.recipe, LlamaConfig(**self.shape), offload=offload)
            gc.collect()
            if on_cuda:
                torch.cuda.empty_cache()  # what drawing the first weights has left
            meter = meter_for(model, args.device)
            trainer = replay(self.recipe, model, data, self.optimizer, meter, args, [clock])
        seconds = clock.seconds_a_step()
        found = _account(meter.measured()) | {
            "step_seconds": seconds,
            "tokens_per_second": None if seconds is None else round(self.tokens() / seconds, 1),
        }
        if free_before is not None:
            found |= _driver_readings(free_before)
        del trainer
        return found


class StepClock(TrainerCallback):
    """Wall time of the steps after the last watched one, each until the device has done its work."""

    def __init__(self, device: torch.device):
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._times: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= LAST_WATCHED_STEP:
            self._read()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == state.max_steps:
            self._read()

    def _read(self) -> None:
        self._wait()
        self._times.append(time.perf_counter())

    def seconds_a_step(self) -> float | None:
        """The median; None where no step was timed."""
        pairs = zip(self._times, self._times[1:], strict=False)
        spans = [after - before for before, after in pairs]
        return round(statistics.median(spans), 4) if spans else None


def _driver_readings(free_before: int) -> dict[str, Any]:
    """Of a process that still holds its model: what it took since the context, and what is in use in all."""
    torch.cuda.synchronize()
    return {
        "num_alloc_retries": int(torch.cuda.memory_stats()["num_alloc_retries"]),
        "driver": {
            "taken_since_context_bytes": free_before - free_bytes(),
            "in_use_bytes": bytes_in_use(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        },
    }


def _step(recipe: Recipe, vocabulary: int, *, full_rows: bool) -> list[Batch]:
    """The micro-batches of one step: the plan's shapes and masks, with drawn tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(recipe.train.gradient_accumulation_steps):
        batch = planned_batch(recipe, full_rows=full_rows)
        tokens = torch.randint(vocabulary, batch["input_ids"].shape, generator=generator)
        labels = torch.where(batch["labels"] == IGNORED, IGNORED, tokens)
        batches.append(batch | {"input_ids": tokens, "labels": labels})
    return batches


def _account(measured: Measured) -> dict[str, Any]:
    return {
        "peak_bytes": measured.peak_bytes,
        "steady_peak_bytes": measured.steady_peak_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "parts": dict(measured.parts),
        "warnings": list(measured.warnings),
    }
