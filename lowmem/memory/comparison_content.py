"""What a comparison shows of comparison.json: the table of a terminal, and the blocks of a report."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from lowmem.memory.blocks import Block, Bullets, Heading, Paragraph, Picture, Table
from lowmem.memory.comparison_plots import short
from lowmem.memory.ledger import PARTS
from lowmem.memory.wording import (
    MEASURED_BY,
    PART_NAMES,
    condition_lines,
    in_unit,
    number,
    percent,
    shown,
    size,
    unit_for,
)

WIDTH = 100
LR_NOTE = (
    "Losses compare only as well as the learning rates were chosen: each method was trained with the one in its "
    "row."
)


def measured_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in document["methods"] if entry["reason"] is None]


def table_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and one row a measured method; "saved" is there when adamw_fused was measured."""
    measured = measured_of(document)
    unit = unit_for(max(entry["peak_bytes"] for entry in measured))
    against = any(entry["saved_bytes"] is not None for entry in measured)
    held_out = any(entry["held_out_loss"] is not None for entry in measured)
    head = [unit[0], "lr", "peak", "state", *(["saved"] if against else [])]
    head += ["s/step", "min..max", "tokens/s", "loss", *(["held out"] if held_out else [])]
    rows = []
    for entry in measured:
        seconds = entry["step_seconds"]
        row = [entry["title"], f"{entry['lr']:g}", in_unit(entry["peak_bytes"], unit)]
        row.append(in_unit(entry["optimizer_state_bytes"], unit))
        row += [percent(entry["saved_fraction"])] if against else []
        row += [_digits(seconds["median"], 3), f"{_digits(seconds['min'], 3)}..{_digits(seconds['max'], 3)}"]
        row += [f"{entry['tokens_per_second']:,.0f}", _loss(entry, "last")]
        row += [_loss(entry, "held out")] if held_out else []
        rows.append(row)
    return head, rows


def _loss(entry: dict[str, Any], which: str) -> str:
    """A dash for a method that does not follow the recipe, whose losses compare with no other's."""
    if not entry["losses_compare"]:
        return "-"
    value = {"first": entry["losses"][0], "last": entry["losses"][-1], "held out": entry["held_out_loss"]}
    return _digits(number(value[which]), 4)


