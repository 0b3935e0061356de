"""Where something was written, and the list of everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.errors import RecipeError

LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Place:
    """A line of a recipe file, or (line None) one `a.b=c` of the command line."""

    source: str
    line: int | None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    @property
    def is_command_line(self) -> bool:
        return self.line is None


class Problems:
    """Collects problems so that a person sees all of them at once, in the order of the file."""

    def __init__(self) -> None:
        self._found: list[tuple[Place, str]] = []

    def add(self, place: Place, message: str) -> None:
        self._found.append((place, message))

    def __len__(self) -> int:
        return len(self._found)

    def lines(self) -> list[str]:
        def position(found: tuple[Place, str]) -> tuple[bool, int]:
            return found[0].is_command_line, found[0].line or 0

        return [f"{place}: {message}" for place, message in sorted(self._found, key=position)]

    def raise_if_any(self) -> None:
        if self._found:
            raise RecipeError(self.lines())


def shown(text: str) -> str:
    """`text` fit for one line of a terminal: nothing unprintable, not too long."""
    printable = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text[: LONGEST_SHOWN + 1]
    )
    return printable if len(printable) <= LONGEST_SHOWN else printable[:LONGEST_SHOWN] + "..."
