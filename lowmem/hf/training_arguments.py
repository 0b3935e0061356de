"""The recipe in the words of transformers.TrainingArguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from lowmem.errors import RefusedError
from lowmem.hf.launch import SHARDED, Strategy, rehearses, strategy_for
from lowmem.recipe.schema import Recipe
from lowmem.run.rehearsal import rehearse_on_cpu


def training_arguments(recipe: Recipe, output_dir: Path, *, use_cpu: bool | None = None) -> TrainingArguments:
    """Arguments of the Trainer. The optimizer, the schedule, the evaluation, the progress line and the
    clean-up of old checkpoints are lowmem's own, so their fields here stay off.

    `use_cpu` None takes the GPU where there is one. Raises RefusedError for a launch that the recipe cannot be
    trained by.
    """
    strategy = strategy_for(recipe)
    use_cpu = rehearses() if use_cpu is None else use_cpu
    if strategy in SHARDED:
        prepare_accelerate_(recipe, strategy)
    train, save, report = recipe.train, recipe.save, recipe.report
    args = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=train.epochs,
        max_steps=-1 if train.max_steps is None else train.max_steps,
        per_device_train_batch_size=train.per_device_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_grad_norm=0.0 if train.max_grad_norm is None else train.max_grad_norm,
        # Without this, several processes on CPUs would each train a model of their own.
        # Where it shards, accelerate is told about CPUs in another way.
        use_cpu=use_cpu and strategy not in SHARDED,
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
        accelerator_config=reduced_in_each_micro_batch() if strategy == "fsdp2" else None,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != launched:
        raise RefusedError(
            f"The launcher started {launched} processes, but accelerate joined {args.world_size}, so each would train "
            "a model of its own. Start as many processes as there are GPUs: accelerate launch --num_processes N."
        )
    # The recipe's dtype decides; accelerate's own mixed precision would wrap the forward in autocast.
    args.mixed_precision = "no"
    # The Trainer holds DeepSpeed's configuration against this; given above, it would ask for a GPU.
    args.bf16 = strategy.startswith("zero") and recipe.model.dtype == "bfloat16"
    refuse_other_strategy(args, strategy)
    # Several visible GPUs in one process would make the Trainer fall back to nn.DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def reduced_in_each_micro_batch() -> dict[str, Any]:
    """By default FSDP2 keeps every gradient whole, in every process, until the last micro-batch.

    So a gradient is divided as soon as it is there; what is sent for it is sent in each micro-batch.
    """
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def prepare_accelerate_(recipe: Recipe, strategy: Strategy) -> None:
    """Tell Accelerate, by the variables that its launcher sets, what the recipe decides."""
    is_zero = strategy.startswith("zero")
    if is_zero:
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise RefusedError(
                f"{strategy} needs DeepSpeed, which is not installed: pip install 'lowmem[deepspeed]'"
            ) from error
        # DeepSpeed keeps float32 weights beside a bfloat16 model, and must be told that it is one.
        is_bf16 = recipe.model.dtype == "bfloat16"
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if is_bf16 else "no"
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(recipe.train.gradient_accumulation_steps)
        os.environ["ACCELERATE_GRADIENT_CLIPPING"] = str(recipe.train.max_grad_norm or 0.0)
    else:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    if rehearses():
        rehearse_on_cpu(deepspeed=is_zero)


def refuse_other_strategy(args: TrainingArguments, strategy: Strategy) -> None:
    """Accelerate falls back to unsharded training in several settings, without a word."""
    if strategy not in SHARDED:
        return
    assert args.distributed_state is not None
    found = args.distributed_state.distributed_type.value
    expected = {"fsdp2": ("FSDP", "MULTI_GPU")}.get(strategy, ("DEEPSPEED",))
    if found not in expected:
        raise RefusedError(
            f"{strategy} was launched, and accelerate has made {found} of it. Check its configuration file; "
            "recipes/accelerate has one that works for each strategy."
        )
