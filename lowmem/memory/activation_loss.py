"""From hidden states to the loss: whole logits, or tiles of the vocabulary.

Per token, with V the vocabulary, v the columns of a tile and H the width, in bytes (d a value of the model):

                          forward                           backward
    whole logits          d V + 4 V + 4 V                   4 V + 4 V + 4 V, then 4 V + 4 V + d V
                          (logits, float32, log-softmax)    (log-softmax, the loss' gradient, its own)
    tiles                 d v + 4 v                         d v + d v + 4 v + d v, d H + 4 H
                          (logits, float32)                 (tile before, logits, float32, gradient; hidden states')

A tile is 32 MiB of float32 logits, at least 64 columns wide. Its backward makes the head's whole gradient first, or,
by rows, leaves hidden states and log-sum-exp for it (`row_gradient_formulas`).
"""

from __future__ import annotations

from lowmem.memory.activation_graph import Node, Value
from lowmem.memory.activation_tape import Tape
from lowmem.memory.architecture import Architecture
from lowmem.memory.row_gradient_formulas import head_rows_bytes, rows_in_a_block

TILE_BYTES = 32 * 2**20
FEWEST_COLUMNS = 64


def plain_loss(tape: Tape, shape: Architecture, hidden: Value, head: Value) -> Value:
    """The model's own loss."""
    tokens = hidden.numel // shape.hidden
    saved = () if head.node is None else (hidden,)
    logits = tape.apply(tokens * shape.vocabulary, hidden.itemsize, hidden, head, saves=saved, remembers=True)
    if shape.family.scales_residuals:
        logits = tape.apply(logits.numel, logits.itemsize, logits, remembers=True)
    wide = logits if logits.itemsize == 4 else tape.apply(logits.numel, 4, logits)
    shifted_labels = tape.new(tokens, 8)
    log_softmax = tape.apply(wide.numel, 4, wide, saves_output=True)
    return tape.apply(1, 4, log_softmax, saves=(log_softmax, shifted_labels))


def chunked_loss(tape: Tape, shape: Architecture, hidden: Value, head: Value, *, by_rows: bool) -> Value:
    """The tiled cross-entropy of `lowmem.hf`, every token trained."""
    tokens, width, itemsize = hidden.numel // shape.hidden, shape.hidden, hidden.itemsize
    chosen = tape.apply(hidden.numel, itemsize, hidden, saves=(tape.new(tokens, 8),))
    tile = _Tile(tape, shape, tokens, itemsize, may_keep=not by_rows)
    kept = tile.forward()
    loss = tape.new(1, 4)
    new, trains_head, head_numel = tape.new, head.node is not None, head.numel
    is_summed = itemsize != 4 and not tile.is_only
    table, has_functions = (shape.vocabulary, width), shape.family.scales_residuals

    def gradients(node: Node) -> list[Value | None]:
        of_head = new(head_numel, itemsize) if trains_head and not by_rows else None
        total = of_tile = None
        for _ in range(1 if tile.is_only else 2):  # a tile is made while the one before is still there
            of_tile = tile.backward()
            if total is None or is_summed:
                product = new(tokens * width, itemsize)
                total = total or (new(tokens * width, 4) if is_summed else product)
                del product
        of_hidden = new(tokens * width, itemsize) if is_summed else total
        del of_tile
        if trains_head and by_rows:
            making = head_rows_bytes(table, tokens, itemsize, has_functions=has_functions)
            of_head = tape.by_rows(list(node.saved), making, itemsize * rows_in_a_block(table) * width)
        return [of_hidden, of_head]

    tape.record(loss, (chosen, head), (chosen, kept), gradients)
    return loss


def columns_per_tile(num_tokens: int) -> int:
    """As `lowmem.hf.tiled_cross_entropy` cuts the vocabulary; a test holds the two equal."""
    columns = TILE_BYTES // (4 * max(num_tokens, 1))
    return max(FEWEST_COLUMNS, columns - columns % FEWEST_COLUMNS)


class _Tile:
    """The buffers of one tile of logits."""

    def __init__(self, tape: Tape, shape: Architecture, tokens: int, itemsize: int, *, may_keep: bool):
        columns = min(columns_per_tile(tokens), shape.vocabulary)
        self._new, self._tokens, self._numel, self._itemsize = tape.new, tokens, tokens * columns, itemsize
        self._has_functions = shape.family.scales_residuals
        self.is_only = columns == shape.vocabulary
        self._is_kept = self.is_only and may_keep

    def forward(self) -> Value:
        """What stays: the gradient of an only tile if it may, else the log-sum-exp of each token."""
        logits = self._new(self._numel, self._itemsize)
        if not self.is_only:
            logits = self._new(self._numel, self._itemsize)  # beside the tile before
        scaled = self._new(self._numel, self._itemsize) if self._has_functions else logits
        wide = self._new(self._numel, 4) if self._itemsize != 4 else scaled
        del scaled
        if not self._is_kept:
            return self._new(self._tokens, 4)
        shifted = self._new(self._numel, 4)
        del shifted, wide
        return self._gradient(logits)

    def backward(self) -> Value:
        """The gradient of the logits. One that was kept is scaled in float32."""
        if not self._is_kept:
            return self._gradient(self._new(self._numel, self._itemsize))
        if self._itemsize == 4:
            return self._new(self._numel, 4)
        wide = self._new(self._numel, 4)
        scaled = self._new(self._numel, 4)
        del wide
        narrow = self._new(self._numel, self._itemsize)
        del scaled
        return narrow

    def _gradient(self, logits: Value) -> Value:
        if self._itemsize == 4 and not self._has_functions:
            return logits  # overwritten
        scaled = self._new(self._numel, self._itemsize) if self._has_functions else logits
        wide = self._new(self._numel, 4) if self._itemsize != 4 or self._has_functions else scaled
        gradient = self._new(self._numel, 4) if self._has_functions else wide
        narrow = self._new(self._numel, self._itemsize)
        del gradient, wide, scaled
        return narrow
