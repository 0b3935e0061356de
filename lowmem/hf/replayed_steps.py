"""Run the Trainer over given micro-batches, to see what their steps need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from lowmem.hf.callbacks import MeterBorders
from lowmem.hf.metering import StepWatch
from lowmem.hf.recorded_batches import StepBatches, only_item
from lowmem.hf.trainer import LowMemTrainer
from lowmem.memory.measure import Meter
from lowmem.optim.engine import LowMemOptimizer
from lowmem.recipe.schema import Recipe


def replay_arguments(args: TrainingArguments, data: StepBatches) -> TrainingArguments:
    """`args` for exactly the steps of `data`, in their order, with nothing logged and nothing saved."""
    args.per_device_train_batch_size = 1  # an item is a whole micro-batch
    args.gradient_accumulation_steps = data.micro_batches
    args.max_steps = data.num_steps
    args.train_sampling_strategy = "sequential"
    args.logging_strategy = args.save_strategy = "no"
    return args


def replay(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    data: StepBatches,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    meter: Meter,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> LowMemTrainer:
    """Train `model` on `data` under `meter`, with the recipe's schedule and clipping. `callbacks` come first.

    An optimizer of lowmem's makes its steps by the recipe's `execution`; torch's own are plain.
    """
    watch = StepWatch(meter)
    optimizer = optimizer_of(model)
    is_ours = isinstance(optimizer, LowMemOptimizer)
    trainer = LowMemTrainer(
        model=model,
        args=args,
        optimizer_of=lambda _: optimizer,
        schedule=recipe.train.lr_scheduler,
        train_dataset=data,
        collate=only_item,
        watch=watch,
        callbacks=[*callbacks, MeterBorders(watch)],
        execution=recipe.train.execution if is_ours else "plain",
        clip=recipe.optimizer.clip,
        refresh_from=recipe.optimizer.refresh_from,
        head_gradient=recipe.train.head_gradient,
    )
    meter.watch(trainer.create_optimizer())
    with watch.closed_at_the_end():
        trainer.train()
    return trainer
