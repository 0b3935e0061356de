"""Held-out loss against bytes of optimizer state, a panel a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lowmem.memory.plots import INK, QUIET

WORST = 25.0
"""Per cent above AdamW; what is worse stands at the upper edge."""


def draw(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """`entries`: of `results.summaries`. A task without AdamW has no panel."""
    tasks = [task for task in dict.fromkeys(entry["task"] for entry in entries) if _adamw(entries, task)]
    figure, panels = plt.subplots(
        len(tasks), 1, figsize=(8.2, 3.6 * len(tasks)), squeeze=False, layout="constrained"
    )
    for panel, task in zip(panels[:, 0], tasks, strict=True):
        base = _adamw(entries, task)["mean"]
        for entry in entries:
            if entry["task"] == task:
                above = min(WORST, 100 * (entry["mean"] / base - 1))
                size = max(1, entry["state_bytes"]) / 1024
                panel.plot(size, above, "o", color="#0072B2" if above <= 3 else "#D55E00", markersize=5)
                panel.annotate(
                    entry["method"],
                    (size, above),
                    textcoords="offset points",
                    xytext=(5, 3),
                    fontsize=7,
                    color=INK,
                )
        panel.axhline(0, color=QUIET, linewidth=0.8)
        panel.axhline(3, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_xscale("log")
        panel.margins(x=0.16, y=0.12)
        panel.set_title(task, loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.set_ylabel("loss above AdamW's, %", fontsize=8, color=INK)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("optimizer state, KiB (log scale)", fontsize=8, color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _adamw(entries: Sequence[dict[str, Any]], task: str) -> Any:
    return next((each for each in entries if (each["task"], each["method"]) == (task, "adamw")), None)