def _digits(value: float | None, digits: int) -> str:
    """So many significant digits, zeros at the end too, so that a column lines up."""
    if value is None or not math.isfinite(value):
        return shown(value)
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of at most `WIDTH`; names that are cut to fit stand below them in full, and an empty line ends them."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    room = WIDTH - sum(width + 2 for width in widths[1:])
    lines, names = [], []
    for row in [head, *rows]:
        numbers = (cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        name = short(row[0], room)
        lines.append(name.ljust(min(widths[0], room)) + "".join(numbers))
        names += [f"{name} is {row[0]}"] if name != row[0] else []
    return [lines[0], "-" * len(lines[0]), *lines[1:], "", *names, *[""][: len(names)]]


def table(document: dict[str, Any]) -> str:
    """The comparison for a terminal of 100 columns; no line ends in a newline or in blanks."""
    lines = _aligned(*table_rows(document)) if measured_of(document) else []
    for line in [*reason_lines(document), *note_lines(document)]:
        lines += textwrap.wrap(line, WIDTH, initial_indent="- ", subsequent_indent="  ")
    conditions = ", ".join(f"{name} {value}" for name, value in condition_lines(document["conditions"]))
    return "\n".join([*lines, "", *textwrap.wrap(conditions, WIDTH)])


def reason_lines(document: dict[str, Any]) -> list[str]:
    return [
        f"{entry['title']} was not measured: {entry['reason']}"
        for entry in document["methods"]
        if entry["reason"] is not None
    ]


def note_lines(document: dict[str, Any]) -> list[str]:
    """What a reader must know to read the numbers."""
    measured = measured_of(document)
    if not measured:
        return []
    timed = document["timed_steps"]
    steps = f"step{'s' if len(timed) != 1 else ''}"
    watched = ", ".join(map(str, document["watched_steps"]))
    lines = [
        LR_NOTE,
        f"Every method trained {document['steps']} optimizer steps on the same batches from the same weights, in a "
        "process of its own, one after the other.",
        f"Memory is the fullest moment of steps {watched} ({MEASURED_BY[measured[0]['measured_by']]}); state is "
        "what the optimizer keeps after the last step.",
        f"Seconds a step are the median of {len(timed)} {steps} in which no memory was counted, with the fastest and "
        "the slowest.",
    ]
    if any(entry["saved_bytes"] is not None for entry in measured):
        lines.append("Saved is peak memory against adamw_fused.")
    for entry in measured:
        for key, what in (("fallback", "what its target leaves out"), ("head", "the output head")):
            other = entry["settings"].get(key) or {}
            if "lr" in other:
                lines.append(f"{entry['title']} trains {what} with {other['name']} at lr {other['lr']:g}.")
        gap = entry["settings"].get("refresh_every")
        if gap and not any((step - 1) % gap == 0 for step in timed):
            lines.append(
                f"{entry['title']} chooses its subspaces anew every {gap} steps and did so in none of the timed steps: "
                "its seconds are those of the steps between."
            )
        if not entry["losses_compare"]:
            updates = document["conditions"]["gradient_accumulation_steps"]
            many = f" It updates {updates} times a step, which its seconds show." if updates > 1 else ""
            lines.append(
                f"{entry['title']} updates each weight within the backward pass, without clipping, accumulation or "
                f"the learning-rate schedule of the recipe: its memory compares, its losses do not.{many}"
            )
        lines += [f"{entry['title']}: warning: {warning}" for warning in entry["warnings"]]
    lines += dict.fromkeys(note for entry in measured for note in entry["notes"])
    return lines


def comparison_blocks(document: dict[str, Any], pictures: set[str]) -> list[Block]:
    """`pictures` names the files that were drawn in plots/."""
    measured = measured_of(document)
    model = document["conditions"]["model"]
    blocks: list[Block] = [Heading(f"Optimizers compared on {model}", level=1)]
    if measured:
        blocks += [Paragraph(_headline(measured), strong=True), Table(*table_rows(document))]
    if reason_lines(document):
        blocks += [Bullets([f"{line}." for line in reason_lines(document)])]
    if measured:
        blocks += [Bullets(note_lines(document)), Heading("Memory")]
        blocks += _picture(pictures, "memory.png", "Peak memory by part, one bar a method")
        blocks += [_parts_table(measured), Heading("Loss")]
        blocks += _picture(pictures, "loss.png", "Training loss by optimizer step, one line a method")
        blocks += [_loss_table(measured), Heading("Time")]
        blocks += _picture(pictures, "seconds.png", "Seconds a step: median, fastest and slowest")
    settings = [[entry["title"], _settings_text(entry["settings"])] for entry in document["methods"]]
    blocks += [Heading("Settings"), Table(["method", "settings"], settings, numbers=False)]
    conditions = [list(line) for line in condition_lines(document["conditions"])]
    blocks += [Heading("Conditions"), Table(["measured with", ""], conditions, numbers=False)]
    if document["environment"] is not None:
        rows = [[name.replace("_", " "), _text(value)] for name, value in document["environment"].items()]
        blocks += [Heading("Environment"), Table(["", ""], rows, numbers=False)]
    return blocks


def _picture(pictures: set[str], name: str, says: str) -> list[Block]:
    return [Picture(f"plots/{name}", says)] if name in pictures else []


def _headline(measured: list[dict[str, Any]]) -> str:
    least, most = (end(measured, key=lambda entry: entry["peak_bytes"]) for end in (min, max))
    if len(measured) == 1:
        return f"Peak memory {size(least['peak_bytes'])} with {least['title']}."
    text = f"Peak memory from {size(least['peak_bytes'])} with {least['title']} "
    return text + f"to {size(most['peak_bytes'])} with {most['title']}."


def _parts_table(measured: list[dict[str, Any]]) -> Table:
    unit = unit_for(max(entry["peak_bytes"] for entry in measured))
    rows = [
        [PART_NAMES[part], *(in_unit(entry["parts"].get(part), unit) for entry in measured)] for part in PARTS
    ]
    rows.append(["peak", *(in_unit(entry["peak_bytes"], unit) for entry in measured)])
    strong = (len(rows) - 1,)
    if any(entry["reserved_bytes"] is not None for entry in measured):
        rows.append(["reserved", *(in_unit(entry["reserved_bytes"], unit) for entry in measured)])
    return Table([unit[0], *(entry["title"] for entry in measured)], rows, strong=strong)


def _loss_table(measured: list[dict[str, Any]]) -> Table:
    which = ["first", "last", "held out"]
    rows = [[entry["title"], f"{entry['lr']:g}", *(_loss(entry, one) for one in which)] for entry in measured]
    return Table(["", "lr", "first step", "last step", "held out"], rows)


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in settings.items() if value is not None)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return " ".join(_text(inner) for inner in value) or "none"
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else shown(value)
