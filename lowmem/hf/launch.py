"""How this process was launched, and whether a recipe can be trained so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from lowmem.errors import RefusedError
from lowmem.recipe.schema import Recipe

Strategy = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

SHARDED: tuple[Strategy, ...] = ("fsdp2", "zero1", "zero2", "zero3")
"""Where a process does not have all of an optimizer's weights."""
WITHOUT_WHOLE_WEIGHTS: tuple[Strategy, ...] = ("fsdp2", "zero3")
"""Where it does not even have all of the model's."""

ZERO_STAGES: dict[int, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}

FILES = "accelerate launch --config_file recipes/accelerate/{}.yaml -m lowmem.train RECIPE"


def launched_strategy() -> Strategy:
    """What the launcher has asked of Accelerate, from the environment that it has made.

    Raises RefusedError for what is none of ours: FSDP's first version, ZeRO stage 0.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        stage = _zero_stage()
        if stage not in ZERO_STAGES:
            raise RefusedError(
                f"DeepSpeed was launched with ZeRO stage {stage}; supported are 1, 2 and 3. "
                f"Use {FILES.format('zero2')}, or ddp.yaml in its place."
            )
        return ZERO_STAGES[stage]
    if _is_set("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise RefusedError(
                f"FSDP was launched in version {version}, whose flat parameters no rule for matrices can use. Set "
                f"fsdp_version: 2, as in {FILES.format('fsdp2')}."
            )
        return "fsdp2"
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"


def strategy_for(recipe: Recipe) -> Strategy:
    """The launched strategy. Raises RefusedError where the recipe wants another, or cannot be trained by this one."""
    launched, wanted = launched_strategy(), recipe.distributed.strategy
    if wanted not in ("auto", launched) and not (wanted == "ddp" and launched == "single"):
        raise RefusedError(
            f"distributed.strategy is {wanted}, and the launcher started {launched}. Use {FILES.format(wanted)}, or "
            "set distributed.strategy: auto."
        )
    if launched in SHARDED:
        refuse_what_pieces_cannot_do(recipe, launched)
    return launched


def rehearses() -> bool:
    """Whether this machine has no accelerator, so that its processes talk through gloo."""
    import torch

    return not torch.cuda.is_available()


def refuse_what_pieces_cannot_do(recipe: Recipe, strategy: Strategy) -> None:
    """Raises RefusedError, with what can be done instead; `strategy` is one of SHARDED."""
    said = f"under {strategy}"
    if recipe.model.weights != "bf16":
        raise RefusedError(
            f"model.weights: {recipe.model.weights} cannot be divided {said}: codes share their scales, and their "
            f"gradients live beside autograd. Use {FILES.format('ddp')}, which trains int8 weights, or "
            "model.weights: bf16."
        )
    if recipe.train.execution not in ("auto", "plain"):
        raise RefusedError(
            f"train.execution: {recipe.train.execution} frees gradients before {strategy} has reduced them. Set "
            f"train.execution: auto; {strategy} divides the gradients itself."
        )
    if recipe.optimizer.clip == "tensor" and recipe.train.max_grad_norm is not None:
        raise RefusedError(
            f"optimizer.clip: tensor needs whole gradients, and {said} a process has pieces. Set optimizer.clip: full."
        )
    if not recipe.eval.loss_only and strategy in WITHOUT_WHOLE_WEIGHTS:
        raise RefusedError(
            f"eval.loss_only: false generates answers, of which each process has another number {said}. Set "
            "eval.loss_only: true, and run lowmem eval on the finished run."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _zero_stage() -> int:
    """From a DeepSpeed configuration file where one was given, else from Accelerate's own keys."""
    given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if given in ("", "none", "None"):
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    try:
        content = json.loads(Path(given).read_text(encoding="utf-8"))
        return int(content.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError) as error:
        raise RefusedError(f"the DeepSpeed configuration {given} cannot be read: {error}") from error
