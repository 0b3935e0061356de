"""Masks of single conversations, and what they train."""

from __future__ import annotations

import itertools
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowmem.data.bad_rows import RowError
from lowmem.data.example import IGNORED
from lowmem.data.masking import Masked, masked
from lowmem.data.pieces import PieceTokenizer
from lowmem.data.rendering import ChatTemplate
from lowmem.data.turns import rendered
from tests.data.small_tokenizers import EXACT

PIECES = {name: PieceTokenizer(make()) for name, make in EXACT.items()}
ASK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " Because. \n"}]


def mask(
    pieces: PieceTokenizer,
    template: ChatTemplate,
    messages: list[dict[str, str]],
    train_on: str = "assistant",
) -> Masked:
    conversation = rendered(template, messages, only_last=train_on != "assistant")
    (found,) = masked(pieces, [conversation], train_on)  # type: ignore[arg-type]
    if isinstance(found, RowError):
        raise found
    return found


def trained_runs(tokenizer: PreTrainedTokenizerBase, found: Masked) -> list[str]:
    """What is trained, each stretch decoded by itself."""
    pairs = zip(found.example.input_ids, found.example.labels, strict=True)
    runs = [
        (trained, [i for i, _ in run]) for trained, run in itertools.groupby(pairs, lambda p: p[1] != IGNORED)
    ]
    return [tokenizer.decode(ids) for trained, ids in runs if trained]


def own_template(tmp_path: Path, source: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    path = tmp_path / "own.jinja"
    path.write_text(source)
    return ChatTemplate(str(path), tokenizer)
