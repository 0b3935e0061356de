"""Memory-efficient optimizers in the style of `torch.optim`. Needs torch only.

    optimizer = lowmem.optim.GaLore(model.parameters(), lr=1e-4, rank=128)
    optimizer = lowmem.build_optimizer(model, "galore", lr=1e-4, rank=128)    # picks the matrices by module

Read in this order: rule.py (the contract), rules/adam.py, low_rank.py, engine.py with optimizer_state.py,
algorithms/galore.py.
"""

from __future__ import annotations

from lowmem.optim.algorithms.adafactor import Adafactor
from lowmem.optim.algorithms.adamw import AdamW
from lowmem.optim.algorithms.adamw8bit import AdamW8bit
from lowmem.optim.algorithms.apollo import Apollo
from lowmem.optim.algorithms.block_adam import BlockAdam
from lowmem.optim.algorithms.dct_adamw import DctAdamW
from lowmem.optim.algorithms.fira import Fira
from lowmem.optim.algorithms.frugal import FRUGAL
from lowmem.optim.algorithms.galore import GaLore
from lowmem.optim.algorithms.lion8bit import Lion8bit
from lowmem.optim.algorithms.muon import Muon
from lowmem.optim.algorithms.q_galore import QGaLore
from lowmem.optim.algorithms.sgd import SGD
from lowmem.optim.algorithms.sgd_sai import SGDSaI
from lowmem.optim.algorithms.sinkgd import SinkGD
from lowmem.optim.algorithms.swan import Swan
from lowmem.optim.build import build_optimizer
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.registry import OPTIMIZERS

__all__ = [
    "FRUGAL",
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "Apollo",
    "BlockAdam",
    "DctAdamW",
    "Fira",
    "GaLore",
    "Lion8bit",
    "LowMemOptimizer",
    "Muon",
    "QGaLore",
    "SGDSaI",
    "SinkGD",
    "Swan",
    "build_optimizer",
]
