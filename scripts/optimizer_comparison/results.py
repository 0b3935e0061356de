"""The results as a table: each method at its best learning rate, over the seeds."""

from __future__ import annotations

import json
import statistics
from typing import Any


def summaries(content: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a task and method: best learning rate of seed 0, mean and spread over all seeds at it."""
    found = []
    pairs = dict.fromkeys((run["task"], run["method"]) for run in content["runs"])
    for task, method in pairs:
        runs = [run for run in content["runs"] if (run["task"], run["method"]) == (task, method)]
        first = {run["lr"]: run["loss"] for run in runs if run["seed"] == 0}
        best = min(first, key=first.__getitem__)
        losses = [run["loss"] for run in runs if run["lr"] == best]
        found.append(
            {
                "task": task,
                "method": method,
                "lr": best,
                "is_inside_its_grid": min(first) < best < max(first),
                "losses": losses,
                "mean": statistics.fmean(losses),
                "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
                "state_bytes": runs[-1]["state_bytes"],
                "weight_bytes": runs[-1]["weight_bytes"],
                "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
            }
        )
    return found


def markdown(content: dict[str, Any], conditions: dict[str, Any]) -> str:
    work = content["work"]
    lines = [
        "# Optimizers compared",
        "",
        "Made by `scripts/compare_optimizers.py`. A pretrained LLaMA of 260,032 parameters is fine-tuned with every",
        f"parameter trained: {work['steps']} steps of {work['rows']} x {work['tokens']} tokens, the same rows in the",
        "same order, cosine schedule, gradients clipped to norm 1. Held-out loss in nats a token at the best learning",
        "rate of each method (searched with seed 0 until the best lies inside the grid), mean and standard deviation",
        "over seeds. CPU time is the ratio to AdamW's.",
    ]
    entries = summaries(content)
    for task in dict.fromkeys(entry["task"] for entry in entries):
        own = [entry for entry in entries if entry["task"] == task]
        base = next((entry["mean"] for entry in own if entry["method"] == "adamw"), None)
        lines += ["", f"## {task}", ""]
        lines += [
            "| method | loss | deviation | against AdamW | learning rate | state KiB | weights KiB | CPU time |",
            "|---|---|---|---|---|---|---|---|",
        ]
        seconds = next((entry["cpu_seconds"] for entry in own if entry["method"] == "adamw"), None)
        for entry in own:
            edge = "" if entry["is_inside_its_grid"] else " (edge of the grid)"
            deviation = "-" if entry["deviation"] is None else f"{entry['deviation']:.4f}"
            against = "-" if base is None else f"{entry['mean'] / base - 1:+.1%}"
            ratio = "-" if seconds is None else f"{entry['cpu_seconds'] / seconds:.2f}"
            lines.append(
                f"| {entry['method']} | {entry['mean']:.4f} | {deviation} | {against} | {entry['lr']:g}{edge} | "
                f"{entry['state_bytes'] / 1024:,.0f} | {entry['weight_bytes'] / 1024:,.0f} | {ratio} |"
            )
    return "\n".join([*lines, "", "Conditions: " + json.dumps(conditions), ""])
