"""Plain texts: every token is trained, and a long text becomes several documents."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.data.example import IGNORED, Example
from lowmem.data.pieces import PieceTokenizer
from lowmem.data.templates import adds_bos

BLOCK_CHARACTERS = 50_000  # the tokenizer's time grows faster than the length of what it is given


def chunked_documents(
    tokenizer: PieceTokenizer, texts: Sequence[str], max_length: int
) -> list[list[Example]]:
    """The documents of each text, at most `max_length` tokens long.

    Each begins with the beginning-of-sequence token where the tokenizer uses one; the last of a text ends
    with its end-of-text token. A remainder of a single token has nothing to predict and is left out.
    """
    bos_id, eos_id = tokenizer.tokenizer.bos_token_id, tokenizer.tokenizer.eos_token_id
    head = [bos_id] if adds_bos(tokenizer.tokenizer) else []
    tail = [eos_id] if eos_id is not None else []
    found = []
    for pieces in tokenizer.cut([_blocks(text) for text in texts]):
        ids = [token for piece in pieces for token in piece]
        # a text that already holds its beginning or end token gets no second one
        ids = ids[len(head) :] if ids[: len(head)] == head else ids
        ids = ids if tail and ids[-1:] == tail else ids + tail
        room = max_length - len(head)
        chunks = [head + ids[start : start + room] for start in range(0, len(ids), room)]
        found.append([Example(chunk, [IGNORED, *chunk[1:]]) for chunk in chunks if len(chunk) > 1])
    return found


def _blocks(text: str) -> list[str]:
    """The text in pieces of about BLOCK_CHARACTERS, cut before the last newline or space of each."""
    blocks, start = [], 0
    while len(text) - start > BLOCK_CHARACTERS:
        limit = start + BLOCK_CHARACTERS
        cut = max(text.rfind("\n", start + 1, limit), text.rfind(" ", start + 1, limit))
        cut = cut if cut > start else limit
        blocks.append(text[start:cut])
        start = cut
    return [*blocks, text[start:]]
