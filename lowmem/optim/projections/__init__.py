"""Ways to choose the subspace a low-rank rule works in. Each gives an orthonormal basis."""

from __future__ import annotations

from lowmem.optim.projections.cosine import Cosine
from lowmem.optim.projections.projection import Projection
from lowmem.optim.projections.random import Random
from lowmem.optim.projections.subspace import Subspace
from lowmem.optim.projections.svd import Svd

PROJECTIONS: dict[str, Projection] = {
    "subspace": Subspace(),
    "svd": Svd(),
    "random": Random(),
    "dct": Cosine(),
}
"""By the name a recipe uses."""
