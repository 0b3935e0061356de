"""What fits a card: the longest sequences and largest batches of each method, and changes that make a recipe fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import fits
from lowmem.memory.estimate import Estimate, estimate, estimate_method
from lowmem.memory.estimate_method import BASELINES, Method, baseline_method, recipe_method
from lowmem.memory.plan_document import Change
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import LoraRecipe, Recipe

LENGTH_STEP = 64
"""Lengths are multiples of this many tokens."""

LENGTHS = (512, 1024, 2048)
"""At which the largest batch is looked for."""

LONGEST, LARGEST_BATCH, SMALLEST_RANK = 2**20, 2**12, 8

LEANER_OPTIMIZERS = ("galore", "sgd_sai", "sgd")
"""In the order in which they are suggested."""


@dataclass(frozen=True)
class Found:
    """What one method reaches on a card with the chunked loss."""

    method: str
    """An optimizer's name, or one of BASELINES."""
    activation_checkpointing: bool
    longest: int
    """Tokens of one row; a multiple of LENGTH_STEP, 0 where none fits."""
    batches: dict[int, int]
    """Length -> the most rows at once, 0 where none fits or the model does not know so long a sequence."""


def search(
    recipe: Recipe, architecture: Architecture, card_bytes: int, *, masked: bool = True
) -> list[Found]:
    """Every optimizer and baseline, with and without activation checkpointing, without accumulation.

    The recipe's own optimizer keeps its settings; another one shares those that it has too. A recipe with
    `lora` is searched with its adapters.
    """
    recipe = _with_train(recipe, gradient_accumulation_steps=1, loss="chunked")
    methods: dict[str, Method] = {
        name: recipe_method(with_optimizer(recipe, name), architecture, on_cuda=True)
        for name in optimizer_table()
    }
    methods |= {name: baseline_method(name, recipe, architecture) for name in BASELINES}
    return [
        _found(
            name, method, _with_train(recipe, activation_checkpointing=on), architecture, card_bytes, masked
        )
        for name, method in methods.items()
        for on in (False, True)
    ]


def _found(
    name: str, method: Method, recipe: Recipe, architecture: Architecture, card_bytes: int, masked: bool
) -> Found:
    limit = architecture.longest or LONGEST

    def holds(tokens: int, rows: int) -> bool:
        work = _with_train(recipe, per_device_batch_size=rows)
        needed = estimate_method(method, work, architecture, sequence_length=tokens, masked=masked)
        return fits(needed.reserved_bytes, card_bytes)

    longest = LENGTH_STEP * largest(lambda steps: holds(LENGTH_STEP * steps, 1), limit // LENGTH_STEP)
    batches = {
        tokens: 0 if tokens > longest else largest(partial(holds, tokens), LARGEST_BATCH)
        for tokens in LENGTHS
    }
    return Found(name, recipe.train.activation_checkpointing, longest, batches)


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to `limit` that holds, 0 where none does; what holds for n holds below n too."""
    good, bad = 0, 1
    while bad <= limit and holds(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def changes_that_fit(
    recipe: Recipe, architecture: Architecture, card_bytes: int, *, masked: bool = True
) -> list[Change]:
    """Single changes of the recipe with each of which it fits the card; where there is none, one combination.

    Nothing is worth suggesting for a recipe that fits: then the list is empty. A number is the largest that
    fits. The combination is made in a fixed order, the least harmful change first, and holds none that it
    could do without; the list is empty where even all of them together do not fit.
    """
    changes = _Changes(recipe, architecture, card_bytes, masked)
    if changes.fitting({}) is not None:
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

    def fitting(self, keys: Keys) -> Change | None:
        """The change, if the recipe fits with it."""
        needed = self._needed(keys)
        if not fits(needed.reserved_bytes, self.card_bytes):
            return None
        overrides = [f"{key}={_written(value)}" for key, value in keys.items()]
        return Change(overrides, needed.peak_bytes, needed.reserved_bytes)

    def _needed(self, keys: Keys) -> Estimate:
        return estimate(with_keys(self.recipe, keys), self.architecture, masked=self.masked)

    def _fit(self, keys: Keys) -> bool:
        return fits(self._needed(keys).reserved_bytes, self.card_bytes)

    def singles(self) -> Iterator[Keys]:
        yield from self._free_of_charge()
        yield from self._smaller({}, "train.per_device_batch_size", self.recipe.train.per_device_batch_size)
        yield from self._shorter({})
        rank = self.recipe.optimizer.settings.get("rank")
        if isinstance(rank, int):
            smaller = [
                rank >> shift for shift in range(1, rank.bit_length()) if rank >> shift >= SMALLEST_RANK
            ]
            yield from ({"optimizer.rank": each} for each in smaller if self._fit({"optimizer.rank": each}))
        yield from ({"optimizer.name": name} for name in self._leaner())
        if self.recipe.lora is None:
            yield {"lora.r": 16}

    def _free_of_charge(self) -> Iterator[Keys]:
        """Changes that leave the training what it is."""
        if not self.recipe.train.activation_checkpointing:
            yield {"train.activation_checkpointing": True}
        if self.recipe.train.loss == "plain":
            yield {"train.loss": "chunked"}

    def _smaller(self, beside: Keys, key: str, now: int) -> Iterator[Keys]:
        number = largest(lambda value: self._fit({**beside, key: value}), now - 1)
        if number:
            yield {key: number}

    def _shorter(self, beside: Keys) -> Iterator[Keys]:
        key, now = "data.max_length", self.recipe.data.max_length
        steps = largest(
            lambda value: self._fit({**beside, key: LENGTH_STEP * value}), (now - 1) // LENGTH_STEP
        )
        if steps:
            yield {key: LENGTH_STEP * steps}

    def _leaner(self) -> Iterator[str]:
        names = [name for name in LEANER_OPTIMIZERS if name in optimizer_table()]
        if self.recipe.optimizer.name in names:
            names = names[names.index(self.recipe.optimizer.name) + 1 :]
        yield from names

    def combination(self) -> list[Change]:
        together: Keys = {}
        for keys in self._in_order():
            together |= keys
            for shorter in ({}, *self._shorter(together)):
                if self._fit({**together, **shorter}):
                    return [self._without_needless({**together, **shorter})]
        return []

    def _in_order(self) -> Iterator[Keys]:
        yield from self._free_of_charge()
        if self.recipe.train.per_device_batch_size > 1:
            yield {"train.per_device_batch_size": 1}
        yield from ({"optimizer.name": name} for name in self._leaner())
        if self.recipe.lora is None:
            yield {"lora.r": 16}

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


def _with_train(recipe: Recipe, **keys: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **keys))


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
