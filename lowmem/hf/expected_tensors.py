"""Does a folder hold the tensors that its config.json asks for? Answered without a weight in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowmem.errors import RecipeError
from lowmem.hf.model_folder import CONFIG, a_few
from lowmem.hf.quiet import quiet_transformers

Shape = tuple[int, ...]


def refuse_unexpected_shapes(config: Mapping[str, Any], found: Mapping[str, Shape]) -> None:
    """Raise RecipeError, naming tensors, where those `found` are not those of the model that `config` describes.

    Nothing is known of, and said about, a model that needs other code than transformers'. Where a file has names
    that its model has not, as those of a format that is converted while it is read, no name is called missing.
    """
    expected, tied = _expected(config)
    problems = [
        f"{name} is {shape}, not {expected[name]}"
        for name, shape in found.items()
        if expected.get(name, shape) != shape
    ]
    if found.keys() <= expected.keys():
        problems += [f"{name} is missing" for name in expected if name not in found and name not in tied]
    if problems:
        raise RecipeError(
            f"{a_few(problems)}. Copy the files again, with the config.json that belongs to them."
        )


def _expected(config: Mapping[str, Any]) -> tuple[dict[str, Shape], set[str]]:
    """Shapes by name, and the names that share their tensor with another."""
    kind = str(config.get("model_type"))
    is_known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_known or "auto_map" in config:
        return {}, set()
    of_floats = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(of_floats))
    # What a broken configuration makes transformers raise ranges from KeyError to dataclass validation.
    except Exception as error:
        summary = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"{CONFIG} describes no {kind} model ({type(error).__name__}: {summary})."
        ) from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shares = dict(model.all_tied_weights_keys)
    return shapes, {*shares, *shares.values()}
