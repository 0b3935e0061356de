"""The folder <run>/model: plain safetensors and a tokenizer that need no lowmem to be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem.hf.atomic_folder import disk_faults_explained, publish_folder
from lowmem.hf.chunked_loss import causal_model
from lowmem.hf.lora import save_adapters


def save_weights(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """`model` as safetensors with its configuration; of a LoRA model the adapters alone."""
    if isinstance(model, PeftModel):
        save_adapters(model, folder)
    else:
        model.save_pretrained(str(folder))


def write_final_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    last_checkpoint: Path | None,
) -> None:
    """Write `model` to `folder`, replacing an earlier one when the new one is complete.

    Raises FaultError, naming `last_checkpoint`, when the disk is full.
    """
    inner = causal_model(model)
    # The Trainer switched the cache off for training; who generates with the model wants it on.
    inner.config.use_cache = True
    unfinished = folder.with_name(f".{folder.name}.saving")
    with disk_faults_explained("The final model", last_checkpoint):
        shutil.rmtree(unfinished, ignore_errors=True)
        save_weights(model, unfinished)
        tokenizer.save_pretrained(str(unfinished))
        publish_folder(unfinished, folder)
