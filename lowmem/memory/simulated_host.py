"""The host, for activations that a simulated step moves there: they leave the ledger and come back to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.memory.host_memory import pinned_bytes


class SimulatedHost:
    """Takes the place of real copies. A tensor that is out has no bytes but those that the host pins for it."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        """The most that was pinned at once."""
        self._bytes = 0

    def out(self, tensor: Tensor) -> tuple[_Away, Callable[[], None]]:
        self._bytes += pinned_bytes(tensor.nbytes)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        return _Away(tensor, self._unpin), _nothing

    def back(self, host: _Away) -> tuple[Tensor, Callable[[], None]]:
        return torch.empty_strided(host.size, host.stride, dtype=host.dtype, device=host.device), _nothing

    def _unpin(self, nbytes: int) -> None:
        self._bytes -= pinned_bytes(nbytes)


class _Away:
    """What is known of a tensor that is out; `unpin` is told its bytes when nothing refers to it any more."""

    def __init__(self, tensor: Tensor, unpin: Callable[[int], None]):
        self.size, self.stride = tensor.size(), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self._nbytes, self._unpin = tensor.nbytes, unpin

    def __del__(self) -> None:
        self._unpin(self._nbytes)


def _nothing() -> None:
    """A simulated copy is there at once."""
