"""The adapters that peft has written, by the names of the parameters that an optimizer has stepped.

in the file      base_model.model.model.layers.0.mlp.up_proj.lora_A.weight
of the model     base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowmem.run.checkpoint_tensors import write_safetensors

ADAPTERS = "adapter_model.safetensors"
_OF_ADAPTERS, _ADAPTER = "lora_", "default"  # peft's words


def parameter_name(stored: str) -> str:
    """Of what an adapter file holds as `stored`. Raises ValueError for a name that is no LoRA adapter's."""
    parts = stored.split(".")
    places = [place for place, part in enumerate(parts) if part.startswith(_OF_ADAPTERS)]
    if not places:
        raise ValueError(f"{stored} is no LoRA adapter: no part of its name begins with {_OF_ADAPTERS}")
    after = places[-1] + 1
    return ".".join([*parts[:after], _ADAPTER, *parts[after:]])


def adapters_in(folder: Path) -> dict[str, Tensor]:
    """By the names of parameters, on the host."""
    return {parameter_name(name): value for name, value in load_file(folder / ADAPTERS).items()}


def write_adapters_(folder: Path, values: Mapping[str, Tensor]) -> None:
    """Write `folder`'s adapters anew with these values, which have the names of parameters; its metadata stays."""
    with safe_open(folder / ADAPTERS, framework="pt") as stored:
        metadata, names = stored.metadata(), list(stored.keys())
    unfinished = folder / f".{ADAPTERS}"  # values may still be read from the old file
    write_safetensors({name: values[parameter_name(name)] for name in names}, unfinished, metadata)
    unfinished.replace(folder / ADAPTERS)
