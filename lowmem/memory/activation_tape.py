"""A training step on tensors that are only sizes: what autograd saves, makes and drops, in order.

The formulas of `activation_formulas` call operators on a `Tape` as a model's forward calls PyTorch's. Each
takes the bytes of its result, remembers what its gradient will need, and makes the gradients when `backward`
comes by. A block of memory is given back when the last Python reference to it goes, which is also PyTorch's
rule, so a local variable of a formula lives as long as its namesake in the model's forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from lowmem.memory.activation_graph import Block, Leaf, Node, Rows, Value
from lowmem.memory.ledger import Part


class _Input:
    """That of a checkpointed layer: `block` is None while it is away. `before` is that of the layer before."""

    __slots__ = ("before", "block", "itemsize", "numel")

    def __init__(self, x: Value, before: _Input | None):
        self.numel, self.itemsize, self.block, self.before = x.numel, x.itemsize, x.block, before


class Tape:
    """The account of one micro-batch. The gradient of a weight is given back as soon as it is complete.

    What becomes of it depends on how the step is made, so `arrivals` tells when it was complete.
    adds_in_place: a second gradient of the same tensor is added to the first one where nothing else holds
    that, as PyTorch does it on CUDA; wherever a dispatch mode counts bytes it makes a new tensor.
    offloads: inputs of checkpointed layers leave when the next layer begins, and come back one layer early.
    """

    def __init__(self, *, adds_in_place: bool = False, offloads: bool = False):
        self.changes: list[tuple[int, int]] = []
        """(number of the block, bytes taken or given back), in order."""
        self.parts: list[Part] = []
        """What each block is, by its number."""
        self.marks: list[tuple[str, int]] = []
        """(name, length of `changes` when it was reached)."""
        self.arrivals: list[tuple[str, int, int]] = []
        """(name of a weight, the number of the change that gives its complete gradient back, bytes of making a few
        rows of it where it is by rows), in order."""
        self._adds_in_place = adds_in_place
        self._offloads = offloads
        self._newest_input: _Input | None = None
        self._nodes: list[Node] | None = []
        self._saves = 0
        self._last_saver = 0
        self._stops_after: int | None = None
        self._is_stopped = False

    # ---------------------------------------------------------------- making values

    def new(self, numel: int, itemsize: int) -> Value:
        return Value(numel, itemsize, self.scratch(numel * itemsize))

    def scratch(self, nbytes: int) -> Block:
        """Memory that lives as long as the caller holds on to it."""
        self.parts.append("temporary")
        return Block(self.changes, len(self.parts) - 1, 0 if self._is_stopped else nbytes)

    def by_rows(self, held: list[Block | None], making: int, nbytes: int) -> Value:
        """A gradient that is made some rows at a time from what is `held`."""
        return Value(0, 1, self.scratch(0), rows=Rows(held, making, nbytes))

    def weight(self, name: str, numel: int, itemsize: int, *, trained: bool = True) -> Value:
        """A parameter, by the name under which its gradient arrives."""
        return Value(numel, itemsize, None, Leaf(name) if trained else None)

    def apply(
        self,
        numel: int,
        itemsize: int,
        *inputs: Value,
        saves: tuple[Value, ...] = (),
        saves_output: bool = False,
        scratch: int = 0,
        remembers: bool = False,
        gives_views: bool = False,
    ) -> Value:
        """An operator whose gradients have the sizes of its inputs.

        `saves`: inputs that its gradient needs. `scratch`: bytes that exist beside the gradients while they
        are made. `remembers`: it saves something without bytes of its own, such as a weight. `gives_views`:
        the gradient of its first input is a view.
        """
        if saves or remembers:
            self._count_save()
        wanted = [(each.numel, each.itemsize, each.node is not None) for each in inputs]

        def gradients(node: Node) -> list[Value | None]:
            beside = self.scratch(scratch)
            made = [self.new(size, item) if is_wanted else None for size, item, is_wanted in wanted]
            if gives_views and made[0] is not None:
                made[0].is_view = True
            del beside
            return made

        out = self.new(numel, itemsize)
        if saves_output:
            self._count_save()
        self.record(out, inputs, (*saves, *((out,) if saves_output else ())), gradients)
        return out

    def record(
        self,
        out: Value,
        inputs: tuple[Value, ...],
        saved: tuple[Value, ...],
        backward: Callable[[Node], list[Value | None]],
    ) -> None:
        """Put an operator into the graph; nothing happens where no input wants a gradient."""
        if self._nodes is None or all(each.node is None for each in inputs):
            return
        for each in inputs:
            if isinstance(each.node, Leaf):
                each.node.awaited += 1
        node = Node(tuple(each.node for each in inputs), tuple(each.block for each in saved), backward)
        out.node = node
        self._nodes.append(node)

    def _count_save(self) -> None:
        self._saves += 1
        self._last_saver = 0 if self._nodes is None else len(self._nodes)
        if self._saves == self._stops_after:
            self._is_stopped = True

    def mark(self, name: str) -> None:
        """Name this moment of forward; backward names it again, when it comes back, with a leading minus."""
        self.marks.append((name, len(self.changes)))
        assert self._nodes is not None
        self._nodes.append(Node((), (), name))

    # ---------------------------------------------------------------- checkpointing and backward

    def checkpointed(self, compute: Callable[[Value], Value], x: Value) -> Value:
        """compute(x), of which only x is kept; backward computes it again, up to the last thing it saves."""
        outer, self._nodes = self._nodes, None
        before = self._saves
        kept = self._keep(x)
        out = compute(x)
        self._nodes = outer
        self.record(out, (x,), (), partial(self._again, compute, kept, self._saves - before))
        return out

    def _keep(self, x: Value) -> _Input:
        kept = _Input(x, self._newest_input)
        if self._offloads:
            if self._newest_input is not None:
                self._newest_input.block = None
            self._newest_input = kept
        return kept

    def _restored(self, kept: _Input) -> Value:
        """The input, of which only this value holds the block where it was away; the one before comes back, too."""
        self._fetch(kept)
        x = Value(kept.numel, kept.itemsize, kept.block)
        if self._offloads:
            kept.block = None
            if kept.before is not None:
                self._fetch(kept.before)
        return x

    def _fetch(self, kept: _Input) -> None:
        if kept.block is None:
            kept.block = self.scratch(kept.numel * kept.itemsize)

    def _again(
        self, compute: Callable[[Value], Value], kept: _Input, saves: int, node: Node
    ) -> list[Value | None]:
        """Backward goes as far as it can without anything saved; what it then waits for is computed again."""
        start, nodes, last_saver, end = self._computed(compute, Value(kept.numel, kept.itemsize, None), 0)
        assert end is not None
        end.gradient, node.gradient = node.gradient, None
        later = nodes[last_saver + 1 :]
        del nodes[last_saver + 1 :], end
        self._run(later)
        waiting = [start.gradient, *(each.gradient for each in nodes)]
        del start, nodes

        start, nodes, last_saver, _ = self._computed(compute, self._restored(kept), self._saves + saves)
        del nodes[last_saver + 1 :]
        for each in reversed((start, *nodes)):
            each.gradient = waiting.pop()
        self._run(nodes)
        kept.block = None
        return [start.gradient]

    def _computed(
        self, compute: Callable[[Value], Value], x: Value, stops_after: int
    ) -> tuple[Leaf, list[Node], int, Node | None]:
        """A graph of its own for compute(x): its input, its nodes, the number of the last that saves, its output.

        Nothing takes memory once `stops_after` saves were counted on the tape, from the start where it is 0.
        """
        start = x.node = Leaf()
        outer, self._nodes = self._nodes, []
        self._stops_after, self._is_stopped = stops_after, stops_after == 0
        end = compute(x).node
        self._is_stopped, self._stops_after = False, None
        nodes, self._nodes = self._nodes, outer
        return start, nodes, self._last_saver, end

    def forward_ends(self) -> None:
        """What forward has left alive are the activations; the rest of what it made was temporary."""
        balance = [0] * len(self.parts)
        for index, nbytes in self.changes:
            balance[index] += nbytes
        for index, nbytes in enumerate(balance):
            if nbytes and self.parts[index] == "temporary":
                self.parts[index] = "activations"
        self.marks.append(("backward", len(self.changes)))

    def backward(self, loss: Value) -> None:
        """Go through the graph in reverse, as autograd does: the node made last runs first."""
        assert loss.node is not None
        assert self._nodes is not None
        loss.node.gradient = self.new(loss.numel, loss.itemsize)
        self._run(self._nodes)

    def _run(self, nodes: list[Node]) -> None:
        while nodes:
            node = nodes.pop()
            if isinstance(node.backward, str):
                self.marks.append((f"-{node.backward}", len(self.changes)))
            elif node.gradient is not None:
                gradients = node.backward(node)
                node.gradient = None
                node.saved = ()
                while gradients:
                    to, gradient = node.inputs[len(gradients) - 1], gradients.pop()
                    if to is None or gradient is None:
                        continue
                    if to.gradient is None:
                        to.gradient = gradient
                    elif gradient.rows is not None:
                        assert to.gradient.rows is not None
                        to.gradient.rows.add(gradient.rows)
                    elif not (self._adds_in_place and _holds_alone(to)):
                        to.gradient = self.new(gradient.numel, gradient.itemsize)
                    del gradient
                    if isinstance(to, Leaf):
                        self._landed(to)

    def _landed(self, leaf: Leaf) -> None:
        leaf.awaited -= 1
        if leaf.weight is None or leaf.awaited > 0:
            return
        assert leaf.gradient is not None
        assert leaf.gradient.block is not None
        self.parts[leaf.gradient.block.index] = "gradients"
        rows, leaf.gradient.rows = leaf.gradient.rows, None
        self.arrivals.append((leaf.weight, len(self.changes), rows.making if rows is not None else 0))
        leaf.gradient = None
        del rows  # what the gradient was made of goes when it was used


def _holds_alone(node: Node) -> bool:
    """Whether nothing but the node refers to its gradient's memory: the question that autograd asks, too."""
    assert node.gradient is not None
    # The node is one reference and the argument of getrefcount another.
    return not node.gradient.is_view and sys.getrefcount(node.gradient) == 2
