"""Tokens of a text that is cut at given places, so that no token lies across a cut.

Cutting where an answer begins is also what generation does: the prompt is tokenised alone and the model
goes on from there. A piece that follows another is tokenised behind a short anchor that is then removed,
because many tokenizers put a space before whatever they take for the beginning of a text. Where the
tokenizer would not have merged across the cut, the result equals tokenising the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem.errors import RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("", "\n", ":", ".", "a", "0")
_PROBES = (("a:", "b c"), ("a b", " c"), ("ab", "ab"))


class PieceTokenizer:
    """Tokenises first and following pieces. Raises RefusedError for a tokenizer that cannot do the latter."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.anchors = [(text, self.ids([text])[0]) for text in _ANCHORS]
        self.anchors = [anchor for anchor in self.anchors if self._keeps_text(anchor)]
        if not self.anchors:
            raise RefusedError(
                f"the tokenizer {type(tokenizer).__name__} does not give back its text when a text is "
                "tokenised in two pieces, so answers cannot be told from prompts; use another tokenizer."
            )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts, without a beginning or end token of the tokenizer's own."""
        if not texts:
            return []
        return [
            list(ids)
            for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        ]

    def text(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def following(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that stand behind other text."""
        found: dict[int, list[int]] = {}
        for anchor, anchor_ids in self.anchors:
            left = [i for i in range(len(texts)) if i not in found]
            for i, ids in zip(left, self.ids([anchor + texts[i] for i in left]), strict=True):
                if ids[: len(anchor_ids)] == anchor_ids:
                    found[i] = ids[len(anchor_ids) :]
        # only a piece that merges with every anchor is left; on its own it has at worst one space too many,
        # which the check of the decoded answers reports
        left = [i for i in range(len(texts)) if i not in found]
        found.update(zip(left, self.ids([texts[i] for i in left]), strict=True))
        return [found[i] for i in range(len(texts))]

    def cut(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Tokens of each piece of each text, all texts in one call to the tokenizer."""
        first = self.ids([pieces[0] for pieces in texts])
        following = iter(self.following([piece for pieces in texts for piece in pieces[1:]]))
        return [
            [ids, *(next(following) for _ in pieces[1:])] for ids, pieces in zip(first, texts, strict=True)
        ]

    def _keeps_text(self, anchor: tuple[str, list[int]]) -> bool:
        text, anchor_ids = anchor
        for before, after in _PROBES:
            whole, joined, first = self.ids([before + after, text + after, before])
            if joined[: len(anchor_ids)] != anchor_ids:
                return False
            if self.text(first + joined[len(anchor_ids) :]) != self.text(whole):
                return False
        return True
