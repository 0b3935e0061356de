"""The plan of a recipe from a simulation of its steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowmem.hf.conditions import conditions
from lowmem.hf.model_from_config import load_config
from lowmem.hf.planned_batches import planned_batch
from lowmem.hf.simulated_run import TRAINING, SimulatedRun, simulate_run
from lowmem.memory.cards import Card
from lowmem.memory.plan_document import Checkpoint
from lowmem.memory.readings import Measured, Reading, over_steps
from lowmem.recipe.schema import Recipe

SIMULATED_STEPS = 3  # the first, a later one, and one with a refresh
SIMULATED_MICRO_BATCHES = 2  # one that makes the gradients and one that adds to them; more repeat the second
WITH_A_MIDDLE_ONE = 3  # where the last micro-batch frees gradients that the one before it keeps


def simulated_plan(recipe: Recipe, *, full_rows: bool = False) -> SimulatedRun:
    """Simulate the recipe's first step, a later one, one with a refresh, and its evaluations, for CUDA."""
    batch = planned_batch(recipe, full_rows=full_rows)
    micro_batches = recipe.train.gradient_accumulation_steps
    may_be_fused = recipe.train.execution == "fused" or (
        recipe.train.execution == "auto" and recipe.train.max_grad_norm is None
    )
    simulated = min(micro_batches, WITH_A_MIDDLE_ONE if may_be_fused else SIMULATED_MICRO_BATCHES)
    rows = recipe.eval.batch_size or recipe.train.per_device_batch_size
    has_evaluation = recipe.data.eval is not None
    answers = replace(recipe, data=replace(recipe.data, packing=False))
    return simulate_run(
        recipe,
        [[batch] * simulated] * SIMULATED_STEPS,
        on_cuda=True,
        config=load_config(recipe.model),
        refresh=True,
        evaluation=planned_batch(recipe, rows=rows, full_rows=full_rows) if has_evaluation else None,
        answering=planned_batch(answers, rows=rows) if has_evaluation and not recipe.eval.loss_only else None,
        batches_left_out_bytes=(micro_batches - simulated) * sum(value.nbytes for value in batch.values()),
    )


def checkpoint_of(recipe: Recipe, run: SimulatedRun) -> Checkpoint:
    """Sizes without the few kilobytes of configuration, tokenizer and counters.

    Tensors are written one after the other, so the host holds a copy of one at a time.
    """
    weights = run.weights_bytes if recipe.lora is None else run.trained_bytes
    model = run.weights_bytes if recipe.save.merge_lora else weights
    if recipe.model.weights == "int8" and not recipe.save.int8:
        model = run.float_bytes
    if not recipe.save.model:
        model = 0
    return Checkpoint(weights + run.state_bytes, model, run.largest_tensor_bytes)


def planned_conditions(recipe: Recipe, run: SimulatedRun, *, full_rows: bool) -> dict[str, object]:
    batch = planned_batch(recipe, rows=1, full_rows=full_rows)
    return conditions(
        recipe,
        parameters=run.parameters,
        trained_parameters=run.trained_parameters,
        sequence_length=batch["input_ids"].shape[1],
        device="cuda",
        torch=torch.__version__,
    ) | {"attention_mask": mask_kind(recipe, full_rows)}


def mask_kind(recipe: Recipe, full_rows: bool) -> str:
    if full_rows or recipe.model.attn == "flash_attention_2":
        return "none"
    return "between documents" if recipe.data.packing else "padding"


def this_machines_card() -> Card | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(device.name, device.total_memory)


def fullest_step(run: SimulatedRun) -> Measured:
    """The result over the training steps, as a run measures it; what is reserved, evaluations included."""
    reserved = run.measured.reserved_bytes
    steps = [moment for moment in run.moments if moment.name in TRAINING]
    readings = [Reading(moment.peak_bytes, moment.parts, reserved) for moment in steps]
    return over_steps(readings, "simulated", run.measured.warnings)
