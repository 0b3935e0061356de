"""Tokens of a text that is cut at given places, so that no token lies across a cut.

Cutting where an answer begins is also what generation does: the prompt is tokenised alone and the model
goes on from there. A piece that follows another is tokenised behind a short anchor that is then removed
(the added token before it, where there is one), because many tokenizers put a space before whatever they
take for the beginning of a text. Where the tokenizer would not have merged across the cut, the result
equals tokenising the whole text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem.errors import RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Anchor = tuple[str, list[int]]  # a text and its tokens

_ANCHORS = ("", "\n", ":", ".", "a", "0")
_PROBES = (("a:", "b c"), ("a b", " c"), ("ab", "ab"))


class PieceTokenizer:
    """Tokenises first and following pieces. Raises RefusedError for a tokenizer that cannot do the latter."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
        self._swallowing = {t.content for t in tokenizer.added_tokens_decoder.values() if t.rstrip}
        self._added_lengths = sorted({len(content) for content in self._added}, reverse=True)
        anchors = [(text, self.ids([text])[0]) for text in _ANCHORS]
        self.anchors = [anchor for anchor in anchors if self._keeps_text(anchor)]
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

    def cut(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Tokens of each piece of each text, in as few calls to the tokenizer as possible."""
        first = self.ids([pieces[0] for pieces in texts])
        seams = [seam for pieces in texts for seam in itertools.pairwise(pieces)]
        following = iter(self._following(seams))
        return [
            [ids, *(next(following) for _ in pieces[1:])] for ids, pieces in zip(first, texts, strict=True)
        ]

    def follows_special(self, text: str) -> Anchor | None:
        """The added token that `text` ends with, where there is one.

        Many tokenizers treat what stands behind it like the beginning of a text.
        """
        bare = text.rstrip()
        for length in self._added_lengths:
            end, bare_end = text[-length:], bare[-length:]
            if end in self._added:
                return end, [self._added[end]]
            if bare_end in self._swallowing:
                return bare_end, [self._added[bare_end]]
        return None

    def _following(self, seams: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Tokens of the second text of each pair, as they stand behind the first."""
        special = [self.follows_special(before) for before, _ in seams]
        tries = [([anchor] if anchor else []) + self.anchors for anchor in special]
        found: dict[int, list[int]] = {}
        for attempt in range(len(self.anchors) + 1):
            left = [i for i in range(len(seams)) if i not in found and attempt < len(tries[i])]
            joined = self.ids([tries[i][attempt][0] + seams[i][1] for i in left])
            for i, ids in zip(left, joined, strict=True):
                anchor_ids = tries[i][attempt][1]
                if ids[: len(anchor_ids)] == anchor_ids:
                    found[i] = ids[len(anchor_ids) :]
        # only a piece that merges with every anchor is left; on its own it has at worst one space too many,
        # which the check of the decoded answers reports
        left = [i for i in range(len(seams)) if i not in found]
        found.update(zip(left, self.ids([seams[i][1] for i in left]), strict=True))
        return [found[i] for i in range(len(seams))]

    def _keeps_text(self, anchor: Anchor) -> bool:
        text, anchor_ids = anchor
        for before, after in _PROBES:
            whole, joined, first = self.ids([before + after, text + after, before])
            if joined[: len(anchor_ids)] != anchor_ids:
                return False
            if self.text(first + joined[len(anchor_ids) :]) != self.text(whole):
                return False
        return True
