"""What the chunked loss allocates and computes, counted at the dispatcher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.hf.chunked_loss import use_chunked_loss
from lowmem.hf.tiled_cross_entropy import TILE_BYTES, columns_per_tile, tiled_cross_entropy
from tests.hf.tiny_models import tiny_model

TOKENS, HIDDEN, VOCABULARY = 64, 16, 1003
COLUMNS = 64


class AllocationLog(TorchDispatchMode):
    """Every storage that an operation returns and that did not come in with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[tuple[int, torch.dtype]] = []  # elements, dtype
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.allocations.append((x.untyped_storage().nbytes() // x.element_size(), x.dtype))
        return result

    @property
    def products(self) -> int:
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_"))


def one_step(*, chunked: bool, dtype: torch.dtype = torch.bfloat16) -> AllocationLog:
    model = tiny_model(vocab_size=VOCABULARY, dtype=dtype)
    # Its gradient has the same size as the head's and would be mistaken for it.
    model.get_input_embeddings().weight.requires_grad_(False)
    if chunked:
        use_chunked_loss(model, tile_bytes=4 * TOKENS * COLUMNS)
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with AllocationLog() as log:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.lm_head.weight.grad is not None
    return log


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made() -> None:
    whole = (TOKENS - 1) * VOCABULARY
    assert max(elements for elements, _ in one_step(chunked=False).allocations) >= whole
    largest = sorted(elements for elements, _ in one_step(chunked=True).allocations)[-2:]
    assert largest[1] == VOCABULARY * HIDDEN
    assert largest[0] <= TOKENS * COLUMNS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_gradient_is_allocated_once_in_the_weights_dtype(dtype: torch.dtype) -> None:
    log = one_step(chunked=True, dtype=dtype)
    assert [found for elements, found in log.allocations if elements >= VOCABULARY * HIDDEN] == [dtype]


def head_step(tile_bytes: int, *, frozen: bool = False, ignored: int = 0) -> AllocationLog:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS - ignored, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=not frozen)
    labels = torch.randint(VOCABULARY, (TOKENS - ignored,), generator=generator)
    with AllocationLog() as log:
        tiled_cross_entropy(x, weight, None, labels, tile_bytes=tile_bytes).backward()
    return log


def test_a_single_tile_is_computed_once_and_several_are_computed_twice() -> None:
    tiles = -(-VOCABULARY // COLUMNS)
    assert head_step(TILE_BYTES).products == 3
    assert head_step(4 * TOKENS * COLUMNS).products == 4 * tiles


def test_a_frozen_head_costs_no_weight_gradient() -> None:
    tiles = -(-VOCABULARY // COLUMNS)
    log = head_step(4 * TOKENS * COLUMNS, frozen=True)
    assert log.products == 3 * tiles
    assert max(elements for elements, _ in log.allocations) <= TOKENS * COLUMNS


def test_ignored_tokens_never_reach_the_head() -> None:
    model = tiny_model(vocab_size=VOCABULARY)
    use_chunked_loss(model)
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-5] = -100
    with AllocationLog() as log:
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    assert (5 * VOCABULARY, torch.float32) in log.allocations
    assert max(elements for elements, _ in log.allocations) == VOCABULARY * HIDDEN


@pytest.mark.parametrize("num_tokens", [0, 1, 100, 2048, 4096, 16384, 131072])
def test_a_tile_of_float32_logits_stays_within_32_mib(num_tokens: int) -> None:
    columns = columns_per_tile(num_tokens, TILE_BYTES)
    assert 4 * num_tokens * columns <= 32 * 2**20
    assert columns % 64 == 0
    assert 4 * num_tokens * (columns + 64) > 32 * 2**20 or num_tokens <= 1
