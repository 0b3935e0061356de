"""Random numbers that depend on what they are for, not on when they are drawn."""

from __future__ import annotations

import hashlib
import random

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


def seeded_choice(count: int, among: int, *parts: object) -> list[int]:
    """`count` different numbers below `among`, in ascending order, all choices being equally likely.

    Made of whole numbers and `random.random()` alone, whose sequence Python promises to keep: the same on every
    device, machine and release.
    """
    return sorted(_drawn(count, among, parts))


def seeded_permutation(count: int, *parts: object) -> list[int]:
    """The numbers below `count` in an order that `parts` decide, all orders being equally likely."""
    return _drawn(count, count, parts)


def _drawn(count: int, among: int, parts: tuple[object, ...]) -> list[int]:
    draw = random.Random(stable_seed(*parts))
    numbers = list(range(among))
    for i in range(count):
        j = i + int(draw.random() * (among - i))
        numbers[i], numbers[j] = numbers[j], numbers[i]
    return numbers[:count]
