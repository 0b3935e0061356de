"""What processes send each other so that matrices are updated, and what they hold meanwhile. Imports no torch.

Where a matrix is updated by rows, sums in float32 are all that is sent. Gradient and weight of another go to its owner
and the new weight comes back, each less what its owner has of it, so that process k sends in a step, in values, over
all matrices of N values of which it has N_k:

    2 N_k         of each that another owns
    N - N_k       of each that it owns

With equal pieces and owners who have about as much to do that is 3 N (W - 1) / W^2 of each matrix. A matrix that its
owner has all of is not sent. Matrices come together in batches; a process then holds

    2 N           of each matrix of the batch that it owns and has not all of: gradient and weight
    what it sends and what it receives, before these are put in place; later the update's temporaries instead
"""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.memory.divided_pieces import Division, Shown
from lowmem.memory.divided_state import total_of_each
from lowmem.memory.step_formulas import update_bytes

BATCH_NUMEL = 1 << 26
"""Values of whole matrices that come together at one time at each owner; as in `lowmem.run.layouts`."""


def sent_values(shown: Sequence[Shown], processes: int) -> list[int]:
    """That each process sends to owners and back in a step; a test holds it equal to what `PieceOptimizer` counts."""
    sent = [each for group in shown for each in group if each.is_sent]
    total = total_of_each(sent, processes, key=lambda _: None, of=lambda _, size: 2 * size)
    for each in sent:
        assert each.owner is not None
        own = each.sizes[each.owner]
        total[each.owner] += each.numel - own - 2 * own
    return total


def summed_values(shown: Sequence[Shown]) -> int:
    """That are added up over all processes in a step, in updates by rows, where no basis is refreshed."""
    return sum(each.on_rows.summed for group in shown for each in group if each.on_rows is not None)


def sent_bytes(shown: Sequence[Shown], processes: int, itemsize: int) -> list[int]:
    """That each process sends in a step without a refresh: for whole matrices, and for sums as around a ring."""
    summed = 2 * summed_values(shown) * (processes - 1) // processes
    return [itemsize * values + 4 * summed for values in sent_values(shown, processes)]


def batches(group: Shown) -> list[Shown]:
    """The matrices of what is shown that are sent, as they come together."""
    found: list[Shown] = []
    load: dict[int, int] = {}
    for each in group:
        if each.owner is None or not each.is_sent:
            continue
        if not found or (each.owner in load and load[each.owner] + each.numel > BATCH_NUMEL):
            found.append([])
            load = {}
        found[-1].append(each)
        load[each.owner] = load.get(each.owner, 0) + each.numel
    return found


def exchange_bytes(shown: Sequence[Shown], processes: int, itemsize: int, *, on_cuda: bool) -> list[int]:
    """At the fullest moment of an optimizer's step in each process, beside weights, gradients and state."""
    updates = _Updates(itemsize, on_cuda)
    by_piece = [updates.of(each) for group in shown for each in group if each.owner is None]
    fullest = [max(by_piece, default=0)] * processes
    for group in shown:
        for each in group:
            if each.owner is not None:
                fullest[each.owner] = max(fullest[each.owner], updates.of(each))
        for batch in batches(group):
            here = _of_batch(batch, processes, itemsize, updates)
            fullest = [max(known, found) for known, found in zip(fullest, here, strict=True)]
    return fullest


def updated_one_after_another(shown: Sequence[Shown]) -> int:
    """Values of matrices that pass one after another: of each batch those of the owner with most of them.

    And of matrices that are not sent, which every owner updates without waiting, those of the owner with most.
    """
    total = 0
    for group in shown:
        alone = [each for each in group if each.owner is not None and not each.is_sent]
        for batch in (*batches(group), alone):
            load: dict[int | None, int] = {}
            for each in batch:
                load[each.owner] = load.get(each.owner, 0) + each.numel
            total += max(load.values(), default=0)
    return total


class _Updates:
    """Temporaries of updates, alike for matrices of one shape."""

    def __init__(self, itemsize: int, on_cuda: bool):
        self._itemsize, self._on_cuda = itemsize, on_cuda
        self._known: dict[object, int] = {}

    def of(self, division: Division) -> int:
        own, shape = division.treatment, division.treatment.parameter.shape
        key = (id(own.settings), shape)
        if key not in self._known:
            self._known[key] = update_bytes(
                own.algorithm, own.settings, shape, self._itemsize, on_cuda=self._on_cuda
            )
            if (
                division.on_rows is not None and division.on_rows.whole_every
            ):  # a basis, from the whole gradient
                self._known[key] += division.numel * self._itemsize
        return self._known[key]


def _of_batch(batch: Shown, processes: int, itemsize: int, updates: _Updates) -> list[int]:
    whole, updating = [0] * processes, [0] * processes
    sent = [each for each in batch if each.is_sent]
    moved = total_of_each(sent, processes, key=lambda _: None, of=lambda _, size: size)
    for each in batch:
        assert each.owner is not None
        updating[each.owner] = max(updating[each.owner], updates.of(each))
    for each in sent:
        assert each.owner is not None
        whole[each.owner] += 2 * each.numel
        # Of its own it receives what it has not, and sends nothing.
        moved[each.owner] += each.numel - 2 * each.sizes[each.owner]
    return [
        itemsize * held + max(itemsize * beside, temporary)
        for held, beside, temporary in zip(whole, moved, updating, strict=True)
    ]
