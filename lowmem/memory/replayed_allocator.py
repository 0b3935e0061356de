"""What CUDA's caching allocator would have reserved for the ledgers of several steps, one after the other."""

from __future__ import annotations

from itertools import count

from lowmem.memory.caching_allocator import CachingAllocator
from lowmem.memory.ledger import Ledger, Life


class ReplayedAllocator:
    """One process's allocator from its start: what lives on after a step keeps its block in the next."""

    def __init__(self) -> None:
        self._allocator = CachingAllocator()
        self._handles = count()
        self._held: dict[int, tuple[int, int]] = {}  # storage -> its block and its bytes, between steps

    def after_step(self, ledger: Ledger) -> tuple[int, int]:
        """Allocate and free as this step did.

        Returns the most bytes allocated during the step, blocks counted whole, and the bytes reserved so far,
        which never become fewer.
        """
        allocator = self._allocator
        residents = {life.key: nbytes for life, nbytes in ledger.residents}
        for key, (handle, nbytes) in list(self._held.items()):
            if residents.get(key) != nbytes:  # freed between the steps
                allocator.free(handle)
                del self._held[key]
        blocks: dict[Life, tuple[int, int]] = {}
        peak_bytes = 0
        for life, nbytes in ledger.residents:
            if life.key not in self._held:
                self._held[life.key] = self._block(nbytes)
            blocks[life] = self._held[life.key]
        for life, change in ledger.changes:
            block = blocks.pop(life, None)
            nbytes = 0 if block is None else block[1]
            if block is not None:
                allocator.free(block[0])
            if block is None or nbytes + change > 0:
                blocks[life] = self._block(nbytes + change)
                peak_bytes = max(peak_bytes, allocator.allocated_bytes)
        self._held = {life.key: block for life, block in blocks.items()}
        return peak_bytes, allocator.reserved_bytes

    def _block(self, nbytes: int) -> tuple[int, int]:
        handle = next(self._handles)
        self._allocator.malloc(handle, nbytes)
        return handle, nbytes
