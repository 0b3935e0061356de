"""LoRA adapters through peft: attach them, save them, merge them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem.errors import FaultError, RecipeError
from lowmem.numerics.held_weights import numel_of
from lowmem.recipe.schema import LoraRecipe

logger = logging.getLogger(__name__)


def add_lora(model: PreTrainedModel, recipe: LoraRecipe, *, seed: int = 0) -> PeftModel:
    """Freeze `model` and give the linear layers that `recipe.target` names trainable adapters.

    Adapters are float32 whatever the model's dtype, as peft makes them; embeddings and head stay frozen
    unless they are named. The input of the first layer is made to require a gradient, so that activation
    checkpointing works with either of torch's implementations. `seed` decides the adapters' first values.

    Raises RecipeError for a name that matches no linear layer.
    """
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft divides it by r; its annotation says int
        lora_dropout=recipe.dropout,
        target_modules=_targets(model, recipe.target),
        bias="none",
        # How peft is told that GPT-2's layers keep their weight transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _without_peft_deprecations():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    adapted.enable_input_require_grads()
    trainable, total = trainable_parameters(adapted)
    logger.info("LoRA trains %d of %d parameters (%.2f%%).", trainable, total, 100 * trainable / total)
    return adapted


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many values of `model` are trained, and how many there are, tied ones counted once."""
    sizes = [(numel_of(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def save_adapters(model: PeftModel, folder: str | Path, *, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapters alone, adapter_model.safetensors and adapter_config.json, into `folder`.

    weights: those of a model that is divided over processes, by its parameters' names.
    """
    # "auto" would ask the Hub for the base model's configuration.
    model.save_pretrained(
        str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=weights
    )


def restore_adapters_(model: PeftModel, folder: Path) -> None:
    """Give the adapters that `model` trains the values that `save_adapters` wrote into `folder`.

    Raises RuntimeError where one is missing, unknown or of another shape.
    """
    saved = load_file(folder / "adapter_model.safetensors")
    if strange := saved.keys() ^ get_peft_model_state_dict(model).keys():
        raise RuntimeError(f"adapters of another model: {', '.join(sorted(strange)[:3])}")
    set_peft_model_state_dict(model, saved)


def load_adapters(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """`model` with the adapters that `save_adapters` wrote into `folder`, frozen, for inference or `merge`."""
    with _without_peft_deprecations():
        return PeftModel.from_pretrained(model, str(folder))


def merge(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights they adapt and return the model without them, every weight in its dtype.

    Works in place: `model` is of no use afterwards. Raises FaultError when a merged weight is not finite.
    """
    model.disable_input_require_grads()
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise FaultError(
            f"The LoRA adapters cannot be merged: {error} The adapters themselves are untouched; "
            "save them with save.merge_lora: false, or train again with a lower optimizer.lr."
        ) from error


def _targets(model: PreTrainedModel, target: str | list[str]) -> str | list[str]:
    if target == "all-linear":
        return target
    names = [target] if isinstance(target, str) else target
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    problems = []
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            near = get_close_matches(name, [*known, "all-linear"], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(
                f"lora.target: {name!r} names no linear layer of {type(model).__name__}.{hint} "
                f"Allowed: all-linear, or names out of {', '.join(known)}."
            )
    if not names:
        problems.append(
            f"lora.target: the list is empty. Allowed: all-linear, or names out of {', '.join(known)}."
        )
    if problems:
        raise RecipeError(problems)
    return names


@contextmanager
def _without_peft_deprecations() -> Iterator[None]:
    # peft reads the old name of a property that newer transformers has renamed.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield
