"""Hugging Face models, data and training around the optimizers.

`lowmem.hf.optimizer(name, lr=...)` is what a `transformers.Trainer` script needs. Importing this package
loads nothing heavy; each part is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optimizer"]


def __getattr__(name: str) -> Any:
    if name != "optimizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("lowmem.hf.trainer_override").optimizer
