"""What PyTorch's CUDA caching allocator takes from the device for a sequence of allocations and frees.

The rules are those of c10/cuda/CUDACachingAllocator.cpp in torch 2.11 to 2.13, default settings, one stream:

- A request is rounded up to 512 bytes. Up to 1 MiB it is served by the small pool, above by the large one.
- The smallest free block of the pool that holds it serves it, of equal ones that with the lowest address.
- When none does, a new segment is taken from the device: 2 MiB for the small pool, 20 MiB for a request
  under 10 MiB, the request rounded up to 2 MiB above. It is one free block.
- The block is split when the rest is worth a block: 512 bytes in the small pool, more than 1 MiB in the
  large one. Otherwise the request holds all of it, and all of it counts as allocated.
- A freed block merges with the free blocks beside it in its segment. Segments are never given back.

With expandable segments (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True) each pool is one segment that
grows at its end by pages of 2 MiB (small) or 20 MiB (large), just so far that its last free block and the
new pages hold the request. The large pool splits at 512 bytes too. A block at the end counts as bigger than
it is, for it can grow: where it is the best fit and a bigger block is free elsewhere, the next bigger one
serves the request.

Not modelled: more than one stream, the private pools of CUDA graphs and MemPool, garbage collection and the
other settings of PYTORCH_CUDA_ALLOC_CONF, and what happens when the device is full: PyTorch then gives back
every segment that is wholly free and tries again, so a run can pass on a card that is smaller than the
reserved bytes here. The driver decides where segments lie; here each lies above the one before, which
matters only between free blocks of equal size.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

from lowmem.memory.ledger import ALLOCATION_BYTES, rounded

_MIB = 2**20

SMALL_REQUEST_BYTES = _MIB
"""The largest request of the small pool. What is left of a block of the large pool must exceed it."""

SMALL_SEGMENT_BYTES = 2 * _MIB
LARGE_SEGMENT_BYTES = 20 * _MIB

OWN_SEGMENT_BYTES = 10 * _MIB
"""From here on a request without a free block takes a segment for itself, rounded to SEGMENT_ROUND_BYTES."""

SEGMENT_ROUND_BYTES = 2 * _MIB

_LARGE_POOL_ADDRESS = 2**60
"""Where the large pool's expandable segment begins: more than the small one can ever reach."""


