"""The operators that a decoder's layers are made of, each with what its gradient needs and makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowmem.memory.activation_graph import Node, Value
from lowmem.memory.activation_tape import Tape
from lowmem.memory.architecture import Architecture


@dataclass(frozen=True)
class Adapters:
    """LoRA on every linear layer, its matrices in float32, the base frozen."""

    rank: int
    dropout: bool = False
    base_is_4bit: bool = False
    """Each use of a weight of the base expands it into the model's dtype."""
    targets: frozenset[str] | None = None
    """Last names of the modules that have adapters; None for all."""


@dataclass(frozen=True)
class Work:
    """One micro-batch and how it is computed."""

    rows: int
    tokens: int
    """In each row."""
    itemsize: int
    """Bytes of a weight and of an activation: 2 for bfloat16, 4 for float32."""
    masked: bool = True
    """Whether attention gets an explicit (rows, 1, tokens, tokens) mask."""
    eager: bool = False
    """Attention from whole scores instead of torch's fused function."""
    checkpointing: bool = False
    offloading: bool = False
    """Whether the inputs of checkpointed layers are moved to the host."""
    chunked_loss: bool = False
    packed: bool = False
    """Whether each row counts positions of its own."""
    on_cuda: bool = False
    """Whether CUDA's kernels run, whose attention accumulates in float32 copies that no operator shows."""
    adapters: Adapters | None = None
    by_rows: frozenset[str] = frozenset()
    """Of `embed_tokens` and `lm_head`, those whose gradients are made some rows at a time."""


class Operators:
    """PyTorch's operators on sizes, as `shape` and `work` ask for them."""

    def __init__(self, tape: Tape, shape: Architecture, work: Work):
        self.tape, self.shape, self.work = tape, shape, work

    def linear(self, name: str, x: Value, inputs: int, outputs: int, *, bias: bool) -> Value:
        if self.work.adapters is not None:
            return self._adapted(name, x, inputs, outputs, self.work.adapters)
        weight = self._weight(name, inputs * outputs)
        terms = [self._weight(f"{name}.bias", outputs)] if bias else []
        return self.tape.apply(
            x.numel // inputs * outputs, x.itemsize, x, weight, *terms, saves=(x,), gives_views=True
        )

    def _adapted(self, name: str, x: Value, inputs: int, outputs: int, adapters: Adapters) -> Value:
        """x W^T + lora_B(lora_A(x)) * scaling, the second term in float32, as is the sum but on a 4-bit base."""
        tokens = x.numel // inputs
        expanded = inputs * outputs * x.itemsize if adapters.base_is_4bit else 0
        beside = self.tape.scratch(expanded if self.work.on_cuda else 0)
        out = self.tape.apply(
            tokens * outputs, x.itemsize, x, remembers=True, scratch=expanded, gives_views=True
        )
        del beside
        if adapters.targets is not None and name not in adapters.targets:
            return out
        if adapters.base_is_4bit:
            out = self.like(out)  # peft copies it
        x = self.cast(x, 4)
        if adapters.dropout:
            # CUDA keeps which values were dropped, a CPU what each was multiplied by.
            kept = self.tape.new(x.numel, 1 if self.work.on_cuda else 4)
            x = self.like(x, saves=(kept,))
            del kept
        low = self._product_in_float32(f"{name}.lora_A", x, inputs, adapters.rank)
        term = self.scaled(self._product_in_float32(f"{name}.lora_B", low, adapters.rank, outputs))
        del low
        if adapters.base_is_4bit:
            term = self.cast(term, self.work.itemsize)
        out = self.add(out, term)
        del term
        return self.cast(out, self.work.itemsize)

    def _product_in_float32(self, name: str, x: Value, inputs: int, outputs: int) -> Value:
        weight = self.tape.weight(name, inputs * outputs, 4)
        return self.tape.apply(x.numel // inputs * outputs, 4, x, weight, saves=(x,), gives_views=True)

    def norm(self, x: Value, width: int) -> Value:
        """x / root of its mean square, times a weight, over rows of `width`."""
        x = self.cast(x, 4)
        root = self._inverse_root(x, width)
        # The root's gradient is a whole tensor before it is summed over the row.
        x = self.like(x, x, root, saves=(x, root), scratch=x.nbytes)
        if self.shape.family.casts_before_scaling:
            return self._times_weight(self.cast(x, self.work.itemsize), width)
        return self.cast(self._times_weight(x, width), self.work.itemsize)

    def _inverse_root(self, x: Value, width: int) -> Value:
        """rsqrt(mean(x^2)), a number a row. Backward of the square makes x^1 and 2 x^1 beside the gradient."""
        squares = self.like(x, saves=(x,), scratch=2 * x.nbytes)
        return self.tape.apply(x.numel // width, 4, squares, saves_output=True)

    def _times_weight(self, x: Value, width: int) -> Value:
        """The weight's gradient is a whole tensor before it is summed over the tokens."""
        if self.work.adapters is not None:
            return self.like(x, remembers=True)
        return self.like(x, x, self._weight("norm", width), saves=(x,), scratch=x.nbytes)

    def cast(self, x: Value, itemsize: int) -> Value:
        return x if x.itemsize == itemsize else self.tape.apply(x.numel, itemsize, x)

    def add(self, x: Value, y: Value) -> Value:
        """In the wider dtype. Both take the sum's gradient, not a copy of it, where the dtype is theirs."""
        out = self.tape.new(x.numel, max(x.itemsize, y.itemsize))
        new, itemsizes = self.tape.new, (x.itemsize, y.itemsize)

        def gradients(node: Node) -> list[Value | None]:
            whole = node.gradient
            assert whole is not None
            return [whole if whole.itemsize == each else new(whole.numel, each) for each in itemsizes]

        self.tape.record(out, (x, y), (), gradients)
        return out

    def view(self, x: Value, numel: int) -> Value:
        out = Value(numel, x.itemsize, x.block)
        new, whole, itemsize = self.tape.new, x.numel, x.itemsize
        self.tape.record(out, (x,), (), lambda node: [new(whole, itemsize)])
        return out

    def scaled(self, x: Value) -> Value:
        """Times a number, which is saved but has no bytes."""
        return self.like(x, remembers=True)

    def like(self, x: Value, *inputs: Value, **saved: Any) -> Value:
        """An operator whose result is of the size of `x`; its input is `x` where none is given."""
        return self.tape.apply(x.numel, x.itemsize, *(inputs or (x,)), **saved)

    def _weight(self, name: str, numel: int) -> Value:
        return self.tape.weight(name, numel, self.work.itemsize)
