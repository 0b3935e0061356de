"""No update at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowmem.optim.rule import Rule


@dataclass(frozen=True)
class Rest(Rule):
    """The weight stays as it is, without decay, and nothing is asked of its gradient, which need not be made."""

    needs_gradient: ClassVar[bool] = False
