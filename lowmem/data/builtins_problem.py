"""What the generated data sets share: a problem, and the rolls of a die it is drawn with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """`key` is what is asked about, whatever the wording; it decides the split and is never drawn twice."""

    key: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Rolls:
    """Whole numbers and choices from `random`, a function that returns numbers in [0, 1)."""

    random: Callable[[], float]

    def number(self, smallest: int, largest: int) -> int:
        """One of smallest ... largest, both included."""
        return smallest + int(self.random() * (largest - smallest + 1))

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.number(0, len(choices) - 1)]

    def some_of(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in the order drawn."""
        left = list(choices)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]