class CachingAllocator:
    """The counters of one device, in bytes, as the allocator itself keeps them.

    `allocated_bytes` is torch.cuda.memory_allocated: the blocks that requests hold. A block of the large pool
    may be up to 1 MiB larger than its request. `reserved_bytes` is torch.cuda.memory_reserved.
    """

    def __init__(self, *, expandable: bool = False):
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0
        self.reserved_bytes = 0
        self._expandable = expandable
        self._small = _Pool(is_small=True, split_from=ALLOCATION_BYTES, end=0)
        self._large = _Pool(
            is_small=False,
            split_from=ALLOCATION_BYTES if expandable else SMALL_REQUEST_BYTES + 1,
            end=_LARGE_POOL_ADDRESS,
        )
        self._device_end = 0
        self._live: dict[Hashable, _Block | None] = {}

    @property
    def peak_reserved_bytes(self) -> int:
        """The same as `reserved_bytes`, for segments are never given back."""
        return self.reserved_bytes

    def malloc(self, key: Hashable, nbytes: int) -> None:
        """Give `key` a block of at least `nbytes`, or none for zero bytes.

        Raises ValueError for a key that still holds one and for negative sizes.
        """
        if key in self._live:
            raise ValueError(f"{key!r} is allocated already; free it first")
        if nbytes <= 0:
            if nbytes < 0:
                raise ValueError(f"{key!r} asks for {nbytes} bytes")
            self._live[key] = None
            return
        size = rounded(nbytes)
        pool = self._small if size <= SMALL_REQUEST_BYTES else self._large
        block = pool.take_best_fit(size, prefer_inner=self._expandable)
        if block is None:
            block = self._grow(pool, size) if self._expandable else self._new_segment(pool, size)
        if block.size - size >= pool.split_from:
            block = pool.split(block, size)
        block.is_free = False
        self._live[key] = block
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def free(self, key: Hashable) -> None:
        """Take back the block of `key`. Raises KeyError for a key that holds none."""
        block = self._live.pop(key)
        if block is not None:
            self.allocated_bytes -= block.size
            block.pool.give_back(block)

    def extent(self, key: Hashable) -> tuple[int, int]:
        """(address, bytes) of the block that `key` holds; (0, 0) after a request for zero bytes."""
        block = self._live[key]
        return (0, 0) if block is None else (block.address, block.size)

    def _new_segment(self, pool: _Pool, size: int) -> _Block:
        if pool.is_small:
            nbytes = SMALL_SEGMENT_BYTES
        elif size < OWN_SEGMENT_BYTES:
            nbytes = LARGE_SEGMENT_BYTES
        else:
            nbytes = rounded(size, SEGMENT_ROUND_BYTES)
        block = _Block(pool, self._device_end, nbytes)
        self._device_end += nbytes
        self.reserved_bytes += nbytes
        return block

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """The block at the end of the pool's segment, grown to hold `size` bytes, out of the free ones."""
        last = pool.last
        page = SMALL_SEGMENT_BYTES if pool.is_small else LARGE_SEGMENT_BYTES
        spare = last.size if last is not None and last.is_free else 0
        nbytes = rounded(size - spare, page)
        if last is not None and last.is_free:
            pool.forget(last)
            last.size += nbytes
            block = last
        else:
            block = _Block(pool, pool.end, nbytes)
            if last is not None:
                last.after, block.before = block, last
            pool.last = block
        pool.end += nbytes
        self.reserved_bytes += nbytes
        return block


class _Block:
    """A range of one segment; `before` and `after` are the blocks that touch it there."""

    __slots__ = ("address", "after", "before", "is_free", "pool", "size")

    def __init__(self, pool: _Pool, address: int, size: int):
        self.pool = pool
        self.address = address
        self.size = size
        self.is_free = True
        self.before: _Block | None = None
        self.after: _Block | None = None

    def swallow_before(self, before: _Block) -> None:
        self.address = before.address
        self.size += before.size
        self.before = before.before
        if self.before is not None:
            self.before.after = self


class _Pool:
    """The free blocks for requests of one kind, and where its expandable segment ends, if it is one.

    Where two blocks become one or one becomes two, the upper one keeps its identity, so that the segment's
    `last` block stays the same object until the segment grows.
    """

    def __init__(self, *, is_small: bool, split_from: int, end: int):
        self.is_small = is_small
        self.split_from = split_from
        self.last: _Block | None = None
        self.end = end
        self._free: list[tuple[int, int, _Block]] = []  # sorted; no two share an address

    def take_best_fit(self, size: int, *, prefer_inner: bool) -> _Block | None:
        free = self._free
        index = bisect_left(free, (size,))
        if index == len(free):
            return None
        if prefer_inner and free[index][2] is self.last and index + 1 < len(free):
            index += 1
        return free.pop(index)[2]

    def split(self, block: _Block, size: int) -> _Block:
        """A block of the first `size` bytes; the rest of `block` is free."""
        first = _Block(self, block.address, size)
        first.before, first.after = block.before, block
        if first.before is not None:
            first.before.after = first
        block.before = first
        block.address += size
        block.size -= size
        insort(self._free, (block.size, block.address, block))
        return first

    def give_back(self, block: _Block) -> None:
        before, after = block.before, block.after
        if before is not None and before.is_free:
            self.forget(before)
            block.swallow_before(before)
        if after is not None and after.is_free:
            self.forget(after)
            after.swallow_before(block)
            block = after
        block.is_free = True
        insort(self._free, (block.size, block.address, block))

    def forget(self, block: _Block) -> None:
        """`block` is no longer among the free ones."""
        del self._free[bisect_left(self._free, (block.size, block.address))]
