"""The activations of a decoder's layers, operator by operator, from their shapes alone.

What a Llama layer keeps for backward, per token, with hidden width H, MLP width I, query width Q and
key/value width K, in elements of the model's dtype (d bytes) unless it says float32:

    tensor                              elements      dtype    saved by
    input of each norm, upcast          2 H           float32  pow and mul (the input itself in float32)
    root of the mean square             2             float32  rsqrt
    normalised input                    2 H           d        mul with the norm's weight
    output of the norm                  2 H           d        the matrix products that follow
    rotated q, rotated k, v             Q + 2 K       d        attention; 3 Q where an explicit mask repeats k, v
    output of attention                 Q             d        attention, the output's matrix product
    log-sum-exp                         heads         float32  attention
    mask in the model's dtype           S             d        attention with an explicit mask, in each layer
    gate, silu(gate), up, their product 4 I           d        silu, mul, the last matrix product

Eager attention keeps S x heads scores twice instead, in float32 and d, and no log-sum-exp. Under activation
checkpointing the input of each layer (H) stays, and one layer at a time is computed again in backward.

The functions below are a model's forward with sizes for tensors, statement by statement.
"""

from __future__ import annotations

from lowmem.memory.activation_graph import Value
from lowmem.memory.activation_operators import Operators, Work
from lowmem.memory.activation_tape import Tape
from lowmem.memory.architecture import Architecture


