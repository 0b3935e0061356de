"""The three pictures of a report: memory by part, loss, throughput. Drawn with Agg, no display needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from lowmem.memory.cards import CONTEXT_BYTES, USABLE
from lowmem.memory.ledger import PARTS, Part
from lowmem.memory.table import accounts
from lowmem.memory.wording import PART_NAMES, in_unit, number, percent, size, unit_for

# Okabe and Ito's palette: told apart with every common colour blindness, and in print by lightness.
COLOURS: dict[Part, str] = {
    "weights": "#0072B2",
    "gradients": "#E69F00",
    "optimizer_state": "#D55E00",
    "activations": "#009E73",
    "temporary": "#56B4E9",
    "other": "#BBBBBB",
}
LABEL_COLOURS: dict[Part, str] = {"weights": "white", "optimizer_state": "white", "activations": "white"}
INK, QUIET, TRAIN, HELD_OUT = "#222222", "#777777", "#0072B2", "#D55E00"
DPI = 150
BARS_WIDTH = 0.8  # of the picture; the totals stand in the rest


@contextmanager
def figure(path: Path, height: float) -> Iterator[Any]:
    """Axes in the report's style, 8 inches wide, written to `path` as PNG at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    picture = Figure(figsize=(8, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=9)
    yield axes
    picture.savefig(path, metadata={"Software": None})


def plot_memory(document: dict[str, Any], path: Path) -> None:
    """One stacked bar for the run and each AdamW, with its total and the saving at its end."""
    bars = accounts(document)
    unit = unit_for(max(account["peak_bytes"] for _, account in bars))
    longest = max(account["peak_bytes"] for _, account in bars) / unit[1]
    with figure(path, height=1.5 + 0.62 * len(bars)) as axes:
        for row, (_, account) in enumerate(bars):
            left = 0.0
            for part in PARTS:
                width = account["parts"].get(part, 0) / unit[1]
                axes.barh(
                    row, width, left=left, height=0.62, color=COLOURS[part], edgecolor="white", linewidth=0.8
                )
                if width > 0.07 * longest:
                    text = in_unit(account["parts"][part], unit)
                    colour = LABEL_COLOURS.get(part, INK)
                    axes.text(
                        left + width / 2, row, text, ha="center", va="center", color=colour, fontsize=8.5
                    )
                left += width
            end = f" {size(account['peak_bytes'])}"
            if account is not document:
                more = account["peak_bytes"] / document["peak_bytes"]
                end += f"  ({more:.2f}x)"
            axes.text(left, row, end, ha="left", va="center", color=INK, fontsize=9.5, fontweight="bold")
        axes.set_yticks(range(len(bars)), [title for title, _ in bars], fontsize=10)
        axes.set_ylim(len(bars) - 0.45, -0.55)  # the first on top
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, longest / BARS_WIDTH)
        axes.spines["bottom"].set_bounds(0, longest)
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= longest])
        if document.get("gpu") is not None:
            _mark_card(axes, document, unit[1])
        axes.set_xlabel(f"peak memory, {unit[0]}", color=INK, x=BARS_WIDTH / 2)
        _name_parts(axes, [account for _, account in bars])
        axes.set_title(
            _memory_title(document), loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=26
        )


