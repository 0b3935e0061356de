"""How a Hugging Face model's weights are int8: what `quantization_config` of its config.json says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowmem.quant.convert import Int8Choice
from lowmem.quant.int8_weight import GROUP
from lowmem.recipe.schema import Int8Recipe, ModelRecipe

METHOD = "lowmem_int8"
SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """Weights as int8 codes with one scale for each `group_size` neighbours of a row, trained in place.

        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=lowmem.hf.Int8Config())

    Linear layers become int8; the input embedding and the output head with `quantize_embeddings`.
    `modules_to_not_convert` names modules that stay float: a path, its last names, or a module around them.
    A value takes 1 + 4 / group_size bytes, with scales in bfloat16 1 + 2 / group_size.

    Raises ValueError for a value that is not allowed.
    """

    def __init__(
        self,
        group_size: int = GROUP,
        scale_dtype: str = "float32",
        quantize_embeddings: bool = False,
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = METHOD,
    ):
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}; an Int8Config is of {METHOD!r}")
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
            raise ValueError(f"group_size is {group_size!r}; it must be a whole number of at least 1")
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype is {scale_dtype!r}; it must be one of {', '.join(SCALE_DTYPES)}")
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert is a text; write [{modules_to_not_convert!r}]")
        self.quant_method: Any = quant_method
        self.group_size = group_size
        self.scale_dtype = scale_dtype
        self.quantize_embeddings = bool(quantize_embeddings)
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)

    def choice(self) -> Int8Choice:
        return Int8Choice(
            group_size=self.group_size,
            scale_dtype=SCALE_DTYPES[self.scale_dtype],
            embeddings=self.quantize_embeddings,
            keep=tuple(self.modules_to_not_convert or ()),
        )


def int8_config(recipe: ModelRecipe) -> Int8Config:
    """What `recipe.int8` asks for."""
    asked = recipe.int8 or Int8Recipe()
    return Int8Config(
        group_size=asked.group_size,
        scale_dtype={"fp32": "float32", "bf16": "bfloat16"}[asked.scales],
        quantize_embeddings=asked.embeddings,
    )


def is_stored_in_int8(config: PreTrainedConfig) -> bool:
    """Whether the model that `config` came with has int8 weights of this kind."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return method == METHOD
