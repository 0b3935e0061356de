"""An allocator for the CPU with CUDA's counters: every storage an operator makes, in blocks of 512 bytes."""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedAllocator(TorchDispatchMode):
    def __init__(self, residents: list[Tensor]):
        super().__init__()
        self._seen: dict[int, weakref.ref] = {}
        self._now = self._peak = 0
        self.retries = 0
        self.context_bytes = 400 * 1024**2
        self.waited = 0
        for tensor in residents:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, blocks = storage._cdata, (storage.nbytes() + 511) // 512
        if key in self._seen:
            return

        def freed(_: object) -> None:
            del self._seen[key]
            self._now -= blocks * 512

        self._seen[key] = weakref.ref(storage, freed)
        self._now += blocks * 512
        self._peak = max(self._peak, self._now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def wait(self) -> None:
        self.waited += 1

    def allocated(self) -> tuple[int, int]:
        return self._now, self._peak

    def peak_reserved(self) -> int:
        segment = 2 * 1024**2
        return -(-self._peak // segment) * segment

    def reset_peaks(self) -> None:
        self._peak = self._now

    def num_retries(self) -> int:
        return self.retries

    def device_used(self) -> int:
        return self.peak_reserved() + self.context_bytes


def allocator_for(model: nn.Module, *batches: Tensor) -> CountedAllocator:
    return CountedAllocator([*model.parameters(), *model.buffers(), *batches])
