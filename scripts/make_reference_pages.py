"""Write the pages of docs/ that come from the code: recipe keys, optimizers and their settings, executions.

    python scripts/make_reference_pages.py

A test holds the pages equal to what this script gives.
"""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import torch

from lowmem.cli.schema_text import schema_document
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.rule import Slot
from lowmem.optim.storage import FORMATS, codec_for

DOCS = Path(__file__).parent.parent / "docs"


def as_code(value: object) -> str:
    """A default as it stands in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return "`" + (words[value] if isinstance(value, (bool, type(None))) else str(value)) + "`"  # type: ignore[index]


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def recipe_page() -> str:
    """Every key of a recipe as a table, one table a section."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made by `make docs` from `lowmem/recipe/schema.py`. `lowmem show --schema` prints the same as YAML. A key",
        "that is not here does not exist. The settings of an optimizer stand directly under `optimizer:`; see",
        "[optimizers.md](optimizers.md).",
    ]
    section = None
    for entry in schema_document()["keys"]:
        top = entry["key"].split(".")[0]
        if top != section:
            section = top
            lines += ["", f"## {top}", "", "| key | what | default | meaning |", "|---|---|---|---|"]
        default = "required" if entry["required"] else as_code(entry["default"])
        lines.append(row(f"`{entry['key']}`", entry["type"], default, entry["doc"]))
    return "\n".join([*lines, ""])


STORAGE = """
## How state is stored

Every optimizer takes `storage`, the format of each role that its state has: `moment` (running means of gradients),
`variance` (running means of their squares) and `basis` (what gradients are projected on). So does `fallback`.

```yaml
optimizer:
  name: galore
  lr: 1.0e-4
  storage: {moment: int8, variance: int8, basis: int4}
  fallback: {name: adamw, storage: {moment: int8, variance: int8}}    # embeddings, head, norms
```

STORAGE_TABLE

A rule computes in float32 whatever the format, a few megabytes at a time; checkpoints hold the codes, and a resumed
run goes on with the same bits. Moments and variances in bfloat16 and int8 are rounded stochastically, so that a change
far below their last bit is kept in the mean, or to nearest with `rounding: nearest`. Bases are rounded to nearest.

- **int8 for moments and variances** follows Adam in float closely; `tests/optim/test_adam_8bit.py` holds how closely,
  and that it does so more than other codes of eight bits. On a CPU such a step takes several times as long as one in
  float, since no kernel makes it in one pass.
- **int4 for bases** is for low-rank optimizers with bases that are replaced after some hundred steps. The vectors stay
  nearly orthonormal; `tests/numerics/test_int4_groups.py` holds how nearly.
- **fp32** is for weights in bfloat16 whose moments must not be rounded at all.
"""


def storage_section() -> list[str]:
    """What each format takes, counted on a slot of a million values, and how it is kept."""
    how = {
        "param": "the weight's dtype",
        "fp32": "float32",
        "bf16": "bfloat16",
        "int8": "codes of a square or fourth power, a float32 scale for each 256 values",
        "int4": "two codes a byte, a bfloat16 scale and a zero for each 128 values",
    }
    table = ["| format | roles | bytes a value | kept as |", "|---|---|---|---|"]
    for chosen, kept in how.items():
        roles = [role for role, formats in FORMATS.items() if chosen in formats]
        codec = codec_for("slot", Slot((1 << 20,), roles[-1]), {roles[-1]: chosen}, torch.bfloat16)
        size = "the weight's" if chosen == "param" else f"{codec.nbytes() / (1 << 20):.4g}"
        table.append(row(f"`{chosen}`", ", ".join(roles), size, kept))
    return STORAGE.strip().replace("STORAGE_TABLE", "\n".join(table)).split("\n")


def optimizer_page() -> str:
    """Every optimizer: its documentation and its settings."""
    lines = [
        "# The optimizers",
        "",
        "Made by `make docs` from `lowmem/optim/algorithms/`.",
        "",
        *storage_section(),
    ]
    table = schema_document()["optimizers"]
    for name in OPTIMIZERS:
        owner = optimizer_class(name)
        lines += ["", f"## {name}", "", f"`lowmem.optim.{owner.__name__}`", "", "```text"]
        lines += [inspect.getdoc(owner) or "", "```", "", "| setting | default | meaning |", "|---|---|---|"]
        for setting, about in table[name]["settings"].items():
            choices = f" ({', '.join(about['choices'])})" if "choices" in about else ""
            lines.append(row(f"`{setting}`", as_code(about["default"]), about["doc"] + choices))
    return "\n".join([*lines, ""])


PAGES = {
    DOCS / "recipe.md": recipe_page,
    DOCS / "optimizers.md": optimizer_page,
    DOCS / "execution.md": runpy.run_path(str(Path(__file__).parent / "execution_page.py"))["execution_page"],
}

if __name__ == "__main__":
    for path, make in PAGES.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(make())
        print(f"wrote {path}")
