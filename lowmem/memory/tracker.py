"""A byte-exact, deterministic account of live tensors, taken where PyTorch dispatches its operators.

Every operator's inputs and outputs pass through here; a weak reference to the storage behind each tells
when it is freed. Nothing is kept alive and no value is read, so training is unchanged. What it cannot
see is scratch memory inside one operator (a workspace of a matrix product, say).

One deviation is PyTorch's: under any dispatch mode autograd adds up the gradients of a tensor that was
used several times out of place, so such a sum takes one buffer more for a moment than without. A tracker
that `adds_in_place` writes such sums down as they are made where no mode is on.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.memory.ledger import ALLOCATION_BYTES, PHASES, Fullest, Ledger, Life, Part, Phase, rounded
from lowmem.memory.owners import storages_of
from lowmem.numerics.held_weights import grad_of

_CERTAIN: tuple[Part, ...] = ("weights", "gradients", "optimizer_state")

_ANNOUNCES_A_NEW_TENSOR = torch.ops.aten.lift_fresh.default
"""torch.tensor(), torch.from_numpy() and the like make their storage without an operator, then call this."""

_ASKS_FOR_THE_DEVICE = torch.ops.prim.device.default
"""What every `tensor.device` of a fake tensor calls."""

_ADDS = torch.ops.aten.add.Tensor
_WRAPPERS = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")
"""Between a mode and who called the operator."""

_ENGINE = torch.autograd.graph._engine_run_backward.__code__
"""The Python function below which autograd adds up gradients; anyone else's sums have another one above them."""

Owners = Callable[[], Iterable[tuple[Part, Tensor, str]]]
"""Gives (part, tensor, name) of every tensor whose part is certain."""
ScratchBytes = Callable[[Any, tuple[Any, ...]], int]
"""(operator, its arguments) -> bytes of its workspace."""


