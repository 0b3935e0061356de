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
LABEL_PIXELS = (170, 13)
"""Room of a name, to the right and upwards."""


def draw(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """`entries`: of `results.summaries`. A task without AdamW has no panel."""
    tasks = [task for task in dict.fromkeys(entry["task"] for entry in entries) if _adamw(entries, task)]
    figure, panels = plt.subplots(
        len(tasks), 1, figsize=(8.2, 4.6 * len(tasks)), squeeze=False, layout="constrained"
    )
    for panel, task in zip(panels[:, 0], tasks, strict=True):
        base = _adamw(entries, task)["mean"]
        points = []
        for entry in (each for each in entries if each["task"] == task):
            above = min(WORST, 100 * (entry["mean"] / base - 1))
            size = max(1, entry["state_bytes"]) / 1024
            panel.plot(size, above, "o", color="#0072B2" if above <= 3 else "#D55E00", markersize=5)
            points.append((above, size, entry["method"]))
        panel.axhline(0, color=QUIET, linewidth=0.8)
        panel.axhline(3, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_xscale("log")
        panel.margins(x=0.16, y=0.12)
        panel.set_title(task, loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.set_ylabel("loss above AdamW's, %", fontsize=8, color=INK)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        figure.canvas.draw()
        _label(panel, sorted(points))
    panels[-1, 0].set_xlabel("optimizer state, KiB (log scale)", fontsize=8, color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(panel: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside their points from below to above, each above those that it would cover."""
    taken: list[tuple[float, float]] = []
    for above, size, name in points:
        x, y = panel.transData.transform((size, above))
        lifted = y
        for other_x, other_y in taken:
            if abs(other_x - x) < LABEL_PIXELS[0] and lifted < other_y + LABEL_PIXELS[1]:
                lifted = other_y + LABEL_PIXELS[1]
        taken.append((x, lifted))
        panel.annotate(
            name,
            (size, above),
            textcoords="offset pixels",
            xytext=(8, lifted - y - 3),
            fontsize=7,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.4} if lifted > y + 8 else None,
        )


def _adamw(entries: Sequence[dict[str, Any]], task: str) -> Any:
    return next((each for each in entries if (each["task"], each["method"]) == (task, "adamw")), None)
