"""One example as a person can read it, with its trained part marked."""

from __future__ import annotations

from itertools import groupby

from lowmem.data.example import IGNORED, Example
from lowmem.data.pieces import PieceTokenizer

OPEN, CLOSE = "[[[", "]]]"
SHOWN_CHARACTERS = 400  # of each part; the middle of a longer one is left out


def preview(example: Example, tokenizer: PieceTokenizer) -> str:
    """The decoded tokens; what is trained stands between [[[ and ]]]."""
    parts = []
    tokens = zip(example.input_ids, example.labels, strict=True)
    for is_trained, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
        text = _shortened(tokenizer.text([token for token, _ in run]))
        parts.append(f"{OPEN}{text}{CLOSE}" if is_trained else text)
    return "".join(parts)


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"
