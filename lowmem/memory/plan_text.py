"""A memory plan for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from lowmem.memory.cards import CONTEXT_BYTES, USABLE
from lowmem.memory.ledger import PARTS
from lowmem.memory.wording import BASELINE_NAMES, PART_NAMES, in_unit, size, unit_for

WIDTH, NAME, NUMBER = 80, 18, 10
PHASE_NAMES = {"forward": "forward", "backward": "backward", "optimizer": "the optimizer's step"}
EXPLAINED = 12


def plan_text(document: dict[str, Any], *, title: str, explain: bool = False, bar: str = "#") -> str:
    """The plan as lines: parts with bars, the moment of the peak, whether it fits, the baselines."""
    blocks = [
        _wrapped(title),
        _parts(document, bar),
        _fits(document),
        _steps(document),
        _processes(document),
        _largest(document) if explain else [],
        _baselines(document, bar),
        _checkpoint(document),
        _changes(document),
        [line for note in document["notes"] for line in _wrapped(f"Note: {note}.")],
        _wrapped(how(document)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def how(document: dict[str, Any]) -> str:
    """How the numbers came about, in a sentence or two."""
    if "processes" in document:
        return "Formulas for this family of models; weights, gradients and state are held equal to those of processes."
    if document["measured_by"] == "formula":
        return "Formulas for this family of models; without --formula the steps themselves are simulated."
    return (
        f"Simulated: {document['steps']} training steps and evaluations of this recipe's own code on tensors without "
        "contents, each operator counted in the blocks of CUDA's allocator. Workspaces of CUDA's libraries are "
        "allowances; no GPU was used."
    )


def _parts(document: dict[str, Any], bar: str) -> list[str]:
    peak = document["peak_bytes"]
    unit = unit_for(peak)
    lines = [f"{unit[0]:<{NAME}}"]
    for part in PARTS:
        nbytes = document["parts"][part]
        lines.append(
            f"{PART_NAMES[part]:<{NAME}}{in_unit(nbytes, unit):>{NUMBER}}  {_bar(nbytes, peak, bar)}".rstrip()
        )
    lines.append(f"{'peak':<{NAME}}{in_unit(peak, unit):>{NUMBER}}  {where(document)}".rstrip())
    if document["reserved_bytes"] is not None:
        lines.append(
            f"{'reserved':<{NAME}}{in_unit(document['reserved_bytes'], unit):>{NUMBER}}  by the allocator"
        )
    if pinned := document["pinned_host_bytes"]:
        lines.append(
            f"{'on the host':<{NAME}}{in_unit(pinned, unit):>{NUMBER}}  pinned, for offloaded activations"
        )
    return [line[:WIDTH] if line.startswith(unit[0]) else line for line in lines]


def where(document: dict[str, Any]) -> str:
    """The moment of the peak in words."""
    peak = document["peak"]
    phase = PHASE_NAMES.get(peak["phase"] or "", "between the phases")
    place = f", {peak['place']}" if peak["place"] else ""
    return f"{peak['step']}, {phase}{place}"


def _fits(document: dict[str, Any]) -> list[str]:
    if document["gpu_bytes"] is None:
        return ["No card named: --gpu 12GiB or --gpu rtx4070 says whether it fits."]
    needed = document["reserved_bytes"] + CONTEXT_BYTES
    usable = int(USABLE * document["gpu_bytes"])
    name = document["gpu"]
    verdict = "fits" if document["fits"] else "DOES NOT FIT"
    margin = document["margin_bytes"]
    spare = f"{size(margin)} to spare" if margin >= 0 else f"{size(-margin)} too much"
    return _wrapped(
        f"{verdict}: {size(needed)} reserved and CUDA context, {size(usable)} usable of {name} "
        f"({size(document['gpu_bytes'])}); {spare}."
    )


def _steps(document: dict[str, Any]) -> list[str]:
    steps = [f"{step['step']} {size(step['peak_bytes'])}" for step in document["steps_planned"]]
    return _wrapped("Peaks: " + ", ".join(steps) + ".") if len(steps) > 1 else []


def _processes(document: dict[str, Any]) -> list[str]:
    found = document.get("processes")
    if found is None:
        return []
    lines = [f"The fullest of {found['world']} processes under {found['strategy']}."]
    if found["strategy"] != "ddp":
        lines.append(f"Optimizer state {_from_to(found['optimizer_state_bytes'])} in each.")
    if matrices := found["matrices_updated"]["most"]:
        least = found["matrices_updated"]["least"]
        lines.append(f"Each updates {least} to {matrices} matrices whole, for all.")
    if by_rows := found["matrices_by_rows"]:
        lines.append(f"{by_rows} matrices are updated where their rows are.")
    sent = found["sent_bytes_a_step"]
    lines.append(f"In a step each sends {size(sent['by_the_strategy'])} for {found['strategy']} itself")
    lines[-1] += (
        f" and {_from_to(sent['for_matrices'])} for matrices." if sent["for_matrices"]["most"] else "."
    )
    return _wrapped(" ".join(lines))


def _from_to(nbytes: dict[str, int]) -> str:
    least, most = size(nbytes["least"]), size(nbytes["most"])
    return most if least == most else f"{least} to {most}"


def _largest(document: dict[str, Any]) -> list[str]:
    lines = ["Alive at the peak, largest first:"]
    for held in document["largest"][:EXPLAINED]:
        count = f"{held['count']} x " if held["count"] > 1 else ""
        lines.append(f"  {size(held['nbytes']):>11}  {PART_NAMES[held['part']]:<16}{count}{held['what']}")
    rest = document["largest"][EXPLAINED:]
    if rest:
        lines.append(
            f"  {size(sum(held['nbytes'] for held in rest)):>11}  in {len(rest)} more kinds of tensors"
        )
    return lines


def _baselines(document: dict[str, Any], bar: str) -> list[str]:
    known = {name: one for name, one in document["baselines"].items() if one is not None}
    lines = []
    if known:
        longest = max(document["peak_bytes"], *(one["peak_bytes"] for one in known.values()))
        unit = unit_for(longest)
        lines.append(f"{'same work with':<{NAME + 4}}{unit[0]:>{NUMBER}}  source")
        rows = {"this plan": document, **{BASELINE_NAMES[name]: one for name, one in known.items()}}
        for name, one in rows.items():
            source = "planned" if one is document else one["source"]
            peak = in_unit(one["peak_bytes"], unit)
            lines.append(
                f"{name:<{NAME + 4}}{peak:>{NUMBER}}  {source:<10}{_bar(one['peak_bytes'], longest, bar)}"
            )
    for name, reason in document["not_measured"].items():
        lines += _wrapped(f"{BASELINE_NAMES.get(name, name)}: {reason}.")
    return lines


def _checkpoint(document: dict[str, Any]) -> list[str]:
    checkpoint = document["checkpoint"]
    if checkpoint is None:
        return []
    return _wrapped(
        f"A checkpoint takes {size(checkpoint['disk_bytes'])} on the disk and, while it is written from a GPU, up to "
        f"{size(checkpoint['host_bytes'])} of the host's memory; the final model takes "
        f"{size(checkpoint['final_model_bytes'])}."
    )


def _changes(document: dict[str, Any]) -> list[str]:
    changes = document["changes_that_fit"]
    if document["fits"] is not False:
        return []
    if not changes:
        what = "number of processes" if "processes" in document else "single change and no combination"
        return _wrapped(f"No {what} known here makes it fit this card.")
    lines = ["Would fit (by formula):"]
    for change in changes:
        lines.append(f"  {size(change['peak_bytes']):>11}  {' '.join(change['overrides'])}")
    return lines


def _bar(nbytes: int, whole: int, bar: str) -> str:
    return bar * round((WIDTH - NAME - NUMBER - 16) * nbytes / whole)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)
