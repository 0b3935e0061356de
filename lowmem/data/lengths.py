"""Sequences that are longer than `max_length`."""

from __future__ import annotations

from typing import Literal

from lowmem.data.example import IGNORED, Example


def shortened(
    example: Example,
    max_length: int,
    on_too_long: Literal["drop", "truncate_left", "truncate_right"],
    bos_token_id: int | None,
) -> Example | None:
    """The example in at most `max_length` tokens, or None when it is dropped.

    `truncate_left` keeps the end, and a beginning-of-sequence token where there is one; `truncate_right`
    keeps the beginning. The first token is never trained.
    """
    if len(example.input_ids) <= max_length:
        return example
    if on_too_long == "drop":
        return None
    if on_too_long == "truncate_right":
        return Example(example.input_ids[:max_length], example.labels[:max_length])
    head = [bos_token_id] if bos_token_id is not None and example.input_ids[0] == bos_token_id else []
    kept = max_length - len(head)
    labels = [IGNORED] * len(head) + example.labels[-kept:]
    labels[0] = IGNORED
    return Example(head + example.input_ids[-kept:], labels)


def last_tokens(ids: list[int], max_length: int, bos_token_id: int | None) -> list[int]:
    """A prompt in at most `max_length` tokens: its end, and its beginning-of-sequence token."""
    kept = shortened(Example(ids, ids), max_length, "truncate_left", bos_token_id) if ids else None
    return kept.input_ids if kept else ids
