"""Several documents in one sequence, which a model reads as separate ones by their position ids."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

from lowmem.data.example import IGNORED, Example


def packed(documents: Sequence[Example], max_length: int, pad_token_id: int, seed: int) -> list[Example]:
    """Sequences of exactly `max_length` tokens that hold every document whole and once.

    Documents are put, longest first, where the least room is left (best fit decreasing); `seed` decides
    between equally long ones and in which order the sequences come. `position_ids` restart at 0 with each
    document, whose first token has no label. Free room at the end is one more such document, of padding
    without labels. Every document must be 1 to `max_length` tokens long.
    """
    assert all(0 < len(document.input_ids) <= max_length for document in documents)
    draw = random.Random(seed)
    order = list(documents)
    draw.shuffle(order)
    order.sort(key=lambda document: -len(document.input_ids))

    sequences: list[list[Example]] = []
    with_room: dict[int, list[int]] = {}  # tokens left -> numbers of the sequences that have just so many
    rooms: list[int] = []  # the keys of `with_room`, ascending
    for document in order:
        length = len(document.input_ids)
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(sequences), max_length
            sequences.append([])
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        sequences[number].append(document)
        if room - length not in with_room:
            with_room[room - length] = []
            insort(rooms, room - length)
        with_room[room - length].append(number)
    draw.shuffle(sequences)
    return [_joined(sequence, max_length, pad_token_id) for sequence in sequences]


def _joined(documents: Sequence[Example], max_length: int, pad_token_id: int) -> Example:
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for document in documents:
        input_ids += document.input_ids
        labels += [IGNORED, *document.labels[1:]]
        position_ids += range(len(document.input_ids))
    free = max_length - len(input_ids)
    return Example(
        input_ids + [pad_token_id] * free, labels + [IGNORED] * free, position_ids + list(range(free))
    )
