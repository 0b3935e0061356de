"""The recipe in the words of transformers.TrainingArguments."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from lowmem.errors import RefusedError
from lowmem.recipe.schema import Recipe


def refuse_sharded_launch() -> None:
    """Raise RefusedError when `accelerate launch` was told to shard the model."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise RefusedError(
                f"This accelerate configuration shards the model with {name}, and the optimizers here need whole "
                "matrices. Launch with plain data parallelism: accelerate launch --multi_gpu, without an FSDP or "
                "DeepSpeed section in the configuration file."
            )


def training_arguments(recipe: Recipe, output_dir: Path, *, use_cpu: bool | None = None) -> TrainingArguments:
    """Arguments of the Trainer. The optimizer, the schedule, the evaluation, the progress line and the
    clean-up of old checkpoints are lowmem's own, so their fields here stay off.

    `use_cpu` None takes the GPU where there is one.
    """
    refuse_sharded_launch()
    use_cpu = not torch.cuda.is_available() if use_cpu is None else use_cpu
    train, save, report = recipe.train, recipe.save, recipe.report
    args = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=train.epochs,
        max_steps=-1 if train.max_steps is None else train.max_steps,
        per_device_train_batch_size=train.per_device_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_grad_norm=0.0 if train.max_grad_norm is None else train.max_grad_norm,
        # Without this, several processes on CPUs would each train a model of their own.
        use_cpu=use_cpu,
        seed=train.seed,
        data_seed=train.seed,
        logging_strategy="steps",
        logging_steps=report.log_every,
        # The filter would hide a NaN loss behind the average of the steps before it.
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no" if save.every is None else "steps",
        save_steps=500 if save.every is None else save.every,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        remove_unused_columns=False,
        dataloader_pin_memory=not use_cpu,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != launched:
        raise RefusedError(
            f"The launcher started {launched} processes, but accelerate joined {args.world_size}, so each would train "
            "a model of its own. Start as many processes as there are GPUs: accelerate launch --num_processes N."
        )
    # The recipe's dtype decides; accelerate's own mixed precision would wrap the forward in autocast.
    args.mixed_precision = "no"
    # Several visible GPUs in one process would make the Trainer fall back to nn.DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args
