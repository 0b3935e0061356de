"""The optimizers by name. A new one is a file in `algorithms/` and a line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lowmem.optim.settings import did_you_mean

if TYPE_CHECKING:
    from lowmem.optim.engine import LowMemOptimizer

OPTIMIZERS = {
    "adamw": "lowmem.optim.algorithms.adamw:AdamW",
    "sgd": "lowmem.optim.algorithms.sgd:SGD",
    "sgd_sai": "lowmem.optim.algorithms.sgd_sai:SGDSaI",
    "adafactor": "lowmem.optim.algorithms.adafactor:Adafactor",
    "sinkgd": "lowmem.optim.algorithms.sinkgd:SinkGD",
    "swan": "lowmem.optim.algorithms.swan:Swan",
    "muon": "lowmem.optim.algorithms.muon:Muon",
    "galore": "lowmem.optim.algorithms.galore:GaLore",
    "q_galore": "lowmem.optim.algorithms.q_galore:QGaLore",
    "fira": "lowmem.optim.algorithms.fira:Fira",
    "apollo": "lowmem.optim.algorithms.apollo:Apollo",
    "dct_adamw": "lowmem.optim.algorithms.dct_adamw:DctAdamW",
    "frugal": "lowmem.optim.algorithms.frugal:FRUGAL",
    "block_adam": "lowmem.optim.algorithms.block_adam:BlockAdam",
    "adamw8bit": "lowmem.optim.algorithms.adamw8bit:AdamW8bit",
    "lion8bit": "lowmem.optim.algorithms.lion8bit:Lion8bit",
}


def optimizer_class(name: str) -> type[LowMemOptimizer]:
    """The optimizer called `name`; ValueError with the nearest name otherwise."""
    if name not in OPTIMIZERS:
        raise ValueError(
            f"{name!r} is not an optimizer{did_you_mean(name, OPTIMIZERS)} Known: {', '.join(OPTIMIZERS)}"
        )
    module, attribute = OPTIMIZERS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
