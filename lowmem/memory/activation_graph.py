"""Tensors that are only sizes, and the graph of operators between them that autograd would keep."""

from __future__ import annotations

from typing import Any

from lowmem.memory.ledger import rounded


class Block:
    """One storage, by number: it writes into `changes` when it is taken, and when its last reference goes."""

    __slots__ = ("_changes", "index", "nbytes")

    def __init__(self, changes: list[tuple[int, int]], index: int, nbytes: int):
        self._changes = changes
        self.index = index
        self.nbytes = rounded(nbytes)
        self._changes.append((self.index, self.nbytes))

    def __del__(self) -> None:
        self._changes.append((self.index, -self.nbytes))


class Rows:
    """What a gradient by rows is made of: blocks that are held until it is used, and the bytes of making a few rows
    and of the rows themselves."""

    __slots__ = ("held", "making", "nbytes")

    def __init__(self, held: list[Block | None], making: int, nbytes: int):
        self.held, self.making, self.nbytes = held, making, nbytes

    def add(self, other: Rows) -> None:
        """The parts of another use of the weight: its rows are made beside these."""
        self.held += other.held
        self.making = max(self.making, self.nbytes + other.making)


class Value:
    """A tensor: its elements, their size, the storage behind it (None for weights, which are counted
    elsewhere) and the node that takes its gradient (None where none is wanted). As a gradient it may be a view,
    to which autograd never adds in place, or by rows, without values of its own."""

    __slots__ = ("block", "is_view", "itemsize", "node", "numel", "rows")

    def __init__(
        self,
        numel: int,
        itemsize: int,
        block: Block | None,
        node: Node | None = None,
        *,
        is_view: bool = False,
        rows: Rows | None = None,
    ):
        self.numel, self.itemsize, self.block, self.node = numel, itemsize, block, node
        self.is_view = is_view
        self.rows = rows

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


class Node:
    """One operator in the graph. `backward(node)` reads `node.gradient` and returns one gradient an input."""

    __slots__ = ("backward", "gradient", "inputs", "saved")

    def __init__(self, inputs: tuple[Node | None, ...], saved: tuple[Block | None, ...], backward: Any):
        self.inputs, self.saved, self.backward = inputs, saved, backward
        self.gradient: Value | None = None


class Leaf(Node):
    """Where gradients end: the weight of that name, or the input of a checkpointed layer, which has none.

    `awaited` are those still to come.
    """

    __slots__ = ("awaited", "weight")

    def __init__(self, weight: str | None = None):
        super().__init__((), (), None)
        self.weight = weight
        self.awaited = 0
