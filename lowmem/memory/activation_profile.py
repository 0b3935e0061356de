"""How full memory is above the weights while one micro-batch runs: the tape of a decoder, read off.

The layers of a decoder are alike: three are put on the tape, and the middle one counts for all but two; five where
the layers' inputs are moved to the host.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lowmem.memory.activation_formulas import Decoder
from lowmem.memory.activation_graph import Leaf, Node, Value
from lowmem.memory.activation_loss import chunked_loss, plain_loss
from lowmem.memory.activation_operators import Work
from lowmem.memory.activation_tape import Tape
from lowmem.memory.architecture import Architecture
from lowmem.memory.arrivals import Arrivals
from lowmem.memory.ledger import PARTS, Part, Phase
from lowmem.memory.row_gradient_formulas import embedding_rows_bytes


@dataclass(frozen=True)
class Profile:
    """The fullest moment of one micro-batch, in bytes above what was there before it."""

    nbytes: int
    phase: Phase
    parts: dict[Part, int]


@functools.lru_cache(maxsize=8192)
def profile(shape: Architecture, work: Work, arrivals: Arrivals) -> Profile:
    """Forward and backward of one micro-batch, the batch itself included."""
    return _fullest(_with_arrivals(_tape(shape, work), arrivals), shape.layers, _on_tape(shape, work))


@dataclass(frozen=True)
class _Account:
    """What happens to memory, in order."""

    changes: list[tuple[Part, int]]
    marks: list[tuple[str, int]]
    """(name, length of `changes` when it was reached)."""


@functools.lru_cache(maxsize=1024)
def _tape(shape: Architecture, work: Work) -> tuple[_Account, list[tuple[str, int, int]]]:
    """One micro-batch with gradients given back as they arrive, and when each of them does."""
    tape = Tape(adds_in_place=work.on_cuda, offloads=work.offloading)
    _run(tape, shape, work)
    account = _Account([(tape.parts[index], nbytes) for index, nbytes in tape.changes], tape.marks)
    return account, tape.arrivals


def _with_arrivals(taped: tuple[_Account, list[tuple[str, int, int]]], arrivals: Arrivals) -> _Account:
    """The account with what becomes of each gradient."""
    account, arrived = taped
    changes: list[tuple[Part, int]] = []
    moved = []
    """(index in the old account, by how much what comes from there on moves)."""
    start = 0
    for name, index, making in arrived:
        changes += account.changes[start:index]
        start = index + 1
        of_gradient = account.changes[index]
        changes += arrivals.of(name).changes(-of_gradient[1], making)
        moved.append((start, len(changes) - start))
    changes += account.changes[start:]
    return _Account(changes, [(name, _moved(at, moved)) for name, at in account.marks])


def _moved(at: int, moved: list[tuple[int, int]]) -> int:
    return at + next((by for start, by in reversed(moved) if start <= at), 0)


def _run(tape: Tape, shape: Architecture, work: Work) -> None:
    batch = [tape.scratch(8 * work.rows * work.tokens) for _ in ("input_ids", "labels", "attention_mask")]
    for block in batch:
        tape.parts[block.index] = "other"
    loss = _loss(tape, shape, work)
    tape.forward_ends()
    tape.backward(loss)


def _loss(tape: Tape, shape: Architecture, work: Work) -> Value:
    trained = work.adapters is None
    table = tape.weight("embed_tokens", shape.vocabulary * shape.hidden, work.itemsize, trained=trained)
    head = table if shape.is_tied else tape.weight("lm_head", table.numel, work.itemsize, trained=trained)
    hidden = _hidden(tape, shape, work, table)
    if work.chunked_loss:
        by_rows = ("embed_tokens" if shape.is_tied else "lm_head") in work.by_rows
        return chunked_loss(tape, shape, hidden, head, by_rows=by_rows)
    return plain_loss(tape, shape, hidden, head)


def _hidden(tape: Tape, shape: Architecture, work: Work, table: Value) -> Value:
    """What the head sees. As in the model, the embeddings, the mask and the rotary tables live until here."""
    embeddings = _looked_up(tape, shape, work, table)
    if work.adapters is not None:
        # The first layer's input is made to want a gradient, for which the graph holds on to it.
        embeddings.node = Leaf()
        embeddings.node.saved = (embeddings.block,)
    elif shape.family.scales_residuals:
        embeddings = tape.apply(embeddings.numel, embeddings.itemsize, embeddings, remembers=True)
    decoder = Decoder(tape, shape, work)
    x = embeddings
    tape.mark("embedding")
    for index in range(_on_tape(shape, work)):
        x = tape.checkpointed(decoder.layer, x) if work.checkpointing else decoder.layer(x)
        tape.mark(f"layer {index}")
    return decoder.norm(x, shape.hidden)


def _looked_up(tape: Tape, shape: Architecture, work: Work, table: Value) -> Value:
    numel = work.rows * work.tokens * shape.hidden
    if "embed_tokens" not in work.by_rows:
        return tape.apply(numel, work.itemsize, table)
    making = embedding_rows_bytes((shape.vocabulary, shape.hidden), work.itemsize)
    out = tape.new(numel, work.itemsize)

    def gradients(node: Node) -> list[Value | None]:
        assert node.gradient is not None
        return [tape.by_rows([node.gradient.block], making, making)]

    tape.record(out, (table,), (), gradients)
    return out


def _on_tape(shape: Architecture, work: Work) -> int:
    """Layers: the middle one counts for many. Where inputs are offloaded, two on each side of it are not alike: the
    model's forward holds on to the first one's input, and the last one's is still there when backward begins."""
    return min(shape.layers, 5 if work.offloading else 3)


@dataclass
class _Segment:
    """A stretch of the tape: the net bytes it takes, and the most above its start (at `fullest`, an index)."""

    start: int
    end: int
    repeats: int
    net: int = 0
    rise: int = 0
    fullest: int = 0


def _fullest(account: _Account, layers: int, on_tape: int) -> Profile:
    segments = _segments(account, layers, on_tape)
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
        _count(account, segment.start, segment.end, segment.repeats, parts)
    here = segments[number]
    _count(account, here.start, here.end, whole, parts)
    _count(account, here.start, here.fullest, 1, parts)
    backward = next(index for name, index in account.marks if name == "backward")
    return Profile(peak, "forward" if here.fullest <= backward else "backward", parts)


def _segments(account: _Account, layers: int, on_tape: int) -> list[_Segment]:
    typical = on_tape // 2
    stands_for_many = (
        (f"layer {typical - 1}", f"layer {typical}"),
        (f"-layer {typical}", f"-layer {typical - 1}"),
    )
    borders = [0, *(index for _, index in account.marks), len(account.changes)]
    names = ["", *(name for name, _ in account.marks)]
    found = []
    for start, end, name, closing in zip(borders[:-1], borders[1:], names, [*names[1:], ""], strict=True):
        repeats = layers - on_tape + 1 if (name, closing) in stands_for_many else 1
        segment = _Segment(start, end, repeats, fullest=start)
        for index in range(start, end):
            segment.net += account.changes[index][1]
            if segment.net > segment.rise:
                segment.rise, segment.fullest = segment.net, index + 1
        found.append(segment)
    return found


def _count(account: _Account, start: int, end: int, times: int, parts: dict[Part, int]) -> None:
    for part, nbytes in account.changes[start:end]:
        parts[part] += nbytes * times
