"""The state of an optimizer's parameters, and what is remembered of it in Python between steps.

`state[param]` holds plain tensors. Counts and facts that a step asks for are mirrored in Python, so that the device is
read once, after a load; all of that can be forgotten and read again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowmem.numerics.held_weights import numel_of, shape_of
from lowmem.numerics.seeding import seeded_generator
from lowmem.optim import registry
from lowmem.optim.codecs import Codec
from lowmem.optim.rule import Context, Rule, Turn
from lowmem.optim.storage import WHOLE, LoadedState, codec_for

log = logging.getLogger("lowmem")

STEPS = "steps"
"""In a group whose parameters take turns: how many steps it has made, whichever of them had gradients."""

REFRESHED = "refreshed_for"
"""State of a parameter whose step was left out after its refresh: the step that must not refresh again."""


class OptimizerState(torch.optim.Optimizer):
    """What `LowMemOptimizer` keeps of each parameter: made when first needed, counted, loaded, saved."""

    _skips: bool

    def state_bytes(self) -> int:
        """Bytes of optimizer state once every trainable parameter was updated, from the declarations.

        Exact, allocates nothing, and works on meta tensors. Where parameters take turns: in the coming step's turn.
        """
        total = 0
        for group in self.param_groups:
            for param in group["params"]:
                if not param.requires_grad or numel_of(param) == 0:
                    continue
                rule = self.rule_of(param, group)
                if not rule.needs_gradient:
                    continue
                codecs = self._codecs(param, group, rule)
                total += sum(codec.nbytes() for codec in codecs.values()) + 4  # and `step`
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state tensor keeps its dtype; torch's own would cast it to the weight's."""
        super().load_state_dict(state_dict)
        saved_groups = state_dict["param_groups"]
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    device = torch.device("cpu") if name in ("step", REFRESHED) else param.device
                    self.state[param][name] = value.detach().to(device, copy=True)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drop what is only remembered from the state and the groups; it is read again when needed."""
        self._steps: dict[Tensor, int] = {}
        self._known: dict[Tensor, dict[str, tuple[int, ...]]] = {}
        self._places: dict[Tensor, tuple[str, int, int]] = {}
        self._blocks: dict[Tensor, tuple[int, int]] = {}
        self._refreshed: dict[Tensor, int] = {}
        self._refreshed_in_vain: set[Tensor] = set()
        self.failed_refreshes: dict[str, int] = {}
        """How often the decomposition of a parameter's gradient did not converge, by name."""
        self._skips = False
        self.projected: dict[Tensor, Tensor] = {}
        """Gradients of the step under way in the rule's subspace; their parameters hold no `.grad`."""
        self.accumulated: dict[Tensor, int] = {}
        """How many micro-batches of the step under way were added to the state of a parameter."""

    def rule_of(self, param: Tensor, group: dict[str, Any]) -> Rule:
        """That of the coming update."""
        rule = registry.optimizer_class(group["algorithm"]).rule(group, self._whole_shape(param))
        number = turn_number(group)
        return rule if number is None else rule.in_turn(self._turn(param, group, number))

    def _whole_shape(self, param: Tensor) -> tuple[int, ...]:
        return shape_of(param)

    def _turn(self, param: Tensor, group: dict[str, Any], number: int) -> Turn:
        if param not in self._blocks:
            name = group["algorithm"]
            groups = [each for each in self.param_groups if each["algorithm"] == name]
            found = registry.optimizer_class(name).blocks([self._with_whole_shapes(each) for each in groups])
            for each, places in zip(groups, found, strict=True):
                self._blocks.update(zip(each["params"], places, strict=True))
        return Turn(number, *self._blocks[param], group["seed"])

    def _with_whole_shapes(self, group: dict[str, Any]) -> dict[str, Any]:
        """Of a piece of a parameter nobody could tell whether it is a matrix."""
        shapes = [self._whole_shape(param) for param in group["params"]]
        return {**group, "params": [torch.empty((), device="meta").expand(shape) for shape in shapes]}

    def _count_step_of_turn(self, group: dict[str, Any], params: Iterable[Tensor]) -> None:
        """After a step: where a turn ends free all its state, before any of the next turn's is made."""
        length = turn_length(group)
        if length is None:
            return
        group[STEPS] = group.get(STEPS, 0) + 1
        if group[STEPS] % length == 0:
            for param in params:
                self._forget_state_of(param)

    def _forget_state_of(self, param: Tensor) -> None:
        for remembered in (self.state, self._steps, self._known):
            remembered.pop(param, None)

    def _rounding(
        self, param: Tensor, group: dict[str, Any], ctx: Context, purpose: str
    ) -> torch.Generator | None:
        if group["rounding"] != "stochastic":
            return None
        number = turn_number(group)
        turn = () if number is None else (f"turn {number}",)  # as updates are counted from its beginning
        return seeded_generator(param.device, ctx.seed, ctx.name, ctx.step, purpose, *turn)

    def _stored(self, param: Tensor, group: dict[str, Any], rule: Rule) -> dict[str, Tensor]:
        stored = self.state[param]
        if not stored:
            for codec in self._codecs(param, group, rule).values():
                stored.update(codec.allocate(param.device))
            stored["step"] = torch.zeros((), dtype=torch.float32)
            self._steps[param] = 0
            self._known.setdefault(param, {}).clear()  # the same, for a context that was made before
        return stored

    def _codecs(self, param: Tensor, group: dict[str, Any], rule: Rule) -> dict[str, Codec]:
        formats = storage_formats(group)
        return {
            name: codec_for(name, slot, formats, param.dtype)
            for name, slot in rule.slots(shape_of(param)).items()
        }

    def _next_context(self, param: Tensor, group: dict[str, Any]) -> Context:
        """Count the update. The count is mirrored in Python so that the tensor is read once, after a load."""
        ctx = self.coming_context(param, group)
        self._steps[param] = ctx.step
        self.state[param]["step"].fill_(ctx.step)
        self.state[param].pop(REFRESHED, None)
        return ctx

    def coming_context(self, param: Tensor, group: dict[str, Any]) -> Context:
        """That of the next update, which is not counted yet."""
        if param in self._steps:
            return self._context(param, group, self._steps[param] + 1)
        stored = self.state[param]
        self._steps[param] = int(stored["step"]) if stored else 0
        ctx = self._context(param, group, self._steps[param] + 1)
        if stored:
            self.rule_of(param, group).recall(self._loaded(param, group), ctx)
        if REFRESHED in stored:
            self._refreshed[param] = int(stored[REFRESHED])
        return ctx

    def _context(self, param: Tensor, group: dict[str, Any], step: int) -> Context:
        name, index, count = self.place_of(param)

        def failed(reason: str) -> None:
            self.failed_refreshes[name] = self.failed_refreshes.get(name, 0) + 1
            log.warning("step %d: the old basis of %s stays: %s", step, name, reason)

        return Context(
            step=step,
            name=name,
            seed=group["seed"],
            known=self._known.setdefault(param, {}),
            stored=self.state.get(param),
            index=index,
            count=count,
            on_failure=failed,
            weight=param,
        )

    def place_of(self, param: Tensor) -> tuple[str, int, int]:
        """Name, where the caller gave one, else made of its place; which of its group it is; of how many."""
        if param not in self._places:
            for number, group in enumerate(self.param_groups):
                params = group["params"]
                names = group.get("param_names") or [f"{number}.{i}" for i in range(len(params))]
                places = ((name, index, len(params)) for index, name in enumerate(names))
                self._places.update(zip(params, places, strict=True))
        return self._places[param]

    def _loaded(self, param: Tensor, group: dict[str, Any]) -> LoadedState:
        """The whole state of a parameter, made where there is none yet."""
        rule = self.rule_of(param, group)
        slots = rule.slots(shape_of(param))
        return LoadedState(self._stored(param, group, rule), self._codecs(param, group, rule), slots, WHOLE)

    def _keep_refreshes(self) -> None:
        """After a step left out: the next has its number and must not refresh again, nor after a resume.

        A refresh that changed nothing, as that of a gradient which is not finite, is tried again.
        """
        for param, step in list(self._refreshed.items()):
            if step != self._steps[param] + 1:
                continue
            if param in self._refreshed_in_vain:
                del self._refreshed[param]
            else:
                self.state[param][REFRESHED] = torch.tensor(float(step))


def storage_formats(group: Mapping[str, Any]) -> Mapping[str, str]:
    """The format of each role that is not the default one, as the group says or else its algorithm."""
    return (
        (group["storage"] or {})
        if "storage" in group
        else registry.optimizer_class(group["algorithm"]).formats
    )


def turn_length(group: dict[str, Any]) -> int | None:
    """Steps of a turn; None where all parameters always have state."""
    return registry.optimizer_class(group["algorithm"]).turn_length(group)


def turn_number(group: dict[str, Any]) -> int | None:
    """Of the turn that the coming step belongs to."""
    length = turn_length(group)
    return None if length is None else group.get(STEPS, 0) // length
