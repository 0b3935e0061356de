"""lowmem: fine-tune language models with every parameter trained on GPUs too small for AdamW.

Importing this package imports nothing heavy; `lowmem.optim` needs torch only, `lowmem.hf` needs
transformers. See README.md for the three ways to use it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "optim": ("lowmem.optim", None),
    "hf": ("lowmem.hf", None),
    "build_optimizer": ("lowmem.optim", "build_optimizer"),
    "load_recipe": ("lowmem.recipe.load", "load_recipe"),
    "plan": ("lowmem.hf.plan", "plan"),
}
__all__ = ["__version__", "build_optimizer", "hf", "load_recipe", "optim", "plan"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)
