"""What training takes of the host's memory for offloaded activations. Imports no torch."""

from __future__ import annotations

SMALLEST_OFFLOADED_BYTES = 2**20
"""As `lowmem.run.activation_offload` decides it; a test holds the two equal."""


def pinned_bytes(nbytes: int) -> int:
    """What PyTorch pins for a tensor of `nbytes`: the next power of two, kept for the next tensor of that size."""
    return 1 << max(nbytes - 1, 0).bit_length()