def _mark_card(axes: Any, document: dict[str, Any], unit_bytes: int) -> None:
    """A line where the card is full: what of it is usable, less what the allocator reserves beyond its peak."""
    beyond_peak = document["reserved_bytes"] - document["peak_bytes"]
    room = (USABLE * document["gpu_bytes"] - CONTEXT_BYTES - beyond_peak) / unit_bytes
    if room <= axes.get_xlim()[1]:
        axes.axvline(room, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            document["gpu"], (room, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
            fontsize=8.5, color=INK,
        )  # fmt: skip


def _memory_title(document: dict[str, Any]) -> str:
    saved = document.get("saved_fraction")
    if saved is None:
        return f"Peak memory {size(document['peak_bytes'])}"
    verb = "less" if saved >= 0 else "more"
    return f"{percent(abs(saved))} {verb} memory than AdamW fused on the same work"


def _name_parts(axes: Any, columns: list[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch

    present = [part for part in PARTS if any(account["parts"].get(part) for account in columns)]
    patches = [Patch(color=COLOURS[part], label=PART_NAMES[part]) for part in present]
    axes.legend(
        handles=patches, ncols=len(patches), loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False,
        fontsize=8.5, handlelength=0.9, handleheight=0.9, handletextpad=0.4, columnspacing=1.1, borderaxespad=0.1,
    )  # fmt: skip


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `key`; non-finite values stay, to be shown as such."""
    pairs = [(row["step"], number(row.get(key))) for row in rows]
    known = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def plot_loss(training: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> bool:
    """Train and held-out loss by step. False, and no file, when there is none."""
    lines = [
        ("training", TRAIN, "", *series(training, "loss")),
        ("held out", HELD_OUT, "o", *series(evaluations, "eval_loss")),
    ]
    if not any(values for *_, values in lines):
        return False
    with figure(path, height=3.8) as axes:
        ends = []
        for name, colour, marker, steps, values in lines:
            finite = [value if math.isfinite(value) else math.nan for value in values]
            lone = marker or ("o" if sum(map(math.isfinite, values)) == 1 else "")
            axes.plot(steps, finite, color=colour, marker=lone, markersize=4, linewidth=1.6)
            last = [(step, value) for step, value in zip(steps, finite, strict=True) if math.isfinite(value)][
                -1:
            ]
            ends += [(*end, f"{name} {end[1]:.3g}", colour) for end in last]
            _mark_not_finite(axes, steps, values, colour)
        _start_at_zero_when_near(axes)
        if not ends:
            axes.set_yticks([])
        _label_ends(axes, ends)
        axes.set_xlabel("optimizer step", color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("loss, nats per token", color=INK)
        axes.set_title("Loss", loc="left", fontsize=11.5, fontweight="bold", color=INK)
    return True


def plot_throughput(training: list[dict[str, Any]], path: Path) -> bool:
    """Tokens per second by step, with the median. False, and no file, when there are none."""
    steps, values = series(training, "tokens_per_second")
    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not finite:
        return False
    middle = median(value for _, value in finite)
    with figure(path, height=3.0) as axes:
        marker = "o" if len(finite) == 1 else ""
        axes.plot(*zip(*finite, strict=True), color=TRAIN, linewidth=1.4, marker=marker, markersize=4)
        axes.axhline(middle, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
        _label_ends(axes, [(finite[-1][0], middle, f"median {middle:,.0f}", QUIET)])
        axes.set_ylim(0, 1.12 * max(value for _, value in finite) or 1)
        axes.set_xlabel("optimizer step", color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("tokens per second", color=INK)
        axes.yaxis.set_major_formatter(_thousands())
        axes.set_title("Throughput", loc="left", fontsize=11.5, fontweight="bold", color=INK)
    return True


def _thousands() -> Callable[[float, int], str]:
    return lambda value, _: f"{value:,.0f}"


def _mark_not_finite(axes: Any, steps: list[int], values: list[float], colour: str) -> None:
    """A cross at the top edge where a value was NaN or infinite, so that a gap in the line has a reason."""
    broken = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if not broken:
        return
    edge = axes.get_xaxis_transform()
    axes.plot(broken, [0.97] * len(broken), "x", color=colour, markersize=6, transform=edge, clip_on=False)
    axes.text(broken[0], 0.9, "NaN or infinite", color=colour, fontsize=8.5, transform=edge, ha="left")


def _label_ends(axes: Any, ends: list[tuple[int, float, str, str]]) -> None:
    """Each line's name at its right end instead of a legend; apart where the lines end together."""
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    right = max(axes.get_xlim()[1], *(end[0] for end in ends)) if ends else 0
    floor = -math.inf
    for _, value, text, colour in ends:
        height = max(value, floor)
        axes.annotate(
            text, (right, height), xytext=(4, 0), textcoords="offset points", va="center", color=colour,
            fontsize=9.5, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
        floor = height + 0.07 * (high - low)


def _start_at_zero_when_near(axes: Any) -> None:
    low, high = axes.get_ylim()
    if low < 0.35 * high:
        axes.set_ylim(0, high)
