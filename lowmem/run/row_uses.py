"""Which weights of a model can have their gradients by rows: those whose every use knows how to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lowmem.numerics.row_gradients import RowTaker
from lowmem.run.embedding_by_rows import EmbeddingByRows, is_plain_embedding


class RowUses:
    """The takers of a model's weights, put up while this exists and taken down by `remove`.

    A module says by `gives_rows` that it leaves its part of the gradient with a taker; a plain nn.Embedding is made to.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor]):
        uses: dict[Tensor, list[nn.Module]] = {param: [] for param in params}
        for module in model.modules():
            for param in module._parameters.values():
                if param is not None and param in uses:
                    uses[param].append(module)
        self._embeddings: list[nn.Module] = []
        self.takers: dict[Tensor, RowTaker] = {}
        for weight, modules in uses.items():
            if modules and weight.is_contiguous() and all(map(_can_give_rows, modules)):
                self.takers[weight] = weight.row_taker = RowTaker(weight)  # type: ignore[attr-defined]
                self._embeddings += [module for module in modules if is_plain_embedding(module)]
        for module in self._embeddings:
            module.__class__ = EmbeddingByRows

    def begin_micro_batch(self, *, is_open: bool) -> None:
        for taker in self.takers.values():
            taker.begin(is_open=is_open)

    def remove(self) -> None:
        for param in self.takers:
            del param.row_taker  # type: ignore[attr-defined]
        for module in self._embeddings:
            module.__class__ = nn.Embedding
        self.takers, self._embeddings = {}, []


def _can_give_rows(module: nn.Module) -> bool:
    return getattr(module, "gives_rows", False) or is_plain_embedding(module)
