"""What every method of a comparison is given: the micro-batches of a run's first steps, and its held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.batches import TokenDataset, collate
from lowmem.data.prepare import Prepared, prepare
from lowmem.hf.evaluation import HeldOut
from lowmem.hf.metering import StepWatch
from lowmem.hf.model import load_tokenizer
from lowmem.hf.quiet import quiet_transformers
from lowmem.hf.recorded_batches import Batch, BatchRecorder
from lowmem.hf.setup import data_summary
from lowmem.hf.trainer import LowMemTrainer
from lowmem.hf.training_arguments import training_arguments
from lowmem.memory.measure import TrackedMeter
from lowmem.recipe.schema import Recipe

Say = Callable[[str], Any]

TRAIN, HELD_OUT = "batches.safetensors", "held_out.safetensors"


def save_work(recipe: Recipe, steps: int, work: Path, say: Say) -> BatchRecorder:
    """Read the data as a run does and save the micro-batches of its first `steps` steps, and the held-out rows."""
    with quiet_transformers():
        tokenizer = load_tokenizer(recipe.model)
        rows = _rows(recipe, tokenizer, "train")
        say(data_summary("data.train", rows))
        if recipe.data.eval is not None:
            held_out_rows = _rows(recipe, tokenizer, "eval")
            say(data_summary("data.eval", held_out_rows))
            held_out = HeldOut(recipe, held_out_rows, tokenizer)
            saved = BatchRecorder()
            for start in range(0, len(held_out.rows), held_out.batch_size):
                saved(0, [held_out.collate(held_out.rows[start : start + held_out.batch_size])])
            saved.save(work / HELD_OUT)
        assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer sets a pad token"
        batches = first_steps(
            recipe, TokenDataset(rows.examples), collate(tokenizer.pad_token_id), steps, work
        )
    batches.save(work / TRAIN)
    return batches


def _rows(recipe: Recipe, tokenizer: Any, name: str) -> Prepared:
    source = getattr(recipe.data, name)
    return prepare(source, recipe.data, tokenizer, seed=recipe.train.seed, where=f"data.{name}")


class _BatchReader(LowMemTrainer):
    """Goes through a run's steps in the Trainer's own loop and order, and trains nothing."""

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        return torch.zeros(())


class _NoModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, **inputs: Tensor) -> None:
        raise AssertionError("nothing is computed while batches are read")


def first_steps(
    recipe: Recipe,
    rows: TokenDataset,
    to_batch: Callable[[list[dict[str, Any]]], Batch],
    steps: int,
    scratch: Path,
) -> BatchRecorder:
    """The micro-batches of a run's first `steps` steps, as often over the rows as that takes."""
    # A CUDA context of this process would take memory from the methods that are measured.
    args = training_arguments(recipe, scratch, use_cpu=True)
    args.max_steps, args.max_grad_norm = steps, 0.0
    args.logging_strategy = args.save_strategy = "no"
    model = _NoModel()
    watch, batches = StepWatch(TrackedMeter(model)), BatchRecorder()
    watch.steps = set(range(1, steps + 1))  # those that are recorded; without borders the meter sees none
    reader = _BatchReader(
        model=model,  # type: ignore[arg-type]
        args=args,
        optimizer_of=lambda unused: torch.optim.SGD(unused.parameters()),
        schedule=recipe.train.lr_scheduler,
        train_dataset=rows,
        collate=to_batch,
        watch=watch,
        on_batches=batches,
    )
    reader.train()
    return batches


def checksum(batches: Iterable[Batch]) -> str:
    """Of the input ids of one step's micro-batches, their shapes included."""
    digest = blake2b(digest_size=8)
    for batch in batches:
        ids = batch["input_ids"].cpu().contiguous()
        digest.update(f"{tuple(ids.shape)} {ids.dtype} ".encode())
        digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def num_tokens(batches: Iterable[Batch]) -> int:
    """Tokens of one step, padding left out."""
    return sum(
        int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        for batch in batches
    )
