"""After the last step: the final model, the last evaluation, the memory report."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lowmem.hf.atomic_folder import disk_faults_explained, write_atomically
from lowmem.hf.baseline import measure_baselines
from lowmem.hf.conditions import conditions
from lowmem.hf.final_model import write_final_model
from lowmem.hf.held_bytes import planned_processes
from lowmem.hf.launch import WITHOUT_WHOLE_WEIGHTS, launched_strategy
from lowmem.hf.lora import add_lora, merge
from lowmem.hf.metrics import MetricsFile, Value, printable_number
from lowmem.hf.model import load_model
from lowmem.hf.model_setup import make_generation_settings_savable_
from lowmem.hf.planned_beside import plan_of_measured_steps
from lowmem.hf.recorded_batches import BatchRecorder
from lowmem.hf.run_folder import RunFolder
from lowmem.hf.setup import Run, Say
from lowmem.hf.whole_weights import loaded_whole, whole_numel
from lowmem.memory.measure import Measured
from lowmem.memory.processes import HeldByProcesses, process_table, processes_document
from lowmem.memory.report import memory_document, table, write_report
from lowmem.recipe.schema import Recipe


def save_final_model(run: Run) -> None:
    """Write <dir>/model when the recipe wants it.

    Merged adapters replace the trained model in the run, unless each process has only a part of that.
    """
    if not run.recipe.save.model:
        return
    model = run.trainer.trained_model
    has_whole = launched_strategy() not in WITHOUT_WHOLE_WEIGHTS
    merges = run.recipe.save.merge_lora and isinstance(model, PeftModel)
    if isinstance(model, PeftModel) and merges and has_whole:
        model = run.trainer.model = merge(model)
    weights = run.trainer.whole_weights() if run.is_divided else None
    if run.is_main:
        if merges and not has_whole:
            assert weights is not None
            model, weights = merged_from_its_base(run.recipe, weights), None
        write_final_model(
            model,
            run.tokenizer,
            run.folder.model,
            last_checkpoint=run.folder.newest_checkpoint(),
            keeps_int8=run.recipe.save.int8,
            weights=weights,
        )
        run.say(f"model: {run.folder.model}")
    run.trainer.accelerator.wait_for_everyone()


def merged_from_its_base(recipe: Recipe, adapters: dict[str, Tensor]) -> PreTrainedModel:
    """The merged model on the host, where none of the processes has the whole one that was trained."""
    assert recipe.lora is not None
    with loaded_whole():
        base = load_model(recipe.model, seed=recipe.train.seed)
    make_generation_settings_savable_(base)
    model = add_lora(base, recipe.lora, seed=recipe.train.seed)
    model.load_state_dict(adapters, strict=False)
    return merge(model)


def evaluate_at_the_end(run: Run) -> None:
    if run.trainer.evaluator is not None and run.trainer.state.global_step not in run.trainer.evaluations:
        run.trainer.evaluate()


def conditions_of(run: Run) -> dict[str, Any]:
    params = list(run.trainer.trained_model.parameters())
    device = run.args.device
    return conditions(
        run.recipe,
        parameters=sum(whole_numel(param) for param in params),
        trained_parameters=sum(whole_numel(param) for param in params if param.requires_grad),
        sequence_length=run.batches.longest_sequence(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        world_size=run.args.world_size,
        torch=torch.__version__,
    )


@dataclass(frozen=True)
class Findings:
    """What is left of a run when its model has been let go."""

    folder: RunFolder
    recipe: Recipe
    measured: Measured | None
    batches: BatchRecorder
    conditions: dict[str, Any]
    gpu_bytes: int | None
    say: Say
    held: HeldByProcesses | None = None
    held_after: int = 0
    """Steps after which that was counted."""
    is_divided: bool = False
    """Over processes: what is measured on one is neither a plan's nor a baseline's whole model."""


def let_go(run: Run) -> Findings:
    """What the report needs. Who calls it must forget `run`, so that the baseline has the device for itself."""
    device = run.args.device
    findings = Findings(
        folder=run.folder,
        recipe=run.recipe,
        measured=run.watch.measured(),
        batches=run.batches,
        conditions=conditions_of(run),
        gpu_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        say=run.say,
        held=None if run.held is None else run.held.of_all(),
        held_after=0 if run.held is None else run.held.counted,
        is_divided=run.is_divided,
    )
    run.trainer.accelerator.end_training()
    return findings


def planned_beside(findings: Findings) -> Measured | str | None:
    """The plan of the measured steps; None when the recipe wants none."""
    if not findings.recipe.report.plan or findings.is_divided:
        return None
    return plan_of_measured_steps(
        findings.recipe,
        findings.batches.steps,
        on_cuda=findings.gpu_bytes is not None,
        world_size=findings.conditions["world_size"],
    )


def report(findings: Findings) -> None:
    """memory.json, report.md and the plots; the table and the evaluations are printed last."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if findings.measured is not None:
        found: dict[str, Measured | str] = {}
        if findings.recipe.report.baseline == "adamw" and not findings.is_divided:
            findings.say("measuring AdamW on the same steps ...")
            found = measure_baselines(findings.folder.recipe, findings.batches)
        planned = planned_beside(findings)
        reasons = {name: f"not measured: {one}" for name, one in found.items() if isinstance(one, str)}
        document = memory_document(
            findings.measured,
            {name: one for name, one in found.items() if isinstance(one, Measured)},
            findings.conditions | reasons,
            gpu_bytes=findings.gpu_bytes,
            planned=planned,
        )
        with disk_faults_explained("memory.json", findings.folder.newest_checkpoint()):
            write_atomically(findings.folder.memory, json.dumps(document, indent=2))
    if findings.held is not None:
        write_processes(findings, findings.held)
    written = write_report(findings.folder.path)
    if findings.folder.memory.is_file():
        findings.say(table(json.loads(findings.folder.memory.read_text(encoding="utf-8"))))
    if findings.held is not None:
        findings.say(process_table(json.loads(findings.folder.processes.read_text(encoding="utf-8"))))
    for line in evaluation_lines(findings.folder.metrics):
        findings.say(line)
    findings.say(f"report: {written}")


def write_processes(findings: Findings, held: HeldByProcesses) -> None:
    """processes.json, with what the formulas say beside what was counted."""
    strategy = launched_strategy()
    assert strategy != "single"
    planned: HeldByProcesses | str | None = None
    if findings.recipe.report.plan:
        world = findings.conditions["world_size"]
        planned = planned_processes(findings.recipe, strategy, world, on_cuda=findings.gpu_bytes is not None)
    document = processes_document(held, strategy, steps=findings.held_after, planned=planned)
    with disk_faults_explained("processes.json", findings.folder.newest_checkpoint()):
        write_atomically(findings.folder.processes, json.dumps(document, indent=2))


def evaluation_lines(metrics: MetricsFile) -> list[str]:
    """The first evaluation against the last, one line a measure; only the last where there was one."""
    rows = metrics.evaluations()
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    lines = []
    for name, title in (
        ("eval_loss", "loss"),
        ("eval_perplexity", "perplexity"),
        ("exact_match", "exact match"),
    ):
        if last.get(name) is None:
            continue
        before = f"{shown(first[name])} (step {first['step']}) -> " if first is not last else ""
        lines.append(f"held-out {title}: {before}{shown(last[name])} (step {last['step']})")
    return lines


def shown(value: Value) -> str:
    value = printable_number(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
