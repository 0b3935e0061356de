"""Copies between a CUDA device and pinned memory of the host, beside what the device computes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lowmem.errors import FaultError
from lowmem.run.activation_offload import Wait


class CudaCopies:
    """Both directions on one stream of their own, so that a tensor comes back only when it has arrived.

    A buffer on the device belongs to the stream that computes. Whoever takes it there calls the `Wait` first.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> tuple[Tensor, Wait]:
        """Raises FaultError when the host cannot pin the memory."""
        try:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise FaultError(
                f"train.activation_offload: the host cannot pin {tensor.nbytes:,} more bytes ({error}). Free some of "
                "its memory, or set train.activation_offload: false."
            ) from error
        return host, self._copied(host, tensor)

    def back(self, host: Tensor) -> tuple[Tensor, Wait]:
        tensor = torch.empty_like(host, device=self._stream.device, pin_memory=False)
        return tensor, self._copied(tensor, host)

    def _copied(self, to: Tensor, from_: Tensor) -> Wait:
        """The copy begins when what computes has come to here: the tensor is written, the buffer's last use is over."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            to.copy_(from_, non_blocking=True)
            done = self._stream.record_event()
        return partial(_wait_for, done)


def _wait_for(done: torch.cuda.Event) -> None:
    torch.cuda.current_stream().wait_event(done)
