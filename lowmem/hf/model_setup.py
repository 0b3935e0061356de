"""A recipe's model, ready to train: adapters, recomputed activations, packing checked, chunked loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lowmem.errors import RecipeError
from lowmem.hf.chunked_loss import chunked_loss_agrees, use_chunked_loss
from lowmem.hf.cpu_threads import use_one_thread_for_tiny_model
from lowmem.hf.lora import add_lora
from lowmem.hf.model import load_model
from lowmem.hf.packing_probe import refuse_leaking_model
from lowmem.numerics.held_weights import numel_of
from lowmem.recipe.schema import Recipe
from lowmem.run.activation_offload import OffloadedInputs
from lowmem.run.cuda_copies import CudaCopies

Batch = dict[str, Tensor]

CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute in which transformers' layers keep torch's checkpoint function."""


def recompute_activations(model: PreTrainedModel | PeftModel, offload: OffloadedInputs | None = None) -> None:
    """Recompute activations in the backward pass, non-reentrant: inputs need no gradient, hooks fire once.

    What is kept for it, the layers' inputs, goes to the host where there is an `offload`.
    """
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.18 and later
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if offload is not None:
        for module in model.modules():
            if (checkpoint := vars(module).get(CHECKPOINT)) is not None:
                setattr(module, CHECKPOINT, offload.around(checkpoint))


def offload_of(recipe: Recipe, device: torch.device, say: Callable[[str], Any]) -> OffloadedInputs | None:
    """What the recipe's train.activation_offload comes to on `device`; on a CPU there is nowhere to move to."""
    if not recipe.train.activation_offload:
        return None
    if device.type != "cuda":
        say(
            f"activation offload: nothing to do on {device.type}, the activations are in the host's memory already"
        )
        return None
    return OffloadedInputs(CudaCopies(device), lambda tensor: tensor.is_cuda)


def make_generation_settings_savable_(model: PreTrainedModel) -> None:
    """Some models come with a temperature but no do_sample, which transformers 5.17 refuses to save again.

    Raises RecipeError for settings that stay invalid with do_sample on: better now than at the first checkpoint.
    """
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            raise RecipeError(
                f"model.name_or_path: generation_config.json of {model.config.name_or_path} could not be saved again: "
                f"{error} Mend that file, or delete it."
            ) from error


def trainable_model(
    recipe: Recipe, *, device: torch.device, probe_batch: Batch, say: Callable[[str], Any]
) -> PreTrainedModel | PeftModel:
    """The model on `device` as the recipe trains it.

    `probe_batch` is a small batch of the training data, on which the chunked loss must equal the model's
    own; where it does not, the own loss is used and `say` tells why. Raises RecipeError for a model that
    cannot be loaded and RefusedError for one that attends across packed documents.
    """
    base = load_model(recipe.model, seed=recipe.train.seed).to(device)  # type: ignore[arg-type]  # a decorated method
    make_generation_settings_savable_(base)
    use_one_thread_for_tiny_model(base, say)
    if recipe.data.packing:
        refuse_leaking_model(base, rows=max(recipe.train.per_device_batch_size, recipe.eval.batch_size or 1))
    model = base if recipe.lora is None else add_lora(base, recipe.lora, seed=recipe.train.seed)
    if recipe.train.activation_checkpointing:
        recompute_activations(model, offload_of(recipe, device, say))
    if recipe.train.loss == "chunked":
        reason = chunked_loss_agrees(model, {name: value.to(device) for name, value in probe_batch.items()})
        if reason is None:
            use_chunked_loss(model)
        else:
            say(f"loss: the model's own instead of chunked, which holds all logits: {reason}")
    return model


def model_summary(model: PreTrainedModel | PeftModel) -> str:
    """Class, parameters, how many are trained, dtype and device, in one line."""
    params = list(model.parameters())
    total, trained = (
        sum(numel_of(p) for p in some) for some in (params, [p for p in params if p.requires_grad])
    )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype = str(params[0].dtype).removeprefix("torch.")
    return f"{type(inner).__name__}: {total:,} parameters, {trained:,} trained, {dtype} on {params[0].device}"
