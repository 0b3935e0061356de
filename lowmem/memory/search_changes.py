"""Changes of a recipe that make it fit a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lowmem.errors import RefusedError
from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import fits, margin_bytes
from lowmem.memory.estimate import estimate
from lowmem.memory.plan_document import Change
from lowmem.memory.state_formulas import with_defaults
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import LoraRecipe, Recipe

LENGTH_STEP = 64
"""Lengths are multiples of this many tokens."""

SMALLEST_RANK = 8

LEANER_OPTIMIZERS = ("galore", "sgd_sai", "adafactor", "sgd")
"""In the order in which they are suggested."""


def largest(room: Callable[[int], int], limit: int) -> int:
    """The largest number from 1 to `limit` with room(number) >= 0, 0 where none has; room shrinks as it grows.

    Memory is nearly linear in rows and tokens, so a straight line between two tries is a good next one; where
    the same end moves twice, the other one is weighed by half, for a curve would hold it for ever.
    """
    if limit < 1 or (room_of_good := room(1)) < 0:
        return 0
    if (room_of_bad := room(limit)) >= 0:
        return limit
    good, bad, moved = 1, limit, 0
    while bad - good > 1:
        guess = good + (bad - good) * room_of_good // (room_of_good - room_of_bad)
        guess = min(max(guess, good + 1), bad - 1)
        found = room(guess)
        if found >= 0:
            good, room_of_good = guess, found
            room_of_bad = room_of_bad // 2 if moved > 0 else room_of_bad
            moved = 1
        else:
            bad, room_of_bad = guess, found
            room_of_good = room_of_good // 2 if moved < 0 else room_of_good
            moved = -1
    return good


def changes_that_fit(
    recipe: Recipe,
    architecture: Architecture,
    card_bytes: int,
    *,
    masked: bool = True,
    planned_reserved_bytes: int | None = None,
) -> list[Change]:
    """Single changes of the recipe with each of which it fits the card; where there is none, one combination.

    Nothing is worth suggesting for a recipe that fits: then the list is empty. A number is the largest that
    fits; rows are cut to less than a quarter only where nothing else is left. Keys that only do something
    together are one change. The combination is made in a fixed order, the least harmful change first, and
    holds none that it could do without; the list is empty where even all of them together do not fit.
    Raises RefusedError for a recipe whose execution cannot do what it asks for.

    planned_reserved_bytes: what a simulation of the recipe as it is found; every estimate is then corrected by
    the factor between the two.
    """
    factor = 1.0
    if planned_reserved_bytes is not None:
        factor = planned_reserved_bytes / estimate(recipe, architecture, masked=masked).reserved_bytes
    changes = _Changes(recipe, architecture, card_bytes, masked, factor)
    if fits(changes.of({}).reserved_bytes, card_bytes):
        return []
    singles = [found for keys in changes.singles() if (found := changes.fitting(keys)) is not None]
    return singles or changes.combination()


Keys = dict[str, Any]
"""Dotted key of the recipe -> new value."""


@dataclass(frozen=True)
class _Changes:
    recipe: Recipe
    architecture: Architecture
    card_bytes: int
    masked: bool
    factor: float
    """Of what a simulation reserves to what the formulas do."""

    def fitting(self, keys: Keys) -> Change | None:
        """The change, if the recipe is possible and fits with it."""
        try:
            found = self.of(keys)
        except RefusedError:
            return None
        return found if fits(found.reserved_bytes, self.card_bytes) else None

    def of(self, keys: Keys) -> Change:
        """The change, whether it is enough or not. Raises RefusedError where it makes the recipe impossible."""
        needed = estimate(with_keys(self.recipe, keys), self.architecture, masked=self.masked)
        overrides = [f"{key}={_written(value)}" for key, value in keys.items()]
        return Change(overrides, needed.peak_bytes, round(self.factor * needed.reserved_bytes))

    def _fit(self, keys: Keys) -> bool:
        return self.fitting(keys) is not None

    def _room(self, keys: Keys) -> int:
        return margin_bytes(self.of(keys).reserved_bytes, self.card_bytes)

    def singles(self) -> Iterator[Keys]:
        yield from self._free_of_charge()
        yield from self._freed_gradients()
        yield from self._offloaded()
        yield from self._fewer_rows()
        yield from self._fewer_micro_batches()
        yield from self._shorter({}, at_least=self._tolerable_length)
        yield from self._smaller_rank()
        yield from self._harmful()

    def _free_of_charge(self) -> Iterator[Keys]:
        """Changes that leave the training what it is."""
        if not self.recipe.train.activation_checkpointing:
            yield {"train.activation_checkpointing": True}
        if self.recipe.train.loss == "plain":
            yield {"train.loss": "chunked"}
        yield from ([self._leanest_execution] if self._leanest_execution else [])

    @property
    def _leanest_execution(self) -> Keys:
        return {} if self.recipe.train.execution == "auto" else {"train.execution": "auto"}

    @property
    def _no_global_clipping(self) -> Keys:
        """Without it the norm of all gradients is asked for, so all of them must be there."""
        clips = self.recipe.train.max_grad_norm is not None and self.recipe.optimizer.clip != "tensor"
        return {"optimizer.clip": "tensor"} if clips else {}

    def _freed_gradients(self) -> Iterator[Keys]:
        """Each gradient used and freed as it arrives, from one micro-batch of as many rows as the step has now."""
        train = self.recipe.train
        keys = {**self._leanest_execution, **self._no_global_clipping}
        if train.gradient_accumulation_steps > 1:
            rows = train.per_device_batch_size * train.gradient_accumulation_steps
            yield {
                "train.gradient_accumulation_steps": 1,
                "train.per_device_batch_size": rows,
                **keys,
            }
        elif self._no_global_clipping:
            yield keys

    def _offloaded(self) -> Iterator[Keys]:
        """What activation checkpointing keeps, on the host: the same bits for the price of copies."""
        train = self.recipe.train
        recomputed = {} if train.activation_checkpointing else {"train.activation_checkpointing": True}
        if not train.activation_offload and not (recomputed and self._fit(recomputed)):
            yield {**recomputed, "train.activation_offload": True}

    def _fewer_micro_batches(self) -> Iterator[Keys]:
        """The same with the rows of a micro-batch."""
        if self.recipe.train.gradient_accumulation_steps > 1:
            yield {
                "train.gradient_accumulation_steps": 1,
                **self._leanest_execution,
                **self._no_global_clipping,
            }

    def _fewer_rows(self) -> Iterator[Keys]:
        key, now = "train.per_device_batch_size", self.recipe.train.per_device_batch_size
        rows = largest(lambda value: self._room({key: value}), now - 1)
        if rows:
            yield {key: rows}

    def _smaller_rank(self) -> Iterator[Keys]:
        """The rank halved as often as it takes."""
        rank = with_defaults(self.recipe.optimizer.name, self.recipe.optimizer.settings).get("rank")
        while isinstance(rank, int) and rank >= 2 * SMALLEST_RANK:
            rank //= 2
            if self._fit({"optimizer.rank": rank}):
                yield {"optimizer.rank": rank}
                return

    def _shorter(self, beside: Keys, at_least: int) -> Iterator[Keys]:
        key, now = "data.max_length", self.recipe.data.max_length
        steps = largest(
            lambda value: self._room({**beside, key: LENGTH_STEP * value}), (now - 1) // LENGTH_STEP
        )
        if steps and LENGTH_STEP * steps >= at_least:
            yield {key: LENGTH_STEP * steps}

    def _leaner(self) -> Iterator[str]:
        names = [name for name in LEANER_OPTIMIZERS if name in optimizer_table()]
        if self.recipe.optimizer.name in names:
            names = names[names.index(self.recipe.optimizer.name) + 1 :]
        yield from names

    @property
    def _tolerable_length(self) -> int:
        """Rows that are cut shorter than this are another task."""
        return self.recipe.data.max_length // 4

    def combination(self) -> list[Change]:
        together: Keys = {}
        for keys in self._harmless():
            together |= keys
            if self._fit(together):
                return [self._without_needless(together)]
        for keys in ({}, *self._harmful()):
            together |= keys
            for shorter in ({}, *self._shorter(together, at_least=self._tolerable_length)):
                if self._fit({**together, **shorter}):
                    return [self._without_needless({**together, **shorter})]
        return [
            self._without_needless({**together, **shorter}) for shorter in self._shorter(together, at_least=1)
        ]

    def _harmless(self) -> Iterator[Keys]:
        yield from self._free_of_charge()
        if self.recipe.train.gradient_accumulation_steps == 1:
            yield from self._freed_gradients()
        yield from self._offloaded()
        if self.recipe.train.per_device_batch_size > 1:
            yield {"train.per_device_batch_size": 1}
        yield from self._fewer_micro_batches()

    def _harmful(self) -> Iterator[Keys]:
        """Another optimizer or adapters, which a recipe that asks for projected gradients may not have."""
        beside = self._leanest_execution if self.recipe.train.execution == "project" else {}
        yield from ({"optimizer.name": name, **beside} for name in self._leaner())
        if self.recipe.lora is None:
            yield {"lora.r": 16, **beside}
        elif self.recipe.model.weights == "bf16":
            yield {"model.weights": "nf4"}

    def _without_needless(self, keys: Keys) -> Change:
        for key in reversed(list(keys)):
            fewer = {other: value for other, value in keys.items() if other != key}
            if self._fit(fewer):
                keys = fewer
        found = self.fitting(keys)
        assert found is not None
        return found


def with_keys(recipe: Recipe, keys: Keys) -> Recipe:
    """The recipe with dotted keys replaced, as overrides on the command line do it."""
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if key == "optimizer.name":
            recipe = with_optimizer(recipe, value)
        elif key == "optimizer.clip":
            recipe = replace(recipe, optimizer=replace(recipe.optimizer, clip=value))
        elif section == "optimizer":
            settings = {**recipe.optimizer.settings, name: value}
            recipe = replace(recipe, optimizer=replace(recipe.optimizer, settings=settings))
        elif section == "lora":
            recipe = replace(recipe, lora=LoraRecipe(**{name: value}))
        else:
            recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})
    return recipe


def with_optimizer(recipe: Recipe, name: str) -> Recipe:
    """Another optimizer; of the settings, those stay that it has too."""
    if name == recipe.optimizer.name:
        return recipe
    known = optimizer_table()[name]["settings"]
    settings = {key: value for key, value in recipe.optimizer.settings.items() if key in known}
    return replace(recipe, optimizer=replace(recipe.optimizer, name=name, settings=settings))


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
