"""Random numbers that depend on what they are for, not on when they are drawn."""

from __future__ import annotations

import hashlib

import torch


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from `parts`, equal on every machine and in every process (unlike `hash()`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeded_generator(device: torch.device, *parts: object) -> torch.Generator:
    """A generator on `device` seeded by `stable_seed(*parts)`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(stable_seed(*parts))
    return generator
