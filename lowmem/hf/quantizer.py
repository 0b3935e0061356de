"""INT8 weights in transformers: quantised while a model is loaded, saved and loaded again as they are.

A float checkpoint is quantised tensor by tensor as it is read, so the host never holds more float weights than
one; an INT8 one is loaded into modules that are int8 from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.int8_config import METHOD, Int8Config
from lowmem.hf.int8_files import check_headers, check_loaded, int8_shapes
from lowmem.numerics.held_weights import held_weight, numel_of
from lowmem.quant.convert import (
    Int8Places,
    dequantize_model_,
    int8_places,
    int8_twin,
    quantize_model_,
    quantize_places_,
    replace_,
)
from lowmem.quant.int8_embedding import Int8Embedding
from lowmem.quant.int8_weight import Int8Module

__all__ = ["Int8Config", "Int8Quantizer", "quantize_loaded_"]

SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` ask about a model with int8 weights."""

    requires_calibration = False
    quantization_config: Int8Config
    _places: Int8Places

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise RefusedError(
                "device_map puts parts of the model on the CPU or the disk, from where int8 weights are not brought "
                "back for each layer. Name one device for all of it."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        choice = self.quantization_config.choice()
        try:
            self._places = int8_places(model, choice, is_tied=_is_tied(model))
        except ValueError as error:
            raise RecipeError(f"int8 weights: {error}") from error
        if not self.pre_quantized:
            return  # layers stay what they are until their weight comes
        quantize_places_(model, self._places, choice)
        self._shapes = int8_shapes(model)
        stored_as = SAFETENSORS_NAMES[choice.scale_dtype]
        check_headers(checkpoint_files or [], self._shapes, scale_dtype=stored_as)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, kind = param_name.rpartition(".")
        return kind == "weight" and path in self._arriving

    @property
    def _arriving(self) -> set[str]:
        """Paths whose weights become int8 as they come; a tied embedding does when all is loaded and tied."""
        alone = self._places.embedding if self._places.tied_head is None else None
        return {*self._places.linear, *([] if alone is None else [alone])}

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnArrival(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            _make_handles_real_(model)
            check_loaded(model, self._shapes, str(model.config.name_or_path))
        else:
            # What the checkpoint lacked, which transformers reports and draws at random, and a tied embedding.
            quantize_places_(model, self._places, self.quantization_config.choice())
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What `model.dequantize()` calls: float layers again, one at a time."""
        dequantize_model_(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


class _QuantizeOnArrival(ConversionOps):
    """Turns a linear layer or an embedding into its int8 twin when its float weight has been read."""

    def __init__(self, quantizer: Int8Quantizer):
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        others = {}
        for name, found in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, name):
                others[name] = found
                continue
            weight: Tensor = found[0] if isinstance(found, list) else found
            path = name.removesuffix(".weight")
            module = model.get_submodule(path)
            wanted = tuple(module.weight.shape)
            if tuple(weight.shape) != wanted:
                raise ValueError(f"{name} is {tuple(weight.shape)}, not {wanted}")
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
            twin = int8_twin(module, self.quantizer.quantization_config.choice())
            twin.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            replace_(model, path, twin)
            if missing_keys is not None:
                missing_keys.discard(name)
        return others


def quantize_loaded_(model: PreTrainedModel, config: Int8Config) -> None:
    """Make a model that is in memory, or without values, what `from_pretrained` makes of its checkpoint.

    Raises RecipeError for a model or a choice of modules that cannot be int8.
    """
    try:
        quantize_model_(model, config.choice())
    except ValueError as error:
        raise RecipeError(f"int8 weights: {error}") from error
    quantizer = Int8Quantizer(config, pre_quantized=False)
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": METHOD}
    for name, value in attributes.items():
        setattr(model, name, value)
    model.config.quantization_config = config
    model.config._is_quantized = True


def _counts_all_values(original: Callable[..., int]) -> Callable[..., int]:
    """transformers' count sees the empty handles of int8 weights; this adds what they stand for."""

    @wraps(original)
    def num_parameters(
        self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        embeddings = {module.weight for module in self.modules() if isinstance(module, Int8Embedding)}
        return original(self, only_trainable, exclude_embeddings) + sum(
            numel_of(param)
            for param in self.parameters()
            if held_weight(param) is not None
            and (param.requires_grad or not only_trainable)
            and not (exclude_embeddings and param in embeddings)
        )

    return num_parameters


PreTrainedModel.num_parameters = _counts_all_values(PreTrainedModel.num_parameters)  # type: ignore[method-assign]


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the head shares the embedding's weight, also before the two are tied."""
    head = model.get_output_embeddings()
    tied = set(model.all_tied_weights_keys)
    return any(module is head and f"{path}.weight" in tied for path, module in model.named_modules())


def _make_handles_real_(model: PreTrainedModel) -> None:
    """Handles are not in the files; they go where their codes went, the tied head's with its embedding's."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Int8Module) and module.weight.is_meta:
            before = module.weight
            real = torch.empty(0, dtype=before.dtype, device=module.weight_codes.device)
            module.weight = nn.Parameter(real, requires_grad=before.requires_grad)
            module._bind()
            made[before] = module.weight
    for module in model.modules():
        handle = module._parameters.get("weight")
        if handle is not None and handle in made:
            module.weight = made[handle]
