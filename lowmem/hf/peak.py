"""The peak of allocated memory that a row of metrics.jsonl shows."""

from __future__ import annotations

import torch

from lowmem.hf.metering import StepWatch


class PeakSoFar:
    """Largest peak in bytes since the run began: of every step on CUDA, of the watched ones on a CPU."""

    def __init__(self, watch: StepWatch, device: torch.device):
        self.watch = watch
        self.device = device
        self.peak_bytes = 0

    def __call__(self) -> int | None:
        """None before anything was measured."""
        measured = self.watch.measured()
        if measured is not None:
            self.peak_bytes = max(self.peak_bytes, measured.peak_bytes)
        if self.device.type == "cuda":
            # The meter resets this counter, so it holds the peak since the last watched step began.
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        return self.peak_bytes or None
