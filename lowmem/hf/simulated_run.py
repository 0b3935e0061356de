"""A recipe's training steps on fake tensors: its own model code, Trainer, optimizer and hooks, without a weight."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem.hf.eval_mode import eval_mode
from lowmem.hf.fake_tensor_shims import real_attention_path, undisturbed_process
from lowmem.hf.held_out import held_out_loss
from lowmem.hf.make_optimizer import float_bytes, make_optimizer, model_bytes, trainable_bytes
from lowmem.hf.model_from_config import load_config, model_without_weights
from lowmem.hf.recorded_batches import Batch, StepBatches
from lowmem.hf.replayed_steps import replay, replay_arguments
from lowmem.hf.training_arguments import training_arguments
from lowmem.memory.plan_document import Moment
from lowmem.memory.readings import Measured
from lowmem.memory.simulate import SimulatedMeter, Simulation
from lowmem.memory.simulated_host import SimulatedHost
from lowmem.numerics.held_weights import nbytes_of, numel_of
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.fullest_turn import fullest_turns, pretend_turn_
from lowmem.optim.without_values import pretend_until_refresh_
from lowmem.recipe.schema import Recipe
from lowmem.run.activation_offload import OffloadedInputs

FIRST, LATER, REFRESH = "first step", "later step", "step with a refresh"
OTHER_TURN = "step of another turn"
TRAINING = (FIRST, LATER, OTHER_TURN, REFRESH)
EVALUATION, ANSWERING = "evaluation", "answering"


@dataclass(frozen=True)
class SimulatedRun:
    """What a simulation found. Bytes, and parameters by number."""

    measured: Measured
    moments: list[Moment]
    parameters: int
    trained_parameters: int
    weights_bytes: int
    float_bytes: int
    """Of the weights when those in int8 are written as float ones."""
    trained_bytes: int
    state_bytes: int
    largest_tensor_bytes: int
    pinned_host_bytes: int
    """For activations that are moved to the host."""
    notes: list[str]


def simulate_run(
    recipe: Recipe,
    steps: Sequence[Sequence[Batch]],
    *,
    on_cuda: bool,
    config: PreTrainedConfig | None = None,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    refresh: bool = False,
    evaluation: Batch | None = None,
    answering: Batch | None = None,
    batches_left_out_bytes: int = 0,
) -> SimulatedRun:
    """Train on `steps`, each a list of micro-batches with real integers in them, and count.

    `refresh`: the last step is one in which the optimizer fits its bases again, with all state there already.
    `evaluation` and `answering` are batches of a held-out loss and of prompts, run after the last step.
    Raises RecipeError for a model that has no configuration and RefusedError for one that cannot be simulated.
    """
    config = load_config(recipe.model) if config is None else config
    simulation = Simulation()
    host = SimulatedHost()
    # A run on a CPU moves nothing, so its plan may not either.
    offload = (
        OffloadedInputs(host, lambda tensor: True) if recipe.train.activation_offload and on_cuda else None
    )
    with (
        undisturbed_process(),
        real_attention_path(),
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the run itself warns where a person can see it
        args = training_arguments(recipe, Path(scratch), use_cpu=True)
        with simulation.tensors():
            model, notes = model_without_weights(recipe, config, offload=offload)
            meter = SimulatedMeter(model, on_cuda=on_cuda, batches_left_out_bytes=batches_left_out_bytes)
            data = StepBatches([[simulation.batch(batch) for batch in step] for step in steps])
            replay(
                recipe,
                model,
                data,
                optimizer_of or (lambda trained: make_optimizer(trained, recipe)),
                meter,
                replay_arguments(args, data),
                [RefreshInLastStep(meter)] if refresh else [],
            )
            optimizer = meter.optimizer
            if evaluation is not None:
                _evaluate(model, meter, simulation.batch(evaluation))
            if answering is not None:
                _answer(model, meter, simulation.batch(answering))
            params = list(model.parameters())
            return SimulatedRun(
                measured=meter.measured(),
                moments=meter.moments,
                parameters=sum(numel_of(param) for param in params),
                trained_parameters=sum(numel_of(param) for param in params if param.requires_grad),
                weights_bytes=model_bytes(model),
                float_bytes=float_bytes(model),
                trained_bytes=trainable_bytes(model),
                state_bytes=optimizer.state_bytes() if isinstance(optimizer, LowMemOptimizer) else 0,
                largest_tensor_bytes=max(nbytes_of(param) for param in params),
                pinned_host_bytes=host.peak_bytes,
                notes=notes,
            )


class RefreshInLastStep(TrainerCallback):
    """Moves the optimizer's counters and names the steps.

    Where blocks take turns, the second step is of the turn that has most state, and the third of one that has less but
    to which backward goes farther, if there is one. The last is one with a refresh, if there is any.
    """

    def __init__(self, meter: SimulatedMeter):
        self.meter = meter
        self.turns: list[int] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        number = state.global_step + 1
        name = FIRST if number == 1 else LATER
        optimizer = self.meter.optimizer
        if number == 2 and isinstance(optimizer, LowMemOptimizer):
            self.turns = fullest_turns(optimizer)
        if isinstance(optimizer, LowMemOptimizer) and number in (2, 3) and len(self.turns) > number - 2:
            pretend_turn_(optimizer, self.turns[number - 2])
            name = LATER if number == 2 else OTHER_TURN
        is_last = number == state.max_steps
        if is_last and isinstance(optimizer, LowMemOptimizer) and pretend_until_refresh_(optimizer):
            name = REFRESH
        self.meter.name_next(name)


def _evaluate(model: Any, meter: SimulatedMeter, batch: Batch) -> None:
    meter.name_next(EVALUATION)
    rows: list[dict[str, list[int]]] = [{}] * len(batch["input_ids"])
    with meter.step(), meter.phase("forward"):
        held_out_loss(model, rows, lambda _: batch, batch_size=len(rows))


def _answer(model: Any, meter: SimulatedMeter, batch: Batch) -> None:
    """The prompts' forward, which fills the cache; each answer token after it needs less."""
    meter.name_next(ANSWERING)
    prompts = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    with meter.step(), meter.phase("forward"), torch.no_grad(), eval_mode(model):
        kept = model(**prompts, use_cache=True, logits_to_keep=1)
        del kept
