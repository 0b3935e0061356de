"""Keep what activation checkpointing keeps on the host: each layer's input leaves after the layer has run.

    offload = OffloadedInputs(CudaCopies(device), lambda tensor: tensor.is_cuda)
    layer._gradient_checkpointing_func = offload.around(checkpoint)

Of all layers' inputs one is on the device in forward, that of the layer that runs, and two are in backward: that of
the layer that is computed again and the next, on its way back. The bits are those of a run without.

The hooks of torch.autograd.graph.saved_tensors_hooks are active only while a layer's checkpoint is made, where
torch saves its inputs. What the layer itself saves falls to the checkpoint's own hooks, and what it saves when it
is computed again, too, so nothing of either leaves. A buffer is referred to until the device's own stream waits
for its copy, so its memory is never handed out while a copy reads or fills it, and no `record_stream` is needed.

transformers' own `activation_checkpointing_enable(offload=True)`, from 5.18 on, copies synchronously.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST_BYTES = 2**20
"""Smaller tensors stay: their copies would take longer to start than to make."""

Wait = Callable[[], None]
"""Makes whatever the device does from now on wait until a copy is there."""


class Copies(Protocol):
    """How tensors get to the host and back. A copy may still be under way when the call returns."""

    def out(self, tensor: Tensor) -> tuple[Any, Wait]:
        """What stands for `tensor` on the host."""

    def back(self, host: Any) -> tuple[Tensor, Wait]:
        """The tensor on the device again."""


class _Kept:
    """One layer's input. `on_device` holds it there, as long as it has not left or when it is back."""

    __slots__ = ("__weakref__", "before", "host", "on_device", "wait")

    def __init__(self, on_device: Tensor, host: Any, wait: Wait, before: _Kept | None):
        self.on_device: Tensor | None = on_device
        self.host, self.wait = host, wait
        self.before = None if before is None else weakref.ref(before)
        """The input of the layer before, which backward needs next."""

    def __del__(self) -> None:
        if self.on_device is not None:  # a graph that is dropped with a copy under way
            self.wait()


class OffloadedInputs:
    """The inputs of one model's checkpointed layers. `is_on_device` says which tensors there are to offload."""

    def __init__(
        self,
        copies: Copies,
        is_on_device: Callable[[Tensor], bool],
        *,
        smallest_bytes: int = SMALLEST_BYTES,
    ):
        self._copies = copies
        self._is_on_device = is_on_device
        self._smallest_bytes = smallest_bytes
        self._newest: weakref.ref[_Kept] | None = None

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """`checkpoint(function, hidden, ...)` that keeps `hidden` on the host; other inputs, such as a mask that
        all layers share, stay."""

        def checkpoint_offloaded(function: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
            hidden = inputs[0] if inputs else None
            if not isinstance(hidden, Tensor) or not self._is_offloaded(hidden):
                return checkpoint(function, *inputs, **named)
            storage = hidden.untyped_storage()._cdata
            with saved_tensors_hooks(
                lambda saved: self._keep(saved) if saved.untyped_storage()._cdata == storage else saved,
                lambda kept: self._restore(kept) if isinstance(kept, _Kept) else kept,
            ):
                return checkpoint(function, *inputs, **named)

        return checkpoint_offloaded

    def _is_offloaded(self, tensor: Tensor) -> bool:
        return self._is_on_device(tensor) and tensor.nbytes >= self._smallest_bytes

    def _keep(self, tensor: Tensor) -> _Kept:
        """Begin to copy `tensor` out, and let the one before go, whose copy had a whole layer's time."""
        before = None if self._newest is None else self._newest()
        if before is not None and before.on_device is not None:
            before.wait()
            before.on_device = None
        host, wait = self._copies.out(tensor)
        kept = _Kept(tensor, host, wait, before)
        self._newest = weakref.ref(kept)
        return kept

    def _restore(self, kept: _Kept) -> Tensor:
        """The tensor, and the one that is needed next begins to come back."""
        self._fetch(kept)
        tensor = kept.on_device
        assert tensor is not None
        kept.wait()
        kept.on_device = None
        before = None if kept.before is None else kept.before()
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, kept: _Kept) -> None:
        if kept.on_device is None:
            kept.on_device, kept.wait = self._copies.back(kept.host)
