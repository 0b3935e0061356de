"""The model of a recipe from its configuration alone: for a simulation, where weights have no values."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowmem.errors import LowMemError, RefusedError
from lowmem.hf.builtin_model import tiny_llama_config
from lowmem.hf.chunked_loss import use_chunked_loss
from lowmem.hf.hub import hub_has_an_address
from lowmem.hf.int8_config import Int8Config, int8_config, is_stored_in_int8
from lowmem.hf.loading_errors import explain
from lowmem.hf.lora import add_lora
from lowmem.hf.model import DTYPES, check_kind
from lowmem.hf.model_folder import BUILTIN_PREFIX, check_builtin, local_folder, read_config
from lowmem.hf.model_setup import recompute_activations
from lowmem.hf.nf4 import pack_without_values_
from lowmem.hf.quantizer import quantize_loaded_
from lowmem.hf.quiet import quiet_transformers
from lowmem.recipe.schema import ModelRecipe, Recipe
from lowmem.run.activation_offload import OffloadedInputs


def load_config(recipe: ModelRecipe) -> PreTrainedConfig:
    """The configuration of `recipe.name_or_path`; no weights are looked for, and of a Hub id nothing else is fetched.

    Raises RecipeError where there is none or where it is not one of a causal language model.
    """
    if recipe.name_or_path.startswith(BUILTIN_PREFIX):
        check_builtin(recipe.name_or_path)
        return tiny_llama_config()
    folder = local_folder(recipe.name_or_path)
    if folder is not None:
        read_config(folder)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                recipe.name_or_path if folder is None else str(folder),
                revision=recipe.revision,
                trust_remote_code=recipe.trust_remote_code,
                local_files_only=folder is None and not hub_has_an_address(),
            )
            check_kind(config, recipe)
    except (LowMemError, MemoryError):
        raise
    # What a broken configuration makes transformers raise ranges from KeyError to dataclass validation.
    except Exception as error:
        raise explain(error, recipe, is_local=folder is not None) from error
    return config


def model_without_weights(
    recipe: Recipe, config: PreTrainedConfig, *, offload: OffloadedInputs | None = None
) -> tuple[PreTrainedModel | PeftModel, list[str]]:
    """The model as the recipe trains it, and remarks on where it differs from the recipe's words.

    To be called where tensors are fake; otherwise it takes the memory of the whole model. Attention of
    `flash_attention_2` becomes sdpa, whose flash kernel keeps the same tensors. `offload` takes what activation
    checkpointing keeps.
    """
    notes = []
    config, stored = _without_int8(config)
    attn = recipe.model.attn
    if attn == "flash_attention_2":
        attn = "sdpa"
        notes.append("flash_attention_2 is simulated by sdpa without a mask, which keeps the same tensors")
    own_code: dict[str, Any] = {"trust_remote_code": True} if recipe.model.trust_remote_code else {}
    with quiet_transformers():
        base = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[recipe.model.dtype], attn_implementation=attn, **own_code
        ).eval()
    if recipe.model.weights == "nf4":
        pack_without_values_(base, DTYPES[recipe.model.dtype])
    elif recipe.model.weights == "int8":
        quantize_loaded_(base, stored or int8_config(recipe.model))
    model = base if recipe.lora is None else add_lora(base, recipe.lora, seed=recipe.train.seed)
    if recipe.train.activation_checkpointing:
        recompute_activations(model, offload)
    if recipe.train.loss == "chunked":
        try:
            use_chunked_loss(model)
        except RefusedError as refusal:
            notes.append(f"the model's own loss instead of chunked: {refusal}")
    return model, notes


def _without_int8(config: PreTrainedConfig) -> tuple[PreTrainedConfig, Int8Config | None]:
    """The configuration of the same model in float, and how it is stored in int8, if it is."""
    if not is_stored_in_int8(config):
        return config, None
    stored = config.quantization_config
    config = copy.deepcopy(config)
    del config.quantization_config
    return config, Int8Config(**stored) if isinstance(stored, dict) else stored
