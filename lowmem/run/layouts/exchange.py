"""Pieces of matrices to the process that updates them, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.run.layouts.pieces import Piece

BATCH_NUMEL = 1 << 26
"""Values of whole matrices that come together at one time at each owner; a larger matrix comes alone."""


class Exchange:
    """Moves the pieces of a batch of parameters, each with an owner, by one all-to-all a direction.

    A piece that is with its owner is not sent. `sent` counts the values that this process has sent.
    """

    def __init__(self, pieces: Sequence[Piece], owners: Sequence[int], group: dist.ProcessGroup | None):
        self._pieces, self._owners, self._group = pieces, owners, group
        self._rank, self._processes = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0

    def to_owners(self, values: Sequence[Tensor]) -> list[Tensor | None]:
        """`values` are this process' pieces; gives the whole flat parameters that it owns, None for the others.

        A parameter of which it holds everything is the tensor that was given.
        """
        gathered: list[Tensor | None] = []
        for piece, owner, value in zip(self._pieces, self._owners, values, strict=True):
            if owner != self._rank or piece.numel_at(owner) == piece.numel:
                gathered.append(value if owner == self._rank else None)
                continue
            whole = value.new_empty(piece.numel)
            start, stop = piece.ranges[owner]
            whole[start:stop] = value
            gathered.append(whole)
        if not any(self._is_split(piece) for piece in self._pieces):
            return gathered
        arrived = self._all_to_all(values, [self._theirs(rank) for rank in range(self._processes)])
        for rank, flat in enumerate(arrived):
            at = 0
            for index in self._mine_from(rank):
                start, stop = self._pieces[index].ranges[rank]
                whole_or_none = gathered[index]
                assert whole_or_none is not None
                whole_or_none[start:stop] = flat[at : at + stop - start]
                at += stop - start
        return gathered

    def from_owners(self, wholes: Sequence[Tensor | None], targets: Sequence[Tensor]) -> None:
        """Write this process' piece of each parameter into `targets`; `wholes` are the parameters that it owns."""
        for piece, owner, whole, target in zip(self._pieces, self._owners, wholes, targets, strict=True):
            if whole is not None and owner == self._rank and whole is not target:
                start, stop = piece.ranges[owner]
                target.copy_(whole[start:stop])
        if not any(self._is_split(piece) for piece in self._pieces):
            return
        out: list[list[Tensor]] = []
        for rank in range(self._processes):
            out.append([])
            for index in self._mine_from(rank):
                whole_or_none = wholes[index]
                assert whole_or_none is not None
                start, stop = self._pieces[index].ranges[rank]
                out[-1].append(whole_or_none[start:stop])
        arrived = self._send(
            targets, out, [self._numel(self._theirs(rank)) for rank in range(self._processes)]
        )
        for rank, flat in enumerate(arrived):
            at = 0
            for index in self._theirs(rank):
                numel = self._pieces[index].numel_at(self._rank)
                targets[index].copy_(flat[at : at + numel])
                at += numel

    def _is_split(self, piece: Piece) -> bool:
        return len(piece.holders) > 1

    def _theirs(self, owner: int) -> list[int]:
        """Which parameters this process has pieces of that `owner`, another one, updates."""
        if owner == self._rank:
            return []
        return [
            index
            for index, piece in enumerate(self._pieces)
            if self._owners[index] == owner and piece.numel_at(self._rank)
        ]

    def _mine_from(self, rank: int) -> list[int]:
        """Which parameters of this process' `rank`, another one, has pieces of."""
        if rank == self._rank:
            return []
        return [
            index
            for index, piece in enumerate(self._pieces)
            if self._owners[index] == self._rank and piece.numel_at(rank)
        ]

    def _numel(self, indices: Sequence[int]) -> int:
        return sum(self._pieces[index].numel_at(self._rank) for index in indices)

    def _all_to_all(self, values: Sequence[Tensor], wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        out = [[values[index] for index in indices] for indices in wanted]
        sizes = [
            sum(self._pieces[index].numel_at(rank) for index in self._mine_from(rank))
            for rank in range(self._processes)
        ]
        return self._send(values, out, sizes)

    def _send(self, like: Sequence[Tensor], out: list[list[Tensor]], sizes: list[int]) -> list[Tensor]:
        """`out` has what goes to each process, `sizes` how much comes from each."""
        flat = [piece for pieces in out for piece in pieces]
        kept = torch.cat(flat) if flat else like[0].new_empty(0)
        sent = kept.to(device_to_talk_on(kept.device, self._group))
        received = sent.new_empty(sum(sizes))
        counts = [sum(piece.numel() for piece in pieces) for pieces in out]
        dist.all_to_all_single(received, sent, sizes, counts, group=self._group)
        self.sent += sent.numel()
        return list(received.to(kept.device).split(sizes))


def device_to_talk_on(device: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """`device` where the group's backend takes its tensors: NCCL takes none of those that are kept on the host."""
    talks: list[torch.device] = (dist.group.WORLD if group is None else group)._device_types  # type: ignore[union-attr]
    types = [each.type for each in talks]
    return device if device.type in types else torch.device(types[0])


def batches_of(pieces: Sequence[Piece], owners: Sequence[int]) -> list[slice]:
    """Neighbours that come together at one time, so that their owners work at the same time."""
    found, start = [], 0
    load: dict[int, int] = {}
    for index, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
        if owner in load and load[owner] + piece.numel > BATCH_NUMEL:
            found.append(slice(start, index))
            start, load = index, {}
        load[owner] = load.get(owner, 0) + piece.numel
    return [*found, slice(start, len(pieces))] if pieces else []
