"""Let transformers know of int8 weights once both it and `lowmem.hf` are imported, in whichever order.

Importing transformers takes seconds, so `lowmem.hf` does not do it for those who never load a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

LOADS_MODELS = "transformers.modeling_utils"
REGISTERS = "lowmem.hf.quantizer"


def register_with_transformers() -> None:
    """Register the quantizer now, or right after transformers' loading code has been imported."""
    if LOADS_MODELS in sys.modules:
        import_module(REGISTERS)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds one module as everybody else would, and has it followed by another; then it goes away."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LOADS_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                import_module(REGISTERS)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
