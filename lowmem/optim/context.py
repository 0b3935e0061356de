"""What a rule may know about the step that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowmem.numerics.held_weights import root_mean_square_of
from lowmem.numerics.row_share import ALL_ROWS, RowShare
from lowmem.numerics.seeding import seeded_generator


class Context:
    """What a rule may know about the step it is part of; never the learning rate."""

    def __init__(
        self,
        *,
        step: int,
        name: str,
        seed: int,
        known: dict[str, tuple[int, ...]],
        stored: Mapping[str, Tensor] | None = None,
        index: int = 0,
        count: int = 1,
        on_failure: Callable[[str], None] | None = None,
        weight: Tensor | None = None,
        share: RowShare = ALL_ROWS,
    ):
        self.step = step
        """Updates of this parameter including this one: 1 at its first."""
        self.name = name
        self.seed = seed
        self.index, self.count = index, count
        """Which parameter of its group this is, and of how many."""
        self.share = share
        """Of the matrix' rows, which gradient, state and weight have."""
        self._known = known
        self._stored = {} if stored is None else stored
        self._on_failure = on_failure
        self._weight = weight

    def generator(self, device: torch.device, purpose: str) -> torch.Generator:
        """Random numbers fixed by (seed, parameter name, step, purpose): the same after a resume."""
        return seeded_generator(device, self.seed, self.name, self.step, purpose)

    def ask(self, condition: Tensor, *, assume: bool) -> bool:
        """Read one truth value from the device; `assume` answers where tensors hold no values."""
        if isinstance(condition, FakeTensor) or condition.is_meta:
            return assume
        return bool(condition)

    def knows(self, fact: str) -> bool:
        """Whether `remember(fact)` was called for this parameter since the state was made or loaded."""
        return fact in self._known

    def remember(self, fact: str, numbers: tuple[int, ...] = ()) -> None:
        """Keep an answer that stays true, so that the device is asked once and not at every step."""
        self._known[fact] = numbers

    def forget(self) -> None:
        """Know nothing any more, as after a load: state has come from elsewhere."""
        self._known.clear()

    def numbers(self, slot: str, count: int) -> tuple[int, ...]:
        """The `count` whole numbers in scalar `slot`, in Python; zeros before the state is made.

        The device is read once after a load; who changes the slot tells by `remember(slot, numbers)`.
        Where tensors hold no values, the numbers are those that a new state has.
        """
        if slot not in self._known:
            tensor = self._stored.get(slot)
            if tensor is None or isinstance(tensor, FakeTensor) or tensor.is_meta:
                self._known[slot] = (0,) * count
            else:
                self._known[slot] = tuple(map(int, tensor.flatten().tolist()))
        return self._known[slot]

    def at_step(self, step: int) -> Context:
        """The same context with another step number, for a rule inside a rule."""
        return Context(
            step=step,
            name=self.name,
            seed=self.seed,
            known=self._known,
            stored=self._stored,
            index=self.index,
            count=self.count,
            on_failure=self._on_failure,
            weight=self._weight,
            share=self.share,
        )

    def weight_rms(self) -> Tensor:
        """Root mean square of the weight before this update, a float32 scalar on its device."""
        assert self._weight is not None
        return root_mean_square_of(self._weight, self.share)

    def watch(self, failures: list[str], work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `work` gives; reasons that it tells to `failed` are added to `failures`, too."""
        told = self._on_failure

        def tell(reason: str) -> None:
            failures.append(reason)
            if told is not None:
                told(reason)

        self._on_failure = tell
        try:
            return work()
        finally:
            self._on_failure = told

    def failed(self, reason: str) -> None:
        """Have it counted that a decomposition did not converge and that what was there before stays."""
        if self._on_failure is not None:
            self._on_failure(reason)
