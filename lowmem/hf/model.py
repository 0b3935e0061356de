"""Open the model that a recipe names, or say in one paragraph why it cannot be trained."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowmem.errors import LowMemError, RecipeError, RefusedError
from lowmem.hf.causality_probe import attends_ahead
from lowmem.hf.hub import hub_has_an_address
from lowmem.hf.int8_config import int8_config, is_stored_in_int8
from lowmem.hf.loading_errors import explain
from lowmem.hf.model_folder import BUILTIN_PREFIX, KEY, a_few, check_builtin, check_model_folder, local_folder
from lowmem.hf.nf4 import keep_codes_through_evaluation_, nf4_loading
from lowmem.hf.quantizer import quantize_loaded_
from lowmem.hf.quiet import quiet_transformers
from lowmem.hf.tokenizer import load_tokenizer
from lowmem.recipe.schema import ModelRecipe

__all__ = ["load_model", "load_tokenizer"]

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(recipe: ModelRecipe, *, seed: int) -> PreTrainedModel:
    """The causal language model `recipe.name_or_path`, on the CPU, in `recipe.dtype`, in evaluation mode.

    With `weights: nf4` its linear layers are in 4-bit codes, and it is on the GPU where there is one; with
    `weights: int8` they are in int8, quantised one by one as they are read, or as they are stored. Int8 weights
    on the disk become float ones with `weights: bf16`.

    `seed` decides the first weights of builtin:tiny-llama and nothing else: a model from disk or from the Hub
    must bring every weight, in safetensors. The global random state is left alone.

    Raises RecipeError for a model that is missing, damaged, incomplete, of an unknown or unsuitable kind, or
    that needs code of its own; RefusedError for an attention implementation that this model or machine lacks.
    """
    _check_attention(recipe)
    if recipe.name_or_path.startswith(BUILTIN_PREFIX):
        model = _builtin_model(recipe, seed)
        if recipe.weights == "int8":
            quantize_loaded_(model, int8_config(recipe))
        return model if recipe.weights != "nf4" else _packed(model, recipe, seed)
    folder = local_folder(recipe.name_or_path)
    if folder is not None:
        check_model_folder(folder)
    name = recipe.name_or_path if folder is None else str(folder)
    where: dict[str, Any] = {
        "revision": recipe.revision,
        "trust_remote_code": recipe.trust_remote_code,
        "local_files_only": folder is None and not hub_has_an_address(),
    }
    try:
        with quiet_transformers(), torch.random.fork_rng([]):
            config = AutoConfig.from_pretrained(name, **where)
            check_kind(config, recipe)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                **where,
                dtype=DTYPES[recipe.dtype],
                attn_implementation=recipe.attn,
                use_safetensors=True,
                output_loading_info=True,
                **loading_arguments(recipe, is_int8=is_stored_in_int8(config)),
                # Mismatches are then listed in the report, with both shapes.
                ignore_mismatched_sizes=True,
            )
    except (LowMemError, MemoryError, torch.OutOfMemoryError):
        raise
    # What a broken model folder makes transformers raise ranges from KeyError to dataclass validation.
    except Exception as error:
        raise explain(error, recipe, is_local=folder is not None) from error
    model, report = loaded
    _check_report(report, model, recipe)
    if model.config.to_dict().get("is_decoder") is False and attends_ahead(model):
        raise _not_causal(
            recipe, f"{model.config.model_type}, an encoder that sees the tokens to be predicted"
        )
    if recipe.weights == "nf4":
        keep_codes_through_evaluation_(model)
    if recipe.weights == "bf16" and is_stored_in_int8(model.config):
        model.dequantize(DTYPES[recipe.dtype])
    return model


def loading_arguments(recipe: ModelRecipe, *, is_int8: bool) -> dict[str, Any]:
    """What `recipe.weights` adds to `from_pretrained`, which knows by itself what is stored in int8."""
    if recipe.weights == "nf4":
        return nf4_loading(DTYPES[recipe.dtype])
    return {"quantization_config": int8_config(recipe)} if recipe.weights == "int8" and not is_int8 else {}


def _packed(model: PreTrainedModel, recipe: ModelRecipe, seed: int) -> PreTrainedModel:
    """A model that was made here, packed as one that is read is."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        packed = load_model(replace(recipe, name_or_path=folder), seed=seed)
    packed.config.name_or_path = model.config.name_or_path
    return packed


def _builtin_model(recipe: ModelRecipe, seed: int) -> PreTrainedModel:
    check_builtin(recipe.name_or_path)
    from lowmem.hf.builtin_model import tiny_llama_config

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_llama_config(), attn_implementation=recipe.attn, dtype=torch.float32
        )
    # Drawn in float32 and then rounded, so that both dtypes start from the same weights. Buffers such as the
    # rotary frequencies stay float32, as they do when a model is loaded.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[recipe.dtype])
    model.config.dtype = DTYPES[recipe.dtype]
    return model.eval()


def _check_attention(recipe: ModelRecipe) -> None:
    if recipe.attn != "flash_attention_2":
        return
    if not torch.cuda.is_available():
        raise RefusedError(
            "model.attn: flash_attention_2 needs a CUDA device and there is none. Use model.attn: sdpa."
        )
    if find_spec("flash_attn") is None:
        raise RefusedError(
            "model.attn: flash_attention_2 needs a package that is not installed: "
            "pip install flash-attn --no-build-isolation. Or use model.attn: sdpa."
        )


def check_kind(config: PreTrainedConfig, recipe: ModelRecipe) -> None:
    settings = config.to_dict()
    kind = f"{config.model_type} ({', '.join(settings.get('architectures') or ['no architecture named'])})"
    has_own_code = recipe.trust_remote_code and "AutoModelForCausalLM" in (settings.get("auto_map") or {})
    if not has_own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _not_causal(recipe, kind)
    if settings.get("is_encoder_decoder"):
        raise _not_causal(recipe, f"{kind}, an encoder with a decoder")
    quantization = settings.get("quantization_config")
    if quantization and not (is_stored_in_int8(config) and recipe.weights != "nf4"):
        method = quantization.get("quant_method", "an unnamed method")
        raise RecipeError(
            f"{KEY}: the weights of {recipe.name_or_path} are stored quantised ({method}) and cannot be trained. "
            "Name the model that they were made from."
        )


def _not_causal(recipe: ModelRecipe, kind: str) -> RecipeError:
    return RecipeError(
        f"{KEY}: {recipe.name_or_path} is {kind}; lowmem trains causal language models, which predict each token "
        "from those before it. Name one of those, such as a Llama, Qwen or Gemma."
    )


def _check_report(report: dict[str, Any], model: PreTrainedModel, recipe: ModelRecipe) -> None:
    name, kind = recipe.name_or_path, type(model).__name__
    problems = []
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        problems.append(
            f"{KEY}: {name} lacks {len(missing)} of the weights of {kind} ({a_few(missing)}), which would start at "
            "random. Name a complete checkpoint of a language model."
        )
    if mismatched:
        shapes = [f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in mismatched]
        problems.append(
            f"{KEY}: {len(mismatched)} weights of {name} have other shapes than its config.json says "
            f"({a_few(shapes)}). Use the config.json that belongs to these weights."
        )
    problems += [f"{KEY}: {name}: {message}" for message in report["error_msgs"]]
    if problems:
        raise RecipeError(problems)
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        logger.warning(
            "%d weights of %s are not part of %s and are left out: %s",
            len(unexpected),
            name,
            kind,
            a_few(unexpected),
        )
