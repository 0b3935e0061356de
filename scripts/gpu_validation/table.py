"""The results file as Markdown."""

from __future__ import annotations

from typing import Any

from gpu_validation.document import ALLOCATORS, CONDITIONS, CONFIGURED, LOSS_CURVES, MEASURED, OPERATORS
from lowmem.memory.blocks import Block, Bullets, Heading, Paragraph, Table
from lowmem.memory.cards import CONTEXT_BYTES
from lowmem.memory.ledger import PARTS
from lowmem.memory.markdown import markdown
from lowmem.memory.wording import PART_NAMES, in_unit, size

GIB, MIB = ("GiB", 2**30), ("MiB", 2**20)


def results_markdown(content: dict[str, Any]) -> str:
    """Tables of everything that was measured, and lists of what was not."""
    blocks: list[Block] = [Paragraph(_conditions(content))]
    blocks += _configurations(content[CONFIGURED], content[CONDITIONS].get("idle_bytes"))
    blocks += _operators(content[OPERATORS])
    for name in ALLOCATORS:
        blocks += _allocator(name, content[name])
    blocks += _loss_curves(content[LOSS_CURVES])
    return markdown(blocks)


def _conditions(content: dict[str, Any]) -> str:
    found = content[CONDITIONS]
    packages = found.get("packages") or {}
    versions = [f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name)]
    if content["device"] != "cuda":
        return "A rehearsal on a CPU with small models: no GPU was measured. " + ", ".join(versions)
    card = f"{found.get('gpu', 'an unknown GPU')} with {size(found.get('gpu_bytes'))}"
    return ", ".join([card, f"driver {found.get('driver') or 'unknown'}", *versions])


def _configurations(entries: list[dict[str, Any]], idle_bytes: int | None) -> list[Block]:
    measured = [each for each in entries if each.get("measured")]
    others: dict[str, list[str]] = {}
    for each in entries:
        if "reason" in each:
            others.setdefault(f"{each['status']}, {each['reason']}", []).append(each["name"])
    blocks: list[Block] = [Heading("Planned and measured, GiB")]
    if measured:
        unit = _unit(measured)
        blocks += [
            Table(_HEAD, [_line(each, unit) for each in measured]),
            Heading(f"Planned less measured, {MIB[0]}"),
            Table(
                ["run", *PART_NAMES.values()], [_differences(each) for each in measured if each.get("plan")]
            ),
        ]
        blocks[0] = Heading(f"Planned and measured, {unit[0]}")
        blocks += _driver([each for each in measured if each["measured"].get("driver")], idle_bytes)
    if others:
        blocks += [
            Heading("Without a result"),
            Bullets([f"{', '.join(names)}: {why}" for why, names in others.items()]),
        ]
    return blocks


_HEAD = [
    "run",
    "what",
    "peak planned",
    "measured",
    "error",
    "reserved planned",
    "measured",
    "error",
    "retries",
    "s a step",
    "tokens a s",
]


def _unit(entries: list[dict[str, Any]]) -> tuple[str, int]:
    return GIB if max(each["measured"]["peak_bytes"] for each in entries) >= GIB[1] else MIB


def _line(entry: dict[str, Any], unit: tuple[str, int]) -> list[str]:
    plan, measured = entry.get("plan") or {}, entry["measured"]
    return [
        entry["name"],
        described(entry["settings"]),
        in_unit(plan.get("peak_bytes"), unit),
        in_unit(measured["peak_bytes"], unit),
        _signed(entry.get("error")),
        in_unit(plan.get("reserved_bytes"), unit),
        in_unit(measured["reserved_bytes"], unit),
        _signed(entry.get("reserved_error")),
        _or_dash(measured.get("num_alloc_retries")),
        _or_dash(measured.get("step_seconds")),
        _or_dash(measured.get("tokens_per_second")),
    ]


