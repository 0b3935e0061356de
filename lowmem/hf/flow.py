"""The main job: from a recipe to a fine-tuned model and a report of the memory it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.trainer_callback import TrainerState

from lowmem.errors import FaultError
from lowmem.hf.atomic_folder import what_is_intact
from lowmem.hf.ending import Findings, evaluate_at_the_end, let_go, report, save_final_model
from lowmem.hf.interrupt import EXIT_CODE, Interrupt
from lowmem.hf.out_of_memory import out_of_memory_advice
from lowmem.hf.run_folder import STATE_FILE, RunFolder, step_of
from lowmem.hf.setup import Run, prepare_run
from lowmem.recipe.schema import Recipe
from lowmem.run.one_voice import all_or_none, has_lost_a_process, one_tells

DONE = 0


def train(recipe: Recipe) -> int:
    """Run `recipe`; 0 when it is done, 130 when it was interrupted with a checkpoint saved.

    Raises RecipeError (exit code 2) for a recipe that is wrong, RefusedError (4) for a combination that
    cannot work, FaultError (5) for a full disk, too little device memory, a loss that stays non-finite or a process
    of the launch that has ended. Of several processes one raises it, and the others end with its exit code.
    """
    interrupt = Interrupt()
    with one_tells(), faults_explained(recipe):
        code, findings = train_and_save(recipe, interrupt)
        if findings is not None:
            report(findings)
    return code


@contextmanager
def faults_explained(recipe: Recipe) -> Iterator[None]:
    """Turn what libraries raise for too little memory and for a process that is gone into a FaultError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error):
            raise FaultError(out_of_memory_advice(recipe, error)) from error
        if has_lost_a_process(error):
            assert recipe.save.dir is not None
            newest = RunFolder(Path(recipe.save.dir).expanduser()).newest_checkpoint()
            go_on = "" if newest is None else " The same command continues from it."
            raise FaultError(
                "Another process of this launch has ended or no longer answers, and training cannot go on without it. "
                "The launcher says below which one; exit code -9 is a process that was killed, often for want of host "
                f"memory. {what_is_intact(newest)}{go_on}"
            ) from error
        raise


def train_and_save(recipe: Recipe, interrupt: Interrupt) -> tuple[int, Findings | None]:
    """Everything but the report: the exit code and, on the main process of a run that is done, its findings.

    Ctrl-C ends the set-up at once, and what comes after it in order.
    """
    with all_or_none():
        run = prepare_run(recipe, interrupt)
    with interrupt, run.watch.closed_at_the_end():
        if not train_to_the_end(run):
            return EXIT_CODE, None
        save_final_model(run)
        evaluate_at_the_end(run)
        if run.stop.requested_anywhere(run.args):
            run.say(f"interrupted after the last step; lowmem report {run.folder.path} writes what there is.")
            return EXIT_CODE, None
    findings = let_go(run)
    return DONE, findings if run.is_main else None


def train_to_the_end(run: Run) -> bool:
    """False when the run was interrupted."""
    trainer = run.trainer
    if run.is_trained_already:
        assert run.checkpoint is not None
        run.say(f"trained to step {run.total_steps} already: {run.checkpoint}")
        trainer._load_from_checkpoint(str(run.checkpoint))
        trainer.state = TrainerState.load_from_json(str(run.checkpoint / STATE_FILE))
        return True
    if run.checkpoint is not None:
        run.say(f"continuing from step {step_of(run.checkpoint)}: {run.checkpoint}")
    elif run.recipe.eval.at_start and trainer.evaluator is not None:
        trainer.evaluate()
        if run.stop.requested_anywhere(run.args):
            run.say("interrupted before the first step; there is nothing to save.")
            return False
    trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    if run.stop.granted:
        run.say(f"interrupted at step {trainer.state.global_step}; saved {run.folder.newest_checkpoint()}")
        run.say("Run the same command again to continue.")
        return False
    return True
