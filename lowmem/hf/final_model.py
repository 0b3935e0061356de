"""The folder <run>/model: plain safetensors and a tokenizer that need no lowmem to be loaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft.peft_model
import transformers.modeling_utils
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem.hf.atomic_folder import disk_faults_explained, publish_folder
from lowmem.hf.chunked_loss import causal_model
from lowmem.hf.export import write_float_copy
from lowmem.hf.int8_config import is_stored_in_int8
from lowmem.hf.lora import save_adapters
from lowmem.run.checkpoint_probe import write_safetensors_in_small
from lowmem.run.checkpoint_tensors import write_safetensors

_WRITER = "safe_save_file"  # the name by which both libraries call safetensors' save_file


def save_weights(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    *,
    in_small: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """`model` as safetensors with its configuration; of a LoRA model the adapters alone.

    in_small: every tensor is cut down to one value, to try out the rest. weights: those of a model that is divided
    over processes.
    """
    with _written_by(write_safetensors_in_small if in_small else write_safetensors):
        if isinstance(model, PeftModel):
            save_adapters(model, folder, weights=weights)
        else:
            model.save_pretrained(str(folder), state_dict=weights)


@contextmanager
def _written_by(writer: Callable[..., None]) -> Iterator[None]:
    """The libraries' own writer copies all tensors from the GPU to the host before it writes the first."""
    libraries = (transformers.modeling_utils, peft.peft_model)
    originals = [getattr(library, _WRITER) for library in libraries]
    try:
        for library in libraries:
            setattr(library, _WRITER, writer)
        yield
    finally:
        for library, original in zip(libraries, originals, strict=True):
            setattr(library, _WRITER, original)


def write_final_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    last_checkpoint: Path | None,
    keeps_int8: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write `model`, or its `weights` where it is divided, to `folder`, replacing an earlier one when it is complete.

    Int8 weights are written in the dtype that the model computes in, unless `keeps_int8`.

    Raises FaultError, naming `last_checkpoint`, when the disk is full.
    """
    inner = causal_model(model)
    # The Trainer switched the cache off for training; who generates with the model wants it on.
    inner.config.use_cache = True
    unfinished = folder.with_name(f".{folder.name}.saving")
    with disk_faults_explained("The final model", last_checkpoint):
        shutil.rmtree(unfinished, ignore_errors=True)
        if keeps_int8 or not is_stored_in_int8(inner.config):
            save_weights(model, unfinished, weights=weights)
        else:
            _save_in_float(inner, unfinished)
        tokenizer.save_pretrained(str(unfinished))
        publish_folder(unfinished, folder)


def _save_in_float(model: PreTrainedModel, folder: Path) -> None:
    """By way of the int8 files, which are then read a few MiB at a time: no float copy of the model is made."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-int8-") as int8:
        save_weights(model, int8)
        folder.mkdir()
        write_float_copy(Path(int8), folder, dtype=str(model.dtype).removeprefix("torch."))
