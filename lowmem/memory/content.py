"""What a report says about a run, from the files that its folder holds."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from lowmem.memory.blocks import Block, Bullets, Code, Heading, Paragraph, Picture, Table
from lowmem.memory.plots import series
from lowmem.memory.processes import process_lines, process_rows
from lowmem.memory.run_files import RunFiles
from lowmem.memory.table import (
    accounts,
    method_line,
    plan_lines,
    saving_lines,
    table_rows,
    warning_lines,
)
from lowmem.memory.wording import condition_lines, number, percent, shown, size

LAST_EVALUATIONS = 12


def report_blocks(run: RunFiles, pictures: set[str]) -> list[Block]:
    """`pictures` names the files that were drawn in plots/."""
    blocks: list[Block] = [Heading(_title(run), level=1)]
    blocks += _headline(run)
    blocks += _memory(run, pictures)
    blocks += _processes(run)
    blocks += _loss(run, pictures)
    blocks += _speed(run, pictures)
    if run.environment is not None:
        blocks += [Heading("Environment"), Table(["", ""], _flat(run.environment), numbers=False)]
    if run.recipe_text is not None:
        blocks += [Heading("Recipe"), Code(run.recipe_text, "yaml")]
    if run.gaps:
        blocks += [Heading("Not in this report"), Bullets(run.gaps)]
    return blocks


def _title(run: RunFiles) -> str:
    model, optimizer = run.recipe.get("model"), run.recipe.get("optimizer")
    name = model.get("name_or_path") if isinstance(model, dict) else None
    rule = optimizer.get("name") if isinstance(optimizer, dict) else None
    return f"{name} fine-tuned with {rule}" if name and rule else f"Run {run.path.resolve().name}"


def _headline(run: RunFiles) -> list[Block]:
    sentences = []
    if run.memory is not None:
        sentences.append(f"Peak memory {size(run.memory['peak_bytes'])}")
        saved = run.memory.get("saved_fraction")
        if saved is not None:
            verb = "less" if saved >= 0 else "more"
            sentences[-1] += f", {percent(abs(saved))} {verb} than AdamW fused on the same work"
        sentences[-1] += "."
    for key, name in (("eval_loss", "Held-out loss"), ("exact_match", "Exact match")):
        _, values = series(run.evaluations, key)
        if len(values) > 1:
            sentences.append(f"{name} from {shown(values[0])} to {shown(values[-1])}.")
        elif values:
            sentences.append(f"{name} {shown(values[0])}.")
    return [Paragraph(" ".join(sentences), strong=True)] if sentences else []


def _memory(run: RunFiles, pictures: set[str]) -> list[Block]:
    if run.memory is None:
        return []
    head, rows = table_rows(run.memory)
    peak = next(index for index, row in enumerate(rows) if row[0] == "peak")
    blocks: list[Block] = [Heading("Memory")]
    if "memory.png" in pictures:
        blocks.append(Picture("plots/memory.png", "Peak memory by part, this run and AdamW on the same work"))
    blocks.append(Table(head, rows, strong=(peak,)))
    lines = [f"{line[0].upper()}{line[1:]}." for line in saving_lines(run.memory)]
    lines += [f"{line[0].upper()}{line[1:]}." for line in plan_lines(run.memory)]
    lines += [f"Warning: {line}." for line in warning_lines(run.memory)]
    if len(accounts(run.memory)) == 1:
        lines.append("There is no AdamW run beside it, so no saving is stated.")
    blocks += [Bullets(lines), Paragraph(method_line(run.memory))]
    conditions = [list(line) for line in condition_lines(run.memory["conditions"])]
    return [*blocks, Table(["measured with", ""], conditions, numbers=False)] if conditions else blocks


def _processes(run: RunFiles) -> list[Block]:
    if run.processes is None:
        return []
    return [
        Heading("Memory of each process"),
        Table(*process_rows(run.processes)),
        Paragraph(" ".join(process_lines(run.processes))),
    ]


def _loss(run: RunFiles, pictures: set[str]) -> list[Block]:
    if not run.training and not run.evaluations:
        return []
    blocks: list[Block] = [Heading("Loss")]
    if "loss.png" in pictures:
        blocks.append(Picture("plots/loss.png", "Training and held-out loss by optimizer step"))
    steps, losses = series(run.training, "loss")
    if losses:
        first, last = (shown(losses[0]), steps[0]), (shown(losses[-1]), steps[-1])
        text = f"Training loss {first[0]} at step {first[1]}, {last[0]} at step {last[1]}."
        broken = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
        if broken:
            text += f" It was NaN or infinite at {len(broken)} logged step(s), first at step {broken[0]}."
        blocks.append(Paragraph(text))
    if run.evaluations:
        keys = [
            key for key in ("eval_loss", "eval_perplexity", "exact_match") if series(run.evaluations, key)[1]
        ]
        names = {"eval_loss": "held-out loss", "eval_perplexity": "perplexity", "exact_match": "exact match"}
        shown_rows = run.evaluations[-LAST_EVALUATIONS:]
        if len(shown_rows) < len(run.evaluations):
            blocks.append(Paragraph(f"The last {LAST_EVALUATIONS} of {len(run.evaluations)} evaluations:"))
        rows = [[str(row["step"]), *(shown(number(row.get(key))) for key in keys)] for row in shown_rows]
        blocks.append(Table(["step", *(names[key] for key in keys)], rows))
    return blocks


def _speed(run: RunFiles, pictures: set[str]) -> list[Block]:
    _, rates = series(run.training, "tokens_per_second")
    rates = [rate for rate in rates if math.isfinite(rate)]
    if not rates:
        return []
    text = f"{median(rates):,.0f} tokens per second (median of {len(rates)} logged steps)"
    _, seconds = series(run.training, "seconds")
    _, tokens = series(run.training, "tokens")
    if seconds and tokens:
        text += f"; {tokens[-1]:,.0f} tokens in {seconds[-1]:,.0f} seconds"
    blocks: list[Block] = [Heading("Speed"), Paragraph(text + ".")]
    if "throughput.png" in pictures:
        blocks.append(Picture("plots/throughput.png", "Tokens per second by optimizer step"))
    return blocks


def _flat(value: Any, prefix: str = "") -> list[list[str]]:
    """Rows (dotted name, value) of nested JSON."""
    if isinstance(value, dict) and value:
        return [
            row
            for name, inner in value.items()
            for row in _flat(inner, f"{prefix}.{name}" if prefix else name)
        ]
    if isinstance(value, list) and value:
        return [row for index, inner in enumerate(value) for row in _flat(inner, f"{prefix}[{index}]")]
    return [[prefix.replace("_", " "), "none" if value in ({}, []) else shown(value)]]
