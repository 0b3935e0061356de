"""Gradients that autograd adds up: in place where no dispatch mode is on, as on a GPU, and so in a plan for CUDA."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem.hf.chunked_loss import use_chunked_loss
from lowmem.memory.owners import owned_tensors
from lowmem.memory.tracker import ByteTracker

VOCABULARY, WIDTH = 16384, 128
EMBEDDING = VOCABULARY * WIDTH * 4


def tied_model(chunked: bool):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    if chunked:
        use_chunked_loss(model)
    return model


def step(model, ids) -> None:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def profiled_peak(model, ids) -> int:
    """Bytes above the weights, by PyTorch's profiler, which is no dispatch mode."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, ids)
    now = top = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "plain"])
def test_a_tied_embedding_takes_what_it_takes_without_a_dispatch_mode(chunked):
    model, ids = tied_model(chunked), torch.arange(32).reshape(1, 32)
    real = profiled_peak(model, ids)

    def tracked(adds_in_place: bool) -> int:
        model.zero_grad()
        tracker = ByteTracker(lambda: owned_tensors(model, None), adds_in_place=adds_in_place)
        with tracker:
            step(model, ids)
        return tracker.fullest().peak_bytes - sum(param.nbytes for param in model.parameters())

    assert tracked(True) == pytest.approx(real, abs=0.1 * EMBEDDING)
    if chunked:
        assert tracked(False) == pytest.approx(real + EMBEDDING, abs=0.1 * EMBEDDING)
