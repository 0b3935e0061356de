"""Hugging Face models, data and training around the optimizers.

`lowmem.hf.optimizer(name, lr=...)` is what a `transformers.Trainer` script needs;
`lowmem.hf.LowMemTrainerMixin` gives its Trainer the ways to make a step that hold fewer gradients. Importing
this package loads nothing heavy; each part is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "LowMemTrainerMixin": "lowmem.hf.trainer_mixin",
    "optimizer": "lowmem.hf.trainer_override",
}
__all__ = ["LowMemTrainerMixin", "optimizer"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
