from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowmem.data.documents import BLOCK_CHARACTERS, chunked_documents
from lowmem.data.example import IGNORED, Example
from lowmem.data.lengths import last_tokens, shortened
from lowmem.data.pieces import PieceTokenizer
from tests.data import small_tokenizers

BOS = 1
LONG = Example([BOS, *range(10, 20)], [IGNORED] * 5 + list(range(14, 20)))


def test_what_fits_is_left_alone():
    for policy in ("drop", "truncate_left", "truncate_right"):
        assert shortened(LONG, 11, policy, BOS) is LONG


def test_drop_drops():
    assert shortened(LONG, 10, "drop", BOS) is None


def test_truncate_right_keeps_the_beginning():
    assert shortened(LONG, 6, "truncate_right", BOS) == Example(
        [BOS, 10, 11, 12, 13, 14], [IGNORED] * 5 + [14]
    )


def test_truncate_left_keeps_the_end_and_the_beginning_token():
    assert shortened(LONG, 4, "truncate_left", BOS) == Example([BOS, 17, 18, 19], [IGNORED, 17, 18, 19])
    assert shortened(LONG, 4, "truncate_left", None) == Example([16, 17, 18, 19], [IGNORED, 17, 18, 19])
    assert shortened(LONG, 4, "truncate_left", 5) == Example([16, 17, 18, 19], [IGNORED, 17, 18, 19])


def test_a_prompt_keeps_its_end():
    assert last_tokens([BOS, 10, 11, 12], 3, BOS) == [BOS, 11, 12]
    assert last_tokens([10, 11, 12], 3, BOS) == [10, 11, 12]
    assert last_tokens([], 3, BOS) == []


@given(
    texts=st.lists(st.text("ab \ncé", min_size=1, max_size=80), min_size=1, max_size=4),
    max_length=st.integers(8, 40),
)
def test_chunks_of_a_text_are_all_of_it_in_order(texts, max_length):
    tokenizer = small_tokenizers.llama()
    found = chunked_documents(PieceTokenizer(tokenizer), texts, max_length)
    for text, documents in zip(texts, found, strict=True):
        tokens = []
        for document in documents:
            assert 2 <= len(document.input_ids) <= max_length
            assert document.input_ids[0] == BOS
            assert document.labels == [IGNORED, *document.input_ids[1:]]
            tokens += document.input_ids[1:]
        assert all(len(document.input_ids) == max_length for document in documents[:-1])
        assert [BOS, *tokens] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_without_a_beginning_token_a_remainder_of_one_token_is_left_out():
    tokenizer = small_tokenizers.characters()
    (documents,) = chunked_documents(PieceTokenizer(tokenizer), ["a" * 16], 8)
    assert [len(document.input_ids) for document in documents] == [8, 8]  # the end token alone is no document
    (documents,) = chunked_documents(PieceTokenizer(tokenizer), ["a" * 17], 8)
    assert [len(document.input_ids) for document in documents] == [8, 8, 2]


def test_a_text_with_its_own_marks_gets_no_second_ones():
    tokenizer = small_tokenizers.llama()
    (documents,) = chunked_documents(PieceTokenizer(tokenizer), ["<s>Hello</s>"], 32)
    ids = documents[0].input_ids
    assert ids.count(BOS) == ids.count(tokenizer.eos_token_id) == 1


def test_a_very_long_text_reads_the_same_as_in_one_piece():
    text = "Once the cat, Hello.\n" * (3 * BLOCK_CHARACTERS // 20)
    for make in (small_tokenizers.llama, small_tokenizers.byte_level):
        pieces = PieceTokenizer(make())
        (documents,) = chunked_documents(pieces, [text], 10**9)
        read = pieces.text(documents[0].input_ids)
        assert read.removeprefix("<s> ").removesuffix(make().eos_token) == text
