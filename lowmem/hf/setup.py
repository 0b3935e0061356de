"""Everything a run needs before its first step, in the order that fails earliest and cheapest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from lowmem.data.batches import TokenDataset, collate
from lowmem.data.prepare import Prepared, prepare
from lowmem.hf.atomic_folder import disk_faults_explained, write_atomically
from lowmem.hf.callbacks import (
    EvaluateEvery,
    LogLastStep,
    MeterBorders,
    RunLog,
    StopOnInterrupt,
    StopOnNonFinite,
)
from lowmem.hf.disk import room_for
from lowmem.hf.divided_trial import trial_summary, try_divided
from lowmem.hf.environment import describe_environment
from lowmem.hf.evaluation import HeldOut
from lowmem.hf.held_bytes import HeldBytes
from lowmem.hf.interrupt import Interrupt
from lowmem.hf.launch import SHARDED, WITHOUT_WHOLE_WEIGHTS, strategy_for
from lowmem.hf.make_optimizer import make_optimizer, model_bytes, trainable_bytes
from lowmem.hf.memory_snapshot import FILE as SNAPSHOT
from lowmem.hf.memory_snapshot import SnapshotOfAStep
from lowmem.hf.metering import StepWatch
from lowmem.hf.model import load_tokenizer
from lowmem.hf.model_setup import model_summary, trainable_model
from lowmem.hf.peak import PeakSoFar
from lowmem.hf.recorded_batches import BatchRecorder
from lowmem.hf.run_folder import RunFolder, checkpoint_to_resume, open_run_folder
from lowmem.hf.small_batches import remarks, tokens_of_a_step
from lowmem.hf.trainer import LowMemTrainer
from lowmem.hf.training_arguments import training_arguments
from lowmem.hf.whole_weights import loaded_whole
from lowmem.memory.measure import meter_for
from lowmem.memory.wording import size
from lowmem.optim.build import describe_groups
from lowmem.recipe.dump import dump_recipe
from lowmem.recipe.schema import Recipe
from lowmem.run.checkpoint import step_of
from lowmem.run.checkpoint_interval import read_interval
from lowmem.run.folder_lock import FolderLock, lock_folder
from lowmem.run.one_voice import all_or_none

SAVED_WHOLE_ON_TRIAL_BYTES = 2**26

Say = Callable[[str], Any]


@dataclass
class Run:
    """One prepared run. `say` prints on the main process only."""

    recipe: Recipe
    folder: RunFolder
    args: TrainingArguments
    say: Say
    tokenizer: PreTrainedTokenizerBase
    trainer: LowMemTrainer
    watch: StepWatch
    batches: BatchRecorder
    stop: StopOnInterrupt
    checkpoint: Path | None
    total_steps: int
    held: HeldBytes | None = None
    """Of a divided run."""
    lock: FolderLock | None = None  # held while this lives; None on processes other than the main one

    @property
    def is_divided(self) -> bool:
        """Whether no process has all weights of the optimizer, or of the model."""
        return self.trainer.steps_in_pieces is not None

    @property
    def is_main(self) -> bool:
        return self.args.process_index == 0

    @property
    def is_trained_already(self) -> bool:
        """The checkpoint to continue from is at the run's last step, or beyond."""
        return self.checkpoint is not None and (step_of(self.checkpoint) or 0) >= self.total_steps


