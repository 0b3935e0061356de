"""The results as a table: each method at its best learning rate, over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t of a two-sided 95 % interval, by the number of seeds."""


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
                "cpu_seconds": median_of([run["cpu_seconds"] for run in runs]),
            }
        )
    return found


def median_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def beyond(entry: dict[str, Any], adamw: dict[str, Any] | None) -> str:
    """` +` or ` -` where the mean lies outside of the 95 % interval of AdamW's."""
    if adamw is None or entry is adamw or len(adamw["losses"]) not in T_95:
        return ""
    half = T_95[len(adamw["losses"])] * adamw["deviation"] / math.sqrt(len(adamw["losses"]))
    distance = entry["mean"] - adamw["mean"]
    return "" if abs(distance) <= half else " +" if distance > 0 else " -"


def markdown(content: dict[str, Any], conditions: dict[str, Any]) -> str:
    work = content["work"]
    lines = [
        "# Optimizers compared",
        "",
        "Made by `scripts/compare_optimizers.py`. A pretrained LLaMA of 260,032 parameters is fine-tuned with every",
        f"parameter trained: {work['steps']} steps of {work['rows']} x {work['tokens']} tokens, the same rows in the",
        "same order, cosine schedule, gradients clipped to norm 1. `pretraining` begins with random weights of a LLaMA",
        "of 1.1 million parameters and makes three times as many steps, `stories, long` makes four times as many.",
        "Held-out loss in nats a token at the best learning rate of each method (searched by factors of 2 with seed 0",
        "until the best lies inside the grid), mean and standard deviation over seeds. A loss above AdamW's is marked",
        "+ where it lies beyond the 95 % interval of AdamW's mean (Student's t over its seeds), and - where it lies",
        "below. Fallbacks of embedding, head and norms are AdamW at the same learning rate. CPU time is the ratio to",
        "AdamW's, of the whole process.",
        "",
        "So few steps tell how fast a method learns at first, on a model this small; not how a long run ends.",
        "",
        "![Loss against optimizer state](optimizer_comparison.png)",
    ]
    entries = summaries(content)
    for task in dict.fromkeys(entry["task"] for entry in entries):
        own = [entry for entry in entries if entry["task"] == task]
        adamw = next((entry for entry in own if entry["method"] == "adamw"), None)
        base = None if adamw is None else adamw["mean"]
        lines += ["", f"## {task}", ""]
        lines += [
            "| method | loss | deviation | against AdamW | learning rate | state KiB | weights KiB | CPU time |",
            "|---|---|---|---|---|---|---|---|",
        ]
        seconds = next((entry["cpu_seconds"] for entry in own if entry["method"] == "adamw"), None)
        for entry in own:
            edge = "" if entry["is_inside_its_grid"] else " (edge of the grid)"
            deviation = "-" if entry["deviation"] is None else f"{entry['deviation']:.4f}"
            against = "-" if base is None else f"{entry['mean'] / base - 1:+.1%}{beyond(entry, adamw)}"
            own_seconds = entry["cpu_seconds"]
            ratio = "-" if seconds is None or own_seconds is None else f"{own_seconds / seconds:.2f}"
            times = "" if adamw is None else f", {entry['lr'] / adamw['lr']:g} x AdamW's"
            lines.append(
                f"| {entry['method']} | {entry['mean']:.4f} | {deviation} | {against} | {entry['lr']:g}{times}{edge} | "
                f"{entry['state_bytes'] / 1024:,.0f} | {entry['weight_bytes'] / 1024:,.0f} | {ratio} |"
            )
    return "\n".join([*lines, "", "Conditions: " + json.dumps(conditions), ""])
