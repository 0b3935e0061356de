"""A frozen base in 4-bit codes, NF4 with double quantisation, through bitsandbytes: what QLoRA trains adapters on.

Each block of 64 weights has a scale, each 256 scales are 8-bit codes with a scale of their own: 4.13 bits a weight.
Linear layers but the head are packed; embeddings, norms and head stay in model.dtype, in which is also computed.
Unlike `peft.prepare_model_for_kbit_training`, which QLoRA's authors' code goes through, those are not widened to
float32: adapters are float32 as it is, and a LLaMA's embeddings would take twice as much.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem.errors import RefusedError

BLOCK, SCALES_BLOCK = 64, 256
TABLE, SCALES_TABLE = 16, 256


def refuse_without_bitsandbytes() -> None:
    """Raise RefusedError, with the command that installs it, where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise RefusedError(
            "model.weights: nf4 needs a package that is not installed: pip install 'bitsandbytes>=0.50'. Or use "
            "model.weights: bf16; lowmem plan --formula needs no package."
        )


def nf4_loading(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for `from_pretrained`, which packs each layer as it is read, on the GPU where there is one."""
    refuse_without_bitsandbytes()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_codes_through_evaluation_(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes reorders codes at the first evaluation, and cannot train after it."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def pack_without_values_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What `from_pretrained` does with `nf4_loading`, for a model whose tensors are fake and cannot be quantised."""
    refuse_without_bitsandbytes()
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is not head and (type(module) is nn.Linear or isinstance(module, Conv1D)):
            model.set_submodule(name, _packed(module, dtype))
    vars(model)["is_loaded_in_4bit"] = True  # which peft asks for


def _packed(linear: nn.Module, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' own layer, whose constructor would make a parameter of a class that cannot be fake."""
    from bitsandbytes.nn import Linear4bit

    inputs, outputs = linear.weight.shape if isinstance(linear, Conv1D) else reversed(linear.weight.shape)  # type: ignore[arg-type]
    made: Any = Linear4bit.__new__(Linear4bit)
    nn.Module.__init__(made)
    made.in_features, made.out_features, made.bias = inputs, outputs, linear.bias
    if made.bias is not None:
        made.bias.requires_grad_(False)
    made.weight = nn.Parameter(
        torch.empty(-(-inputs * outputs // 2), 1, dtype=torch.uint8), requires_grad=False
    )
    made.weight.quant_state = made.quant_state = _scales(outputs, inputs, dtype)
    made.weight.compress_statistics, made.weight.quant_type = True, "nf4"
    made.compute_dtype, made.compute_type_is_set, made.quant_storage = dtype, True, torch.uint8
    made.support_avx512bf16_for_cpu = False
    return made.train(linear.training)


def _scales(outputs: int, inputs: int, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    blocks = -(-outputs * inputs // BLOCK)
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((outputs, inputs)),
        code=torch.empty(TABLE),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=QuantState(
            absmax=torch.empty(-(-blocks // SCALES_BLOCK)),
            code=torch.empty(SCALES_TABLE),
            blocksize=SCALES_BLOCK,
            dtype=torch.float32,
        ),
    )
