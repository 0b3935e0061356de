"""Rows that cannot be used: stop, or leave them out and count them."""

from __future__ import annotations

from typing import Literal

from lowmem.errors import RecipeError

LISTED = 20  # problems shown before only a count follows
UNTRAINABLE_LIMIT = 0.10  # part of the rows that may end without a trained token, even when rows are skipped


class RowError(Exception):
    """Why one row cannot be used, in words; its place is added by whoever knows it."""


class BadRows:
    """Collects what is wrong with single rows, under `data.on_bad_row`."""

    def __init__(self, policy: Literal["error", "skip"], where: str):
        self.policy = policy
        self.where = where
        self.lines: list[str] = []
        self.untrainable: list[str] = []

    @property
    def count(self) -> int:
        return len(self.lines) + len(self.untrainable)

    def add(self, place: str, problem: str) -> None:
        self.lines.append(f"{place}: {problem}")

    def add_untrainable(self, place: str, problem: str) -> None:
        """A well-formed row without a trained token, or whose trained tokens could not be verified."""
        self.untrainable.append(f"{place}: {problem}")

    def stop_if_any(self) -> None:
        """Under `error`, raise RecipeError with the first problems and how many more there are."""
        if self.policy == "skip" or not self.count:
            return
        cure = "mend these rows"
        if self.untrainable:
            cure += ", change data.template, data.max_length or data.on_too_long"
        listed = _first(self.lines + self.untrainable)
        raise RecipeError([*listed, f"{self.where}: {cure}, or set data.on_bad_row: skip to leave them out."])

    def stop_if_too_many_untrainable(self, num_rows: int) -> None:
        """Raise RecipeError when more than a tenth of the well-formed rows teach nothing."""
        if len(self.untrainable) > UNTRAINABLE_LIMIT * num_rows:
            raise RecipeError(
                [
                    *_first(self.untrainable),
                    f"{self.where}: {len(self.untrainable)} of {num_rows} rows have no trained token; at "
                    f"most {UNTRAINABLE_LIMIT:.0%} may be left out, because more means that the settings do "
                    "not fit the data. See data.max_length, data.on_too_long, data.template and data.train_on.",
                ]
            )

    def stop_if_nothing_is_left(self, num_kept: int, dropped: int, max_length: int) -> None:
        """Raise RecipeError when no row can be trained on, and say where they went."""
        if num_kept:
            return
        problems = _first(self.lines + self.untrainable)
        if dropped:
            problems.append(
                f"{self.where}: {dropped} rows are longer than data.max_length ({max_length} tokens) and "
                "data.on_too_long is drop; raise the one or set the other to truncate_left or truncate_right."
            )
        raise RecipeError([*problems, f"{self.where}: no row is left to train on."])


def _first(lines: list[str]) -> list[str]:
    hidden = len(lines) - LISTED
    return lines[:LISTED] + ([f"... and {hidden} more bad rows"] if hidden > 0 else [])