def described(settings: dict[str, Any]) -> str:
    """LLaMA-3.2-1B, galore, rank 256, 4 x 512 full, no checkpointing."""
    words = [settings["model"] + (f" of {settings['layers']} layers" if settings["layers"] else "")]
    words.append(settings["optimizer"] + (f", rank {settings['rank']}" if settings["rank"] else ""))
    words.append(f"{settings['batch']} x {settings['tokens']} {settings['rows']}")
    if settings["accumulate"] > 1:
        words.append(f"{settings['accumulate']} micro-batches")
    if not settings["checkpointing"]:
        words.append("no checkpointing")
    if settings["loss"] != "chunked":
        words.append(f"{settings['loss']} loss")
    if settings.get("card_gib"):
        words.append(f"as on {settings['card_gib']} GiB")
    return ", ".join([*words, *settings["also"]])


def _differences(entry: dict[str, Any]) -> list[str]:
    planned, measured = entry["plan"]["parts"], entry["measured"]["parts"]
    return [entry["name"], *(f"{(planned[part] - measured[part]) / MIB[1]:+,.1f}" for part in PARTS)]


def _driver(entries: list[dict[str, Any]], idle_bytes: int | None) -> list[Block]:
    rows = []
    for entry in entries:
        driver = entry["measured"]["driver"]
        in_use, reserved = driver["in_use_bytes"], driver["reserved_bytes"]
        whole = None if in_use is None or idle_bytes is None else in_use - idle_bytes
        beside = None if whole is None else whole - reserved
        rows.append(
            [
                entry["name"],
                in_unit(reserved, MIB),
                in_unit(driver["taken_since_context_bytes"] - reserved, MIB),
                in_unit(whole, MIB),
                in_unit(beside, MIB),
                in_unit(CONTEXT_BYTES, MIB),
            ]
        )
    head = [
        "run",
        "reserved",
        "beside it since the context",
        "the process in all",
        "beside the reserved",
        "assumed",
    ]
    return [Heading(f"What the driver says, {MIB[0]}"), Table(head, rows)] if rows else []


def _operators(found: dict[str, Any]) -> list[Block]:
    rows = [
        [
            row["operator"],
            row["what"],
            in_unit(row.get("planned_bytes"), MIB),
            in_unit(row.get("measured_bytes"), MIB),
            in_unit(row.get("kept_bytes"), MIB),
        ]
        for row in found["rows"]
        if "reason" not in row
    ]
    head = ["operator", "on", "planned", "measured", "of it kept"]
    failed = [f"{row['operator']} {row['what']}: {row['reason']}" for row in found["rows"] if "reason" in row]
    blocks: list[Block] = [Heading(f"Workspaces of operators, {MIB[0]}")]
    blocks += [Table(head, rows)] if rows else []
    return [*blocks, *([Bullets(failed)] if failed else []), *_without_result(found)]


def _allocator(name: str, found: dict[str, Any]) -> list[Block]:
    rows = [
        [
            str(row["seed"]),
            str(row["events"]),
            "none" if row["first_difference"] is None else f"event {row['first_difference']['event']}",
            in_unit(row["largest_allocated_difference_bytes"], MIB),
            in_unit(row["largest_reserved_difference_bytes"], MIB),
            in_unit(row["reserved_bytes"], MIB),
        ]
        for row in found["rows"]
    ]
    head = [
        "seed",
        "events",
        "first difference",
        "largest, allocated",
        "largest, reserved",
        "reserved at the end",
    ]
    title = "expandable segments" if name == ALLOCATORS[1] else "default settings"
    blocks: list[Block] = [Heading(f"The allocator's model with {title}, {MIB[0]}")]
    return [*blocks, *([Table(head, rows)] if rows else []), *_without_result(found)]


def _loss_curves(found: dict[str, Any]) -> list[Block]:
    rows = [
        [
            row["method"],
            f"{row['lr']:g}",
            str(len(row["losses"])),
            *(f"{loss:.3f}" for loss in (row["losses"][0], row["last_losses_mean"])),
            in_unit(row["peak_bytes"], GIB),
            _or_dash(row["tokens_per_second"]),
        ]
        for row in found["rows"]
    ]
    head = ["method", "lr", "steps", "first loss", "mean of the last tenth", "peak GiB", "tokens a s"]
    blocks: list[Block] = [Heading("Loss on text")]
    return [*blocks, *([Table(head, rows)] if rows else []), *_without_result(found)]


def _without_result(found: dict[str, Any]) -> list[Block]:
    return [] if found["status"] == MEASURED else [Paragraph(f"{found['status']}: {found.get('reason', '')}")]


def _signed(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:+.2f} %"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"