def prepare_run(recipe: Recipe, interrupt: Interrupt) -> Run:
    """Check the folder and the disk, read the data, build model, optimizer and Trainer.

    Raises RecipeError, RefusedError or FaultError for whatever would keep the run from working.
    """
    with all_or_none():  # before the processes wait for each other
        folder = open_run_folder(recipe)
        strategy = strategy_for(recipe)
    args = training_arguments(recipe, folder.path)
    is_main = args.process_index == 0
    say: Say = _say if is_main else _stay_silent
    _quiet_libraries(is_main)
    lock = _lock(folder, say) if is_main else None
    checkpoint = checkpoint_to_resume(recipe, folder, say, is_main=is_main)
    if is_main:
        with disk_faults_explained("The run folder", folder.newest_checkpoint):
            folder.thin_out_(keep=recipe.save.keep, optimizer_states=recipe.save.optimizer_states)
            write_atomically(folder.recipe, dump_recipe(recipe))
            write_atomically(folder.environment, json.dumps(describe_environment(args.world_size), indent=2))

    with all_or_none():  # each reads files of its own machine
        tokenizer = load_tokenizer(recipe.model)
        train_rows = prepare(
            recipe.data.train, recipe.data, tokenizer, seed=recipe.train.seed, where="data.train"
        )
        held_out = None
        if recipe.data.eval is not None:
            eval_rows = prepare(
                recipe.data.eval, recipe.data, tokenizer, seed=recipe.train.seed, where="data.eval"
            )
            held_out = HeldOut(recipe, eval_rows, tokenizer)
            say(data_summary("data.eval", eval_rows))
    say(data_summary("data.train", train_rows))
    say(f"the first row, trained part in brackets:\n{train_rows.sample}")
    if train_rows.template is not None:
        tokenizer.chat_template = train_rows.template

    rows = TokenDataset(train_rows.examples)
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer sets a pad token"
    to_batch = collate(tokenizer.pad_token_id)
    shortest = min(range(len(rows)), key=lambda index: len(train_rows.examples[index].input_ids))
    # A model that is to be divided need never fit one device; who divides it moves the pieces.
    device = torch.device("cpu") if strategy in WITHOUT_WHOLE_WEIGHTS else args.device
    with loaded_whole():
        model = trainable_model(recipe, device=device, probe_batch=to_batch([rows[shortest]]), say=say)
    say(f"model: {model_summary(model)}")

    tokens_per_step = tokens_of_a_step(recipe, train_rows.summary, args.world_size)
    meter = meter_for(model, args.device)
    watch, batches, stop = StepWatch(meter), BatchRecorder(), StopOnInterrupt(interrupt)
    watch.is_on = strategy not in SHARDED or args.device.type == "cuda"
    callbacks: list[TrainerCallback] = [LogLastStep(), MeterBorders(watch)]
    if held_out is not None and recipe.eval.every is not None:
        callbacks.append(EvaluateEvery(recipe.eval.every))
    callbacks.append(stop)  # after EvaluateEvery: a stop comes before an evaluation
    if is_main:
        callbacks.append(RunLog(folder.metrics, PeakSoFar(watch, args.device)))
    if recipe.report.memory_snapshot and is_main:
        callbacks.append(SnapshotOfAStep(folder.path / SNAPSHOT, say))
    callbacks.append(StopOnNonFinite(folder))  # after RunLog: the row that stops the run is written
    trainer = LowMemTrainer(
        model=model,
        args=args,
        optimizer_of=lambda trained: make_optimizer(trained, recipe, tokens_per_step=tokens_per_step),
        schedule=recipe.train.lr_scheduler,
        train_dataset=rows,
        collate=to_batch,
        watch=watch,
        tokenizer=tokenizer,
        evaluator=None if held_out is None else lambda m: held_out.metrics(m, lambda: interrupt.requested),
        on_batches=batches,
        run_folder=folder,
        keep=recipe.save.keep,
        callbacks=callbacks,
        execution=recipe.train.execution,
        clip=recipe.optimizer.clip,
        refresh_from=recipe.optimizer.refresh_from,
        head_gradient=recipe.train.head_gradient,
    )
    trainer.optimizer_states = recipe.save.optimizer_states
    optimizer = trainer.create_optimizer()
    meter.watch(optimizer)
    state_bytes = optimizer.state_bytes()  # type: ignore[attr-defined]
    say(f"optimizer: {size(state_bytes)} of state\n{indented(describe_groups(optimizer))}")  # type: ignore[arg-type]
    say(trainer.execution_summary)
    for remark in remarks(recipe, tokens_per_step, args.world_size):
        say(remark)
    saved_bytes = trainable_bytes(model) if isinstance(model, PeftModel) else model_bytes(model)
    room = room_for(recipe, folder, model, saved_bytes)
    if is_main:
        room.refuse_too_small(state_bytes)
        forget_rows_to_come_(folder, checkpoint)
    total_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    is_trained_already = checkpoint is not None and (step_of(checkpoint) or 0) >= total_steps
    held = None
    if trainer.steps_in_pieces is not None:
        held = HeldBytes(trainer, PeakSoFar(watch, args.device))
        trainer.add_callback(held)
        writes = recipe.save.probe_at_start

        def once_divided() -> None:
            assert trainer.steps_in_pieces is not None
            for line in trainer.steps_in_pieces.pieces.described_ways():
                say(line)
            try_divided(trainer, room, say, total_steps, writes=writes)

        trainer.once_divided = once_divided
    elif is_main and recipe.save.probe_at_start and not is_trained_already:
        seconds = trainer.try_to_save(total_steps, in_small=saved_bytes > SAVED_WHOLE_ON_TRIAL_BYTES)
        say(trial_summary(seconds, saved_bytes + state_bytes))
    return Run(
        recipe=recipe,
        folder=folder,
        args=args,
        say=say,
        tokenizer=tokenizer,
        trainer=trainer,
        watch=watch,
        batches=batches,
        stop=stop,
        checkpoint=checkpoint,
        total_steps=total_steps,
        held=held,
        lock=lock,
    )


def _lock(folder: RunFolder, say: Say) -> FolderLock:
    """Have `folder` for this process alone, and clear what a killed one left in it."""
    with disk_faults_explained("The run folder's lock", folder.newest_checkpoint):
        lock = lock_folder(folder.path)
        folder.clear_leftovers_()
    if lock.unsupported:
        say(f"{folder.path}: this file system has no locks ({lock.unsupported}); start no second run in it.")
    return lock


def forget_rows_to_come_(folder: RunFolder, checkpoint: Path | None) -> None:
    """Remove the rows of metrics.jsonl that a run from `checkpoint` writes again."""
    if checkpoint is None:
        folder.metrics.forget_after_(None)
        return
    is_cut = read_interval(checkpoint).steps > 0
    folder.metrics.forget_after_(step_of(checkpoint), row_is_provisional=is_cut)


def data_summary(where: str, prepared: Prepared) -> str:
    """One line; counts that are 0 and mean that nothing was wrong are left out."""
    count = prepared.summary
    odd = "".join(f", {count[name]:,} {name}" for name in ("skipped", "dropped", "truncated") if count[name])
    return (
        f"{where}: {count['rows']:,} rows{odd} -> {count['sequences']:,} sequences, {count['tokens']:,} tokens, "
        f"{count['trained_tokens']:,} of them trained"
    )


def indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _say(text: str) -> None:
    print(text, flush=True)


def _stay_silent(text: str) -> None:
    """What processes other than the main one do with what there is to say."""


def _quiet_libraries(is_main: bool) -> None:
    """One voice: no loading bars and no advice of the libraries; remarks of lowmem once."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not is_main:
        logging.getLogger("lowmem").setLevel(logging.ERROR)
