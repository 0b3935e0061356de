"""What becomes of a weight's gradient when a micro-batch has completed it, in bytes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.memory.ledger import Part


@dataclass(frozen=True)
class Arrival:
    """What happens to the gradient of one weight, in the order of the fields."""

    state: int = 0
    """Optimizer state that is made for it."""
    beside: int = 0
    """Temporaries beside it."""
    stays: bool = False
    """Whether it is there until the step ends; else it is added to an earlier one, or was all used."""
    projected: int = 0
    """What is kept of it, in the rule's subspace."""
    frees_earlier: bool = False
    """Whether the sum of earlier micro-batches' gradients goes with it."""

    def changes(self, nbytes: int) -> list[tuple[Part, int]]:
        """What memory takes and gives back from its arrival until it is gone; itself it is `nbytes`."""
        found: list[tuple[Part, int]] = [
            ("optimizer_state", self.state),
            ("temporary", self.beside),
            ("temporary", -self.beside),
            ("gradients", self.projected),
        ]
        if not self.stays:
            found.append(("gradients", -2 * nbytes if self.frees_earlier else -nbytes))
        return found


@dataclass(frozen=True)
class Arrivals:
    """Of all weights of a model: by the name of a layer's module, and of those without a name here."""

    others: Arrival
    named: tuple[tuple[str, Arrival], ...] = ()

    def of(self, name: str) -> Arrival:
        return next((arrival for known, arrival in self.named if known == name), self.others)


STAY = Arrivals(Arrival(stays=True))
"""Gradients stay until the step ends."""

GO = Arrivals(Arrival())
"""Gradients are added to those of an earlier micro-batch, or used and freed at once."""
