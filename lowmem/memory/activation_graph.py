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


class Value:
    """A tensor: its elements, their size, the storage behind it (None for weights, which are counted
    elsewhere) and the node that takes its gradient (None where none is wanted). As a gradient it may be a view,
    to which autograd never adds in place."""

    __slots__ = ("block", "is_view", "itemsize", "node", "numel")

    def __init__(
        self,
        numel: int,
        itemsize: int,
        block: Block | None,
        node: Node | None = None,
        *,
        is_view: bool = False,
    ):
        self.numel, self.itemsize, self.block, self.node = numel, itemsize, block, node
        self.is_view = is_view

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
