"""How full memory is above the weights while one micro-batch runs: the tape of a decoder, read off.

The layers of a decoder are alike: three are put on the tape, and the middle one counts for all but two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lowmem.memory.activation_formulas import Decoder
from lowmem.memory.activation_graph import Leaf, Value
from lowmem.memory.activation_loss import chunked_loss, plain_loss
from lowmem.memory.activation_operators import Work
from lowmem.memory.activation_tape import Tape
from lowmem.memory.architecture import Architecture
from lowmem.memory.ledger import PARTS, Part, Phase


@dataclass(frozen=True)
class Profile:
    """The fullest moment of one micro-batch, in bytes above what was there before it."""

    nbytes: int
    phase: Phase
    parts: dict[Part, int]


@functools.lru_cache(maxsize=8192)
def profile(
    shape: Architecture, work: Work, *, keep_gradients: bool = True, adds_gradients: bool = False
) -> Profile:
    """Forward and backward of one micro-batch, the batch itself included. The flags are those of `Tape`."""
    tape = Tape(keep_gradients=keep_gradients, adds_gradients=adds_gradients)
    _run(tape, shape, work)
    return _fullest(tape, shape.layers)


def _run(tape: Tape, shape: Architecture, work: Work) -> None:
    batch = [tape.scratch(8 * work.rows * work.tokens) for _ in ("input_ids", "labels", "attention_mask")]
    for block in batch:
        tape.parts[block.index] = "other"
    loss = _loss(tape, shape, work)
    tape.forward_ends()
    tape.backward(loss)


def _loss(tape: Tape, shape: Architecture, work: Work) -> Value:
    trained = work.adapters is None
    table = tape.weight(shape.vocabulary * shape.hidden, work.itemsize, trained=trained)
    head = table if shape.is_tied else tape.weight(table.numel, work.itemsize, trained=trained)
    hidden = _hidden(tape, shape, work, table)
    return (chunked_loss if work.chunked_loss else plain_loss)(tape, shape, hidden, head)


def _hidden(tape: Tape, shape: Architecture, work: Work, table: Value) -> Value:
    """What the head sees. As in the model, the embeddings, the mask and the rotary tables live until here."""
    embeddings = tape.apply(work.rows * work.tokens * shape.hidden, work.itemsize, table)
    if work.adapters is not None:
        # The first layer's input is made to want a gradient, for which the graph holds on to it.
        embeddings.node = Leaf(is_weight=False)
        embeddings.node.saved = (embeddings.block,)
    elif shape.family.scales_residuals:
        embeddings = tape.apply(embeddings.numel, embeddings.itemsize, embeddings, remembers=True)
    decoder = Decoder(tape, shape, work)
    x = embeddings
    tape.mark("embedding")
    for index in range(min(shape.layers, 3)):
        x = tape.checkpointed(decoder.layer, x) if work.checkpointing else decoder.layer(x)
        tape.mark(f"layer {index}")
    return decoder.norm(x, shape.hidden)


@dataclass
class _Segment:
    """A stretch of the tape: the net bytes it takes, and the most above its start (at `fullest`, an index)."""

    start: int
    end: int
    repeats: int
    net: int = 0
    rise: int = 0
    fullest: int = 0


def _fullest(tape: Tape, layers: int) -> Profile:
    segments = _segments(tape, layers)
    level = peak = 0
    at: tuple[int, int] | None = None
    for number, segment in enumerate(segments):
        before_last = segment.net * (segment.repeats - 1)
        highest = level + max(0, before_last) + segment.rise
        if highest > peak:
            peak, at = highest, (number, segment.repeats - 1 if before_last > 0 else 0)
        level += segment.net * segment.repeats
    assert at is not None
    number, whole = at
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for segment in segments[:number]:
        _count(tape, segment.start, segment.end, segment.repeats, parts)
    here = segments[number]
    _count(tape, here.start, here.end, whole, parts)
    _count(tape, here.start, here.fullest, 1, parts)
    backward = next(index for name, index in tape.marks if name == "backward")
    return Profile(peak, "forward" if here.fullest <= backward else "backward", parts)


def _segments(tape: Tape, layers: int) -> list[_Segment]:
    borders = [0, *(index for _, index in tape.marks), len(tape.changes)]
    names = ["", *(name for name, _ in tape.marks)]
    found = []
    for start, end, name, closing in zip(borders[:-1], borders[1:], names, [*names[1:], ""], strict=True):
        is_typical = (name, closing) in (("layer 0", "layer 1"), ("-layer 1", "-layer 0"))
        segment = _Segment(start, end, max(1, layers - 2) if is_typical else 1, fullest=start)
        for index in range(start, end):
            segment.net += tape.changes[index][1]
            if segment.net > segment.rise:
                segment.rise, segment.fullest = segment.net, index + 1
        found.append(segment)
    return found


def _count(tape: Tape, start: int, end: int, times: int, parts: dict[Part, int]) -> None:
    for index, nbytes in tape.changes[start:end]:
        parts[tape.parts[index]] += nbytes * times
