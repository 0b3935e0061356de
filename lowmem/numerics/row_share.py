"""Which rows of a matrix are here, and sums over those that are not."""

from __future__ import annotations

from torch import Tensor


class RowShare:
    """All rows of the matrix, so that nothing is to be added: what a single process has.

    Where several processes have some rows each, another share takes its place, and all of them ask for the same sums
    in the same order. So a rule whose rows need little of each other is written once.
    """

    def sum_(self, x: Tensor) -> Tensor:
        """`x`, made of the rows that are here, becomes the sum of what everyone has made; in place."""
        return x

    def max_(self, x: Tensor) -> Tensor:
        """The same with the largest of each value."""
        return x

    def of_all(self, rows: int) -> int:
        """How many rows the whole matrix has, of which `rows` are here; of a share of values, how many values."""
        return rows


ALL_ROWS = RowShare()
