"""What keeps transformers and accelerate from running a step on fake tensors as they run it on real ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import import_utils

_LIBRARY_STATES = (PartialState, AcceleratorState, GradientState)


@contextmanager
def real_attention_path() -> Iterator[None]:
    """Let transformers choose attention masks as it does for real tensors.

    It takes fake tensors for the sign of a compiler and then builds a full mask even where causal attention
    needs none, which is other memory and another kernel. The question is one function in all supported
    versions; RuntimeError says so if a newer one has moved it.
    """
    original = getattr(import_utils, "is_fake_tensor", None)
    if original is None or "is_fake_tensor" not in import_utils.is_tracing.__code__.co_names:
        raise RuntimeError(
            "this version of transformers decides elsewhere whether tensors are fake, so a simulation would not take "
            "the real attention path; lowmem knows transformers 5.17 to 5.23"
        )
    import_utils.is_fake_tensor = lambda x: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = original


@contextmanager
def undisturbed_process() -> Iterator[None]:
    """What a Trainer leaves behind in this process is as it was: accelerate's states and the random numbers."""
    before = [dict(state._shared_state) for state in _LIBRARY_STATES]
    python, arrays = random.getstate(), numpy.random.get_state()
    for state in _LIBRARY_STATES:
        state._shared_state.clear()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        for state, saved in zip(_LIBRARY_STATES, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(saved)
        random.setstate(python)
        numpy.random.set_state(arrays)
