"""What becomes of a weight's gradient when a micro-batch has completed it, in bytes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.memory.ledger import Part


@dataclass(frozen=True)
class Arrival:
    """What happens to the gradient of one weight, in the order of the fields."""

    adds: bool = False
    """Whether it is first of all added to that of an earlier micro-batch, which takes its place in what follows."""
    state: int = 0
    """Optimizer state that is made for it."""
    beside: int = 0
    """Temporaries beside it, or beside what it is made of where it is by rows."""
    left: int = 0
    """Of those, what is there while more rows are made."""
    stays: bool = False
    """Whether it is there until the step ends."""
    projected: int = 0
    """What is kept of it, in the rule's subspace."""
    after: int = 0
    """Temporaries when it is gone."""

    def changes(self, nbytes: int, making: int) -> list[tuple[Part, int]]:
        """What memory takes and gives back from its arrival on; itself it is `nbytes`, or some rows of it `making`."""
        gone = ("gradients", -nbytes)
        beside = max(self.beside, self.left + making)
        found: list[tuple[Part, int]] = [
            *([gone] if self.adds else ()),
            ("optimizer_state", self.state),
            ("temporary", beside),
            ("temporary", -beside),
            *(() if self.stays else [gone]),
            ("gradients", self.projected),
            ("temporary", self.after),
            ("temporary", -self.after),
        ]
        return [(part, change) for part, change in found if change]


@dataclass(frozen=True)
class Arrivals:
    """Of all weights of a model: by the name of a layer's module, and of those without a name here."""

    others: Arrival
    named: tuple[tuple[str, Arrival], ...] = ()

    def of(self, name: str) -> Arrival:
        return next((arrival for known, arrival in self.named if known == name), self.others)


STAY = Arrivals(Arrival(stays=True))
"""Gradients stay until the step ends."""

ADD = Arrivals(Arrival(adds=True, stays=True))
"""They are added to those of an earlier micro-batch."""

GO = Arrivals(Arrival())
"""They are used and freed at once, with nothing beside them."""
