"""Several optimizers on exactly the same work: the batches are made once, each method has its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.batches import TokenDataset, collate
from lowmem.data.prepare import Prepared, prepare
from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.baseline import single_process_environment
from lowmem.hf.compared_run import HELD_OUT, TRAIN, checksum, num_tokens, timed_steps
from lowmem.hf.evaluation import HeldOut
from lowmem.hf.metering import StepWatch, steps_to_watch
from lowmem.hf.model import load_tokenizer
from lowmem.hf.quiet import quiet_transformers
from lowmem.hf.recorded_batches import Batch, BatchRecorder
from lowmem.hf.setup import data_summary
from lowmem.hf.trainer import LowMemTrainer
from lowmem.hf.training_arguments import refuse_sharded_launch, training_arguments
from lowmem.memory.comparison import Method, comparison_document
from lowmem.memory.measure import TrackedMeter
from lowmem.recipe.dump import dump_recipe
from lowmem.recipe.schema import Recipe

Say = Callable[[str], Any]


@dataclass(frozen=True)
class Compared:
    """`document` is None when nothing was measured before a Ctrl-C."""

    document: dict[str, Any] | None
    was_interrupted: bool


def compare(name: str, methods: Sequence[Method], *, steps: int, say: Say) -> Compared:
    """Measure each method on the first `steps` optimizer steps of the recipe called `name`, one after another.

    All methods have the same recipe but for the optimizer. One that fails has its reason in the document,
    and the others go on; so have those that a Ctrl-C kept from being measured.
    Raises RecipeError for what is wrong with the data or `steps`, RefusedError for a distributed launch.
    """
    refuse_several_processes()
    refuse_too_few(steps)
    recipe = methods[0].recipe
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        batches = save_work(recipe, steps, work, say)
        with sigterm_as_ctrl_c():
            was_interrupted = False
            try:
                for number, method in enumerate(methods, start=1):
                    say(f"measuring {method.title} ({number} of {len(methods)}) ...")
                    found.append(measure(method, work, batches))
                    if "reason" in found[-1]:
                        say(f"{method.title} was not measured: {found[-1]['reason']}")
            except KeyboardInterrupt:
                was_interrupted = True
    if not any("reason" not in each for each in found) and was_interrupted:
        return Compared(None, was_interrupted)
    found += [{"reason": "interrupted before it was measured"}] * (len(methods) - len(found))
    document = comparison_document(
        name,
        list(zip(methods, found, strict=True)),
        steps=steps,
        watched_steps=sorted(steps_to_watch(1, steps)),
        timed_steps=timed_steps(steps),
        sequence_length=batches.longest_sequence(),
    )
    return Compared(document, was_interrupted)


def refuse_several_processes() -> None:
    """Raise RefusedError in a launch of several processes, or one that shards the model."""
    refuse_sharded_launch()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise RefusedError(
            f"The launcher started {launched} processes, and lowmem compare measures one process on one device: what "
            "data parallelism adds is the same for every optimizer. Run lowmem compare without a launcher."
        )


def refuse_too_few(steps: int) -> None:
    if timed_steps(max(steps, 0)):
        return
    smallest = next(number for number in count(1) if timed_steps(number))
    raise RecipeError(
        f"lowmem compare: --steps is {steps}; it must be at least {smallest}. The first two warm up, and a step in "
        "which memory is counted is too slow to be timed."
    )


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
    _refuse_broken_off_steps(batches, recipe)
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


def _refuse_broken_off_steps(batches: BatchRecorder, recipe: Recipe) -> None:
    """Raise RecipeError where an epoch ends within a step: that step is smaller than the others."""
    sizes = [len(step) for step in batches.steps]
    smaller = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
    if smaller is not None:
        raise RecipeError(
            f"lowmem compare: the rows of data.train end within step {smaller + 1}, which has {sizes[smaller]} "
            f"micro-batches instead of {sizes[0]}, and every measured step must be a whole one. Use --steps {smaller}, "
            "more rows, or train.gradient_accumulation_steps=1."
        )


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt too, so that no method is left running alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(method: Method, work: Path, batches: BatchRecorder) -> dict[str, Any]:
    """What a fresh process found out about one method, or {"reason": why it did not}.

    A KeyboardInterrupt ends that process before it goes on.
    """
    recipe_file, out = work / "recipe.yaml", work / "found.json"
    recipe_file.write_text(dump_recipe(method.recipe), encoding="utf-8")
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lowmem.hf.compared_run", str(recipe_file), str(work), str(out)]
    command += [] if method.torch_variant is None else [method.torch_variant]
    code, said = run_to_the_end(command)
    if code == -signal.SIGKILL:
        return {"reason": "its process was killed, as the system does when memory runs out"}
    if code != 0 or not out.is_file():
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        return {"reason": f"its process ended with code {code}: {last}"}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "reason" not in found:
        assert found["batch_checksums"] == [checksum(step) for step in batches.steps], "the same batches"
        found["tokens"] = sum(num_tokens(step) for step in batches.steps)
    return found


def run_to_the_end(command: list[str]) -> tuple[int, str]:
    """Exit code and standard error. Whatever ends the waiting ends the process, and its memory is free again."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, env=single_process_environment(), stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return code, said.read().decode(errors="replace")