class ByteTracker(TorchDispatchMode):
    """Tracks one step: enter it, mark the phases, leave it, ask `fullest()`. Use a new one for each step.

    `owners` names the tensors whose part is known; it is asked where the step and each phase begin and
    end. Gradients that an optimizer consumes inside backward are known from its `step()`.
    The others are told apart by their lives:

    - activations: born in a forward phase and alive when that phase ends;
    - other: there before the step, or made between phases and alive when the next begins (batches);
    - temporary: the rest, such as what backward and the optimizer make and drop, and what activation
      checkpointing recomputes.

    Views, detached and in-place tensors share a storage and count once. Only tensors on
    `device_type` count. `round_to` bytes is the allocator's step: 512 as on CUDA, 1 for plain sums.

    `scratch_bytes` adds what an operator takes for itself and gives back before it returns, which no count
    of tensors sees; without it there is none. With `names_makers` each life says which operator made it.
    """

    def __init__(
        self,
        owners: Owners,
        *,
        device_type: str = "cpu",
        round_to: int = ALLOCATION_BYTES,
        scratch_bytes: ScratchBytes | None = None,
        names_makers: bool = False,
        adds_in_place: bool = False,
    ):
        super().__init__()
        self.uncounted: set[str] = set()
        """Why tensors, if any, could not be counted."""
        self.ledger = Ledger()
        self._scratch_bytes = scratch_bytes
        self._names_makers = names_makers
        self._adds_in_place = adds_in_place
        self._sum: Life | None = None  # of the last operator, if autograd would have made it in place
        self._owners = owners
        self._device_type = device_type
        self._round_to = round_to
        self._living: dict[int, tuple[weakref.ref[torch.UntypedStorage], Life]] = {}
        self._phase: Phase | None = None
        self._undecided: list[Life] = []  # born since the last phase began or ended
        self._plain_resize = torch.UntypedStorage.resize_

    def fullest(self) -> Fullest:
        """The moment of the step with the most live bytes, by part."""
        return self.ledger.fullest()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Say what the work inside belongs to. Phases do not nest."""
        if name not in PHASES:
            raise ValueError(f"{name!r} is not a phase of a step; phases are {', '.join(PHASES)}")
        if self._phase is not None:
            raise ValueError(f"phase {name} begins inside phase {self._phase}; leave that one first")
        self._ask_owners(born=True)
        self._survivors_are("other")
        self._phase = name
        self.at("")
        try:
            yield
        finally:
            self._phase = None
            self.at("")
            self._ask_owners(born=True)
            self._survivors_are("activations" if name == "forward" else "temporary")

    def at(self, place: str) -> None:
        """Say where the work from now on happens, for `fullest().place`."""
        self.ledger.at(self._phase, place)

    def note_gradient(self, param: Tensor) -> None:
        """The gradient of `param` has just landed, and may be gone by the end of the phase."""
        if (grad := grad_of(param)) is not None:
            self._see(grad, born=True, part="gradients")

    def __enter__(self) -> ByteTracker:
        self._ask_owners(born=False)
        self._plain_resize = torch.UntypedStorage.resize_
        tracker = self

        def resize_(storage: Any, size: int) -> Any:
            result = tracker._plain_resize(storage, size)
            tracker._note_size(storage)
            return result

        self._optimizer_hook = register_optimizer_step_pre_hook(self._before_update)
        # A resize of a bare storage is the one change of size that no operator announces.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._plain_resize  # type: ignore[method-assign]
        self._optimizer_hook.remove()
        self._ask_owners(born=True)
        self._living.clear()  # drops the weak references, and with them every callback into this object

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ASKS_FOR_THE_DEVICE:
            return func(*args, **kwargs)
        is_new = func is _ANNOUNCES_A_NEW_TENSOR
        for tensor in (*_tensors(args), *_tensors(kwargs)):
            self._see(tensor, born=is_new)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor, born=True, maker=func)
        self._sum = None
        if self._adds_in_place and func is _ADDS and _is_own(args[0]) and _called_by_autograd():
            self._sum = self._living[result.untyped_storage()._cdata][1]
        if self._scratch_bytes is not None and (nbytes := self._scratch_bytes(func, args)):
            self.ledger.died(self.ledger.born(rounded(nbytes, self._round_to), "temporary"))
        return result

    def _see(
        self, tensor: Tensor, *, born: bool, part: Part | None = None, maker: Any = None, name: str = ""
    ) -> None:
        """Count the storages of `tensor` that are new, and give them `part` where it is certain."""
        if tensor.device.type != self._device_type:
            return
        try:
            storages = storages_of(tensor)
        except ValueError as reason:
            self.uncounted.add(str(reason))
            return
        for storage in storages:
            key = storage._cdata
            entry = self._living.get(key)
            if entry is None:
                entry = self._register(storage, key, born)
                if maker is not None and self._names_makers:
                    entry[1].made_by = _described(str(maker).removeprefix("aten."), tensor)
            else:
                self._note_size(storage)
            if part is not None and entry[1].part not in _CERTAIN:
                entry[1].part = part
            if self._names_makers and name:
                entry[1].made_by = _described(name, tensor)

    def _register(
        self, storage: torch.UntypedStorage, key: int, born: bool
    ) -> tuple[weakref.ref[torch.UntypedStorage], Life]:
        nbytes = rounded(storage.nbytes(), self._round_to)
        if born:
            life = self.ledger.born(nbytes, "temporary", key)
            self._undecided.append(life)
        else:
            life = self.ledger.found(nbytes, "other", key)
        entry = (weakref.ref(storage, partial(self._freed, key, life)), life)
        self._living[key] = entry
        return entry

    def _freed(self, key: int, life: Life, _: weakref.ref[torch.UntypedStorage]) -> None:
        self._living.pop(key, None)
        if self._sum is not None:
            self.ledger.replaced_by(life, self._sum)
            self._sum = None
        else:
            self.ledger.died(life)

    def _note_size(self, storage: torch.UntypedStorage) -> None:
        entry = self._living.get(storage._cdata)
        if entry is not None:
            self.ledger.resized(entry[1], rounded(storage.nbytes(), self._round_to))

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if (grad := grad_of(param)) is not None:
                    self._see(grad, born=True, part="gradients")

    def _ask_owners(self, *, born: bool) -> None:
        for part, tensor, name in self._owners():
            self._see(tensor, born=born, part=part, name=name)

    def _survivors_are(self, part: Part) -> None:
        for life in self._undecided:
            if life.alive and life.part not in _CERTAIN:
                life.part = part
        self._undecided = []


def _called_by_autograd() -> bool:
    """Whether autograd's engine called the operator itself; any Python code in between is someone else's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    return frame.f_code is _ENGINE


def _is_own(tensor: Tensor) -> bool:
    """Whether autograd may add to `tensor` in place: a view's memory is held by its base too."""
    return not tensor._is_view() and tensor.is_contiguous()


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors among an operator's arguments or results: alone, or in lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
