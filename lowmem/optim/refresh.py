"""When a basis is fitted anew."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """At the first step and every `gap` steps after it: steps 1, 1 + gap, 1 + 2 gap, ..."""

    gap: int

    def is_due(self, step: int) -> bool:
        return (step - 1) % self.gap == 0

    def steps_since(self, step: int) -> int:
        """Updates made with the current basis, this one included."""
        return (step - 1) % self.gap + 1
