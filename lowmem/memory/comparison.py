"""comparison.json: several optimizers on the same work; written, read, and made into a report.

Everything that is shown is made from the document alone, so a report can be written again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import FaultError, RecipeError
from lowmem.memory.comparison_content import comparison_blocks, measured_of, table
from lowmem.memory.comparison_plots import plot_losses, plot_peaks, plot_seconds
from lowmem.memory.document import HEADLINE
from lowmem.memory.html import html
from lowmem.memory.markdown import markdown
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import Recipe

__all__ = ["Method", "comparison_document", "is_comparison", "read_comparison", "table", "write_comparison"]

FILE = "comparison.json"
RECIPE = "recipe"  # the method that is the recipe as it is written
TORCH_ADAMWS = ("adamw_fused", "adamw_foreach", "adamw_fused_backward")
PICTURES = ("memory.png", "loss.png", "seconds.png")


@dataclass(frozen=True)
class Method:
    """One optimizer of a comparison: `recipe` holds it, or `torch_variant` names one of torch's AdamWs."""

    name: str
    recipe: Recipe
    torch_variant: str | None = None

    @property
    def title(self) -> str:
        return f"{self.recipe.optimizer.name} (recipe)" if self.name == RECIPE else self.name

    def settings(self) -> dict[str, Any]:
        """Every setting that the optimizer runs with, defaults too."""
        chosen = self.recipe.optimizer
        if self.torch_variant is not None:
            return dict(chosen.settings)
        known = optimizer_table()[chosen.name]["settings"]
        defaults = {name: entry["default"] for name, entry in known.items()}
        every = {**defaults, "seed": self.recipe.train.seed, **chosen.settings}
        others = {"fallback": chosen.fallback, "head": chosen.head, "groups": chosen.groups}
        return {**every, "target": list(chosen.target), **others}


def comparison_document(
    recipe_name: str,
    found: Sequence[tuple[Method, Mapping[str, Any]]],
    *,
    steps: int,
    watched_steps: Sequence[int],
    timed_steps: Sequence[int],
    sequence_length: int,
) -> dict[str, Any]:
    """The content of comparison.json. `found` is what each method's process wrote, or {"reason": why not}.

    Bytes, seconds, and nats per trained token; steps are counted from 1. What is unknown is null. The
    saving is against adamw_fused where that was measured, and negative where a method needs more.
    """
    measured = [one for _, one in found if "reason" not in one]
    adamw = next(
        (one for method, one in found if method.torch_variant == HEADLINE and "reason" not in one), None
    )
    first = measured[0] if measured else {"conditions": {}, "environment": None, "batch_checksums": []}
    recipe = found[0][0].recipe
    train = recipe.train
    return {
        "source": "measured",
        "recipe": recipe_name,
        "steps": steps,
        "watched_steps": list(watched_steps),
        "timed_steps": list(timed_steps),
        "conditions": {
            "model": recipe.model.name_or_path,
            "dtype": recipe.model.dtype,
            "lora": recipe.lora is not None,
            "sequence_length": sequence_length,
            "per_device_batch_size": train.per_device_batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "packing": recipe.data.packing,
            "activation_checkpointing": train.activation_checkpointing,
            "loss": train.loss,
            "attn": recipe.model.attn,
            "max_grad_norm": train.max_grad_norm,
            "lr_scheduler": train.lr_scheduler.name,
            "seed": train.seed,
            **first["conditions"],
        },
        "environment": first["environment"],
        "methods": [_entry(method, one, adamw) for method, one in found],
    }


MEASURED = (
    "peak_bytes", "steady_peak_bytes", "reserved_bytes", "parts", "measured_by", "measured_steps", "warnings",
    "optimizer_state_bytes", "step_seconds", "timed_seconds", "tokens_per_second", "tokens", "losses",
    "losses_compare", "held_out_loss", "held_out_tokens", "batch_checksums", "notes",
)  # fmt: skip


def _entry(method: Method, found: Mapping[str, Any], adamw: Mapping[str, Any] | None) -> dict[str, Any]:
    saved = None
    if adamw is not None and "reason" not in found:
        saved = adamw["peak_bytes"] - found["peak_bytes"]
    return {
        "method": method.name,
        "title": method.title,
        "optimizer": method.torch_variant or method.recipe.optimizer.name,
        "lr": method.recipe.optimizer.settings["lr"],
        "settings": method.settings(),
        "reason": found.get("reason"),
        **{name: found.get(name) for name in MEASURED},
        "saved_bytes": saved,
        "saved_fraction": None if adamw is None or saved is None else saved / adamw["peak_bytes"],
        "versions": (found.get("environment") or {}).get("packages"),
    }


def is_comparison(folder: str | Path) -> bool:
    return (Path(folder) / FILE).is_file()


def read_comparison(folder: str | Path) -> dict[str, Any]:
    """comparison.json of `folder`. Raises RecipeError when it is torn, or none of lowmem's."""
    file = Path(folder) / FILE
    mend = "Run lowmem compare again."
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}. {mend}") from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"{file} is not JSON (line {error.lineno}: {error.msg}). {mend}") from error
    if not isinstance(document, dict) or not _has_the_shape(document):
        raise RecipeError(f"{file} is not a comparison of lowmem. {mend}")
    return document


def _has_the_shape(document: dict[str, Any]) -> bool:
    methods = document.get("methods")
    needed = {"method", "title", "lr", "settings", "reason", *MEASURED}
    return (
        {"recipe", "steps", "watched_steps", "timed_steps", "conditions", "environment"} <= document.keys()
        and isinstance(methods, list)
        and bool(methods)
        and all(isinstance(entry, dict) and needed <= entry.keys() for entry in methods)
    )


def write_comparison(document: dict[str, Any], folder: Path) -> Path:
    """comparison.json, comparison.md, report.html and plots/*.png; returns the path of comparison.md.

    Raises FaultError where the folder cannot be written.
    """
    plots = folder / "plots"
    try:
        plots.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name in PICTURES:
            (plots / name).unlink(missing_ok=True)
        measured = measured_of(document)
        if measured:
            plot_peaks(measured, plots / "memory.png")
            plot_losses([entry for entry in measured if entry["losses_compare"]], plots / "loss.png")
            plot_seconds(measured, plots / "seconds.png")
        blocks = comparison_blocks(document, {name for name in PICTURES if (plots / name).is_file()})
        (folder / "report.html").write_text(html(blocks, folder), encoding="utf-8")
        (folder / "comparison.md").write_text(markdown(blocks), encoding="utf-8")
    except OSError as error:
        raise FaultError(f"the comparison cannot be written to {folder}: {error.strerror}.") from error
    return folder / "comparison.md"
