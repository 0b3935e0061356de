"""Hugging Face models, data and training around the optimizers.

`lowmem.hf.optimizer(name, lr=...)` is what a `transformers.Trainer` script needs;
`lowmem.hf.LowMemTrainerMixin` gives its Trainer the ways to make a step that hold fewer gradients, and
`from_pretrained(..., quantization_config=lowmem.hf.Int8Config())` int8 weights that it trains. Importing
this package loads nothing heavy; each part is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lowmem.hf.int8_registration import register_with_transformers

_LAZY = {
    "Int8Config": "lowmem.hf.int8_config",
    "LowMemTrainerMixin": "lowmem.hf.trainer_mixin",
    "optimizer": "lowmem.hf.trainer_override",
}
__all__ = ["Int8Config", "LowMemTrainerMixin", "optimizer"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


register_with_transformers()
