"""How state is stored: a part of docs/optimizers/README.md."""

from __future__ import annotations

import torch
from reference_pages.markdown import table

from lowmem.optim.rule import Slot
from lowmem.optim.storage import FORMATS, codec_for

TEXT = """
## How state is stored

An optimizer with the setting `storage` takes a format for each role that its state has: `moment` (running means of
gradients), `variance` (running means of their squares) and `basis` (what gradients are projected on). So does a
`fallback`.

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

KEPT_AS = {
    "param": "the weight's dtype",
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "codes of a square or fourth power, a float32 scale for each 256 values",
    "int4": "two codes a byte, a bfloat16 scale and a zero for each 128 values",
}


def storage_section() -> list[str]:
    """What each format takes, counted on a slot of a million values, and how it is kept."""
    rows = []
    for chosen, kept in KEPT_AS.items():
        roles = [role for role, formats in FORMATS.items() if chosen in formats]
        codec = codec_for("slot", Slot((1 << 20,), roles[-1]), {roles[-1]: chosen}, torch.bfloat16)
        size = "the weight's" if chosen == "param" else f"{codec.nbytes() / (1 << 20):.4g}"
        rows.append((f"`{chosen}`", ", ".join(roles), size, kept))
    lines = "\n".join(table(("format", "roles", "bytes a value", "kept as"), rows))
    return TEXT.strip().replace("STORAGE_TABLE", lines).split("\n")
