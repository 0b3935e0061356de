"""The pictures of a comparison: peak memory by part, loss curves, seconds a step; one row or line a method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lowmem.memory.ledger import PARTS
from lowmem.memory.plots import BARS_WIDTH, COLOURS, INK, LABEL_COLOURS, QUIET, figure
from lowmem.memory.wording import PART_NAMES, in_unit, number, size, unit_for

Entry = dict[str, Any]

# Okabe and Ito's palette again, darkest first, and dashes that tell the lines apart without it.
LINES = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
TITLE = {"loc": "left", "fontsize": 11.5, "fontweight": "bold", "color": INK}
LONGEST_TITLE = 24
LEGEND = {"frameon": False, "fontsize": 8.5, "loc": "lower left", "bbox_to_anchor": (-0.01, 1.0)}


def short(title: str, longest: int = LONGEST_TITLE) -> str:
    """A method's name, cut where settings have made it too long for a column."""
    return title if len(title) <= longest else title[: longest - 3] + "..."


def plot_peaks(entries: list[Entry], path: Path) -> None:
    """One stacked bar a method, its total at the end."""
    from matplotlib.patches import Patch

    largest = max(entry["peak_bytes"] for entry in entries)
    unit = unit_for(largest)
    with figure(path, height=1.5 + 0.62 * len(entries)) as axes:
        for row, entry in enumerate(entries):
            left = 0.0
            for part in PARTS:
                width = entry["parts"].get(part, 0) / unit[1]
                axes.barh(
                    row, width, left=left, height=0.62, color=COLOURS[part], edgecolor="white", linewidth=0.8
                )
                if width > 0.07 * largest / unit[1]:
                    axes.text(
                        left + width / 2, row, in_unit(entry["parts"][part], unit), ha="center", va="center",
                        color=LABEL_COLOURS.get(part, INK), fontsize=8.5,
                    )  # fmt: skip
                left += width
            total = f" {size(entry['peak_bytes'])}"
            axes.text(left, row, total, ha="left", va="center", color=INK, fontsize=9.5, fontweight="bold")
        _name_rows(axes, entries)
        axes.set_xlim(0, largest / unit[1] / BARS_WIDTH)
        axes.spines["bottom"].set_bounds(0, largest / unit[1])
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= largest / unit[1]])
        axes.set_xlabel(f"peak memory, {unit[0]}", color=INK, x=BARS_WIDTH / 2)
        present = [part for part in PARTS if any(entry["parts"].get(part) for entry in entries)]
        patches = [Patch(color=COLOURS[part], label=PART_NAMES[part]) for part in present]
        axes.legend(handles=patches, ncols=len(patches), handlelength=0.9, columnspacing=1.1, **LEGEND)
        axes.set_title("Peak memory by part", pad=26, **TITLE)


def plot_losses(entries: list[Entry], path: Path) -> None:
    """Training loss of every step, one line a method; no file when there is no finite loss."""
    curves = [(entry, [_finite(loss) for loss in entry["losses"]]) for entry in entries]
    if not any(math.isfinite(loss) for _, losses in curves for loss in losses):
        return
    columns = 3
    with figure(path, height=3.8 + 0.2 * math.ceil(len(curves) / columns)) as axes:
        for index, (entry, losses) in enumerate(curves):
            label = f"{short(entry['title'])}, lr {entry['lr']:g}"
            if not all(map(math.isfinite, losses)):
                label += (
                    f" (not finite from step {1 + [math.isfinite(loss) for loss in losses].index(False)})"
                )
            style = {"color": LINES[index % len(LINES)], "linestyle": DASHES[index % len(DASHES)]}
            axes.plot(range(1, len(losses) + 1), losses, label=label, linewidth=1.6, **style)
        axes.legend(ncols=columns, handlelength=2.4, columnspacing=1.4, **LEGEND)
        axes.set_xlabel("optimizer step", color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("loss, nats per token", color=INK)
        axes.set_title(
            "Training loss on the same batches", pad=10 + 16 * math.ceil(len(curves) / columns), **TITLE
        )


def plot_seconds(entries: list[Entry], path: Path) -> None:
    """The timed steps of each method as dots, its median as a line with the number."""
    slowest = max(second for entry in entries for second in entry["timed_seconds"])
    with figure(path, height=1.3 + 0.5 * len(entries)) as axes:
        for row, entry in enumerate(entries):
            seconds, middle = entry["timed_seconds"], entry["step_seconds"]["median"]
            axes.plot(seconds, [row] * len(seconds), "o", color=COLOURS["temporary"], markersize=4, alpha=0.6)
            axes.plot([middle, middle], [row - 0.3, row + 0.3], color=INK, linewidth=2)
            axes.text(
                1.01, row, f"{middle:.3g} s", va="center", color=INK, fontsize=9.5, fontweight="bold",
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        _name_rows(axes, entries)
        axes.set_xlim(0, 1.05 * slowest)
        axes.grid(axis="x", color=QUIET, alpha=0.2)
        axes.set_xlabel("seconds a step", color=INK)
        axes.set_title("Seconds a step: each timed step, and the median", **TITLE)


def _name_rows(axes: Any, entries: list[Entry]) -> None:
    axes.set_yticks(range(len(entries)), [short(entry["title"]) for entry in entries], fontsize=10)
    axes.set_ylim(len(entries) - 0.45, -0.55)  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _finite(value: Any) -> float:
    """NaN, which leaves a gap in a line, for what is no finite number."""
    known = number(value)
    return known if known is not None and math.isfinite(known) else math.nan
