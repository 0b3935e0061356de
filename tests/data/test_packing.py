from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowmem.data.example import IGNORED, Example
from lowmem.data.packing import packed

PAD = 0


def documents_of(lengths: list[int]) -> list[Example]:
    """Documents whose tokens tell which document they are from and where they stood in it."""
    found = []
    for number, length in enumerate(lengths, 1):
        ids = [number * 1000 + place for place in range(length)]
        found.append(Example(ids, [IGNORED if i % 3 == 1 else token for i, token in enumerate(ids)]))
    return found


def split_at_restarts(sequence: Example) -> list[Example]:
    assert sequence.position_ids is not None
    starts = [i for i, position in enumerate(sequence.position_ids) if position == 0]
    parts = []
    for start, end in zip(starts, [*starts[1:], len(sequence.input_ids)], strict=True):
        assert sequence.position_ids[start:end] == list(range(end - start))
        parts.append(Example(sequence.input_ids[start:end], sequence.labels[start:end]))
    return parts


@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60),
    room=st.integers(16, 40),
    seed=st.integers(0, 3),
)
def test_every_document_is_whole_and_there_once_and_nothing_is_too_long(lengths, room, seed):
    documents = documents_of(lengths)
    sequences = packed(documents, room, PAD, seed)
    found = []
    for sequence in sequences:
        assert len(sequence.input_ids) == len(sequence.labels) == len(sequence.position_ids or []) == room
        for part in split_at_restarts(sequence):
            assert part.labels[0] == IGNORED
            if part.input_ids[0] == PAD:
                assert set(part.input_ids) == {PAD}
                assert set(part.labels) == {IGNORED}
            else:
                found.append(part)
    expected = [Example(d.input_ids, [IGNORED, *d.labels[1:]]) for d in documents]
    assert sorted(found, key=lambda d: d.input_ids) == expected


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60), room=st.integers(16, 40))
def test_no_two_sequences_would_fit_into_one(lengths, room):
    sequences = packed(documents_of(lengths), room, PAD, 0)
    filled = sorted(room - sequence.input_ids.count(PAD) for sequence in sequences)
    assert len(filled) < 2 or filled[0] + filled[1] > room


def test_the_seed_decides_the_order_and_nothing_else_does():
    documents = documents_of([5, 5, 5, 7, 9, 3, 3, 8, 8, 8, 2, 2])
    assert packed(documents, 16, PAD, 1) == packed(documents, 16, PAD, 1)
    assert packed(documents, 16, PAD, 1) != packed(documents, 16, PAD, 2)


def test_documents_that_fit_exactly_leave_no_padding():
    (sequence,) = packed(documents_of([5, 3, 8]), 16, PAD, 0)
    assert PAD not in sequence.input_ids


def test_long_documents_are_placed_first_so_that_short_ones_fill_up():
    for seed in range(20):
        assert len(packed(documents_of([5, 5, 5, 3, 3, 3]), 8, PAD, seed)) == 3


def test_the_seed_decides_which_equally_long_documents_share_a_sequence():
    def partners(seed: int) -> set[frozenset[int]]:
        sequences = packed(documents_of([4] * 12), 8, PAD, seed)
        return {frozenset(token // 1000 for token in sequence.input_ids) for sequence in sequences}

    assert partners(1) == partners(1)
    assert partners(1) != partners(2)