class Decoder(Operators):
    """The layers of `shape`, computed on `tape`."""

    def __init__(self, tape: Tape, shape: Architecture, work: Work):
        super().__init__(tape, shape, work)
        pairs = work.rows * work.tokens**2
        self._mask = tape.new(pairs, work.itemsize if work.eager else 1) if work.masked else None
        rows = work.rows if work.packed else 1
        self._cos, self._sin = (tape.new(rows * work.tokens * shape.head_dim, work.itemsize) for _ in "cs")

    def layer(self, x: Value) -> Value:
        """Attention and MLP, each with its norm and added to what came in."""
        before, width = self.shape.family.norms == "before", self.shape.hidden
        residual = x
        x = self.norm(x, width) if before else x
        x = self._attention(x)
        x = x if before else self.norm(x, width)
        x = self.add(residual, self._scaled_branch(x))
        residual = x
        x = self.norm(x, width) if before else x
        x = self._fused_mlp(x) if self.shape.family.is_fused else self._mlp(x)
        x = x if before else self.norm(x, width)
        return self.add(residual, self._scaled_branch(x))

    # ---------------------------------------------------------------- attention

    def _attention(self, x: Value) -> Value:
        q, k, v = self._fused_heads(x) if self.shape.family.is_fused else self._heads(x)
        q, k = self._rotated(q), self._rotated(k)
        mixed = self._mixed_eagerly(q, k, v) if self.work.eager else self._mixed(q, k, v)
        return self.linear(
            "o_proj", mixed, self.shape.query_width, self.shape.hidden, bias=self.shape.output_bias
        )

    def _heads(self, x: Value) -> tuple[Value, Value, Value]:
        shape = self.shape
        q, k, v = (
            self.linear(name, x, shape.hidden, width, bias=shape.attention_bias)
            for name, width in (
                ("q_proj", shape.query_width),
                ("k_proj", shape.key_value_width),
                ("v_proj", shape.key_value_width),
            )
        )
        if shape.family.query_norm == "row":
            q, k = self.norm(q, shape.query_width), self.norm(k, shape.key_value_width)
        q, k = self._by_head(q), self._by_head(k)
        if shape.family.query_norm == "head":
            q, k = self.norm(q, shape.head_dim), self.norm(k, shape.head_dim)
        return q, k, v

    def _fused_heads(self, x: Value) -> tuple[Value, Value, Value]:
        queries, keys = self.shape.query_width, self.shape.key_value_width
        whole = self.linear(
            "qkv_proj", x, self.shape.hidden, queries + 2 * keys, bias=self.shape.attention_bias
        )
        q, k, v = (self._columns(whole, width, queries + 2 * keys) for width in (queries, keys, keys))
        return self._by_head(q), self._by_head(k), v

    def _by_head(self, x: Value) -> Value:
        """A view. The gradient comes back in another order of memory, so backward copies it."""
        return self.view(x, x.numel)

    def _columns(self, x: Value, width: int, of: int) -> Value:
        """A view of some columns, whose gradient is padded to all of them."""
        return self.view(x, x.numel // of * width)

    def _rotated(self, x: Value) -> Value:
        """x * cos + rotate_half(x) * sin."""
        turned = self.add(
            self.like(x, saves=(self._cos,)), self.like(self._half_turned(x), saves=(self._sin,))
        )
        return self._joined(turned, self.view(x, 0)) if self.shape.family.is_fused else turned

    def _joined(self, x: Value, rest: Value) -> Value:
        """x beside columns that are not rotated, of which there may be none; the gradients are views."""
        out, nothing = self.tape.new(x.numel, x.itemsize), self.tape.new(0, x.itemsize)
        self.tape.record(out, (x, rest), (), lambda node: [node.gradient, nothing])
        return out

    def _half_turned(self, x: Value) -> Value:
        negated = self.tape.new(x.numel // 2, x.itemsize)
        # Backward pads the two halves to the whole and adds them.
        out = self.like(x, scratch=x.nbytes)
        del negated
        return out

    def _mixed(self, q: Value, k: Value, v: Value) -> Value:
        work = self.work
        if work.masked and self.shape.heads != self.shape.key_value_heads:
            k, v = self.like(q, k), self.like(q, v)
        mask = self.tape.new(work.rows * work.tokens**2, work.itemsize) if work.masked else None
        sums = self.tape.new(work.rows * work.tokens * self.shape.heads, 4)
        saved = (q, k, v, sums) if mask is None else (q, k, v, sums, mask)
        accumulators = 4 * (q.numel + q.numel // self.shape.head_dim) if work.on_cuda else 0
        mixed = self.like(q, q, k, v, saves=saved, saves_output=True, scratch=accumulators)
        # The result lies in memory like q; where that is not token by token, it is copied.
        return self.like(mixed) if self.shape.family.is_fused else mixed

    def _mixed_eagerly(self, q: Value, k: Value, v: Value) -> Value:
        if self.shape.heads != self.shape.key_value_heads:
            k, v = self.like(q, k), self.like(q, v)
            copies_keys = False
        else:
            copies_keys = self.work.rows > 1
        several = self.work.rows > 1  # heads of one row are a view of it, those of several are copied
        probabilities = self._probabilities(
            self.like(q, q) if several else q, self.like(k, k) if copies_keys else k
        )
        mixed = self._product(probabilities, self.like(v, v) if copies_keys else v, q)
        return self.like(mixed, mixed)

    def _probabilities(self, q: Value, k: Value) -> Value:
        scores = self.work.rows * self.work.tokens**2 * self.shape.heads
        x = self.scaled(self.tape.apply(scores, self.work.itemsize, q, k, saves=(q, k)))
        x = self.like(x) if self.work.masked else x
        wide = self._softmax(self.cast(x, 4))
        return self.cast(wide, self.work.itemsize)

    def _softmax(self, x: Value) -> Value:
        return self.like(x, saves_output=True)

    def _product(self, probabilities: Value, v: Value, like: Value) -> Value:
        return self.like(like, probabilities, v, saves=(probabilities, v))

    # ---------------------------------------------------------------- MLP

    def _mlp(self, x: Value) -> Value:
        inner, width, bias = self.shape.mlp, self.shape.hidden, self.shape.mlp_bias
        product = self._multiplied(
            self._activated(self.linear("gate_proj", x, width, inner, bias=bias)),
            self.linear("up_proj", x, width, inner, bias=bias),
        )
        return self.linear("down_proj", product, inner, width, bias=bias)

    def _activated(self, gate: Value) -> Value:
        return self.like(gate, saves=(gate,), remembers=True, saves_output=True)

    def _multiplied(self, x: Value, y: Value) -> Value:
        return self.like(x, x, y, saves=(x, y))

    def _fused_mlp(self, x: Value) -> Value:
        inner, width, bias = self.shape.mlp, self.shape.hidden, self.shape.mlp_bias
        both = self.linear("gate_up_proj", x, width, 2 * inner, bias=bias)
        half = both.numel // 2
        active = self.tape.new(half, both.itemsize)
        product = self.tape.apply(half, both.itemsize, both, saves=(both, active))
        del both, active
        return self.linear("down_proj", product, inner, width, bias=bias)

    def _scaled_branch(self, x: Value) -> Value:
        return self.scaled(x) if self.shape.family.scales_residuals else x
