"""The tracker on a real architecture, against counting by hand and against PyTorch's own profiler."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem.memory.ledger import rounded
from lowmem.memory.measure import Measured, TrackedMeter
from tests.memory.small_training import exact_tracker

# Its successor activation_checkpointing_enable does not exist in the oldest supported transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

ROWS, TOKENS, LAYERS = 2, 64, 2


def llama(*, checkpointing: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def measure(model: LlamaForCausalLM, *, rows: int = ROWS, length: int = TOKENS, **variant: bool) -> Measured:
    """Two steps of AdamW in the given variant (fused or foreach)."""
    tokens = torch.arange(rows * length).reshape(rows, length) % 512
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **variant)
    meter = TrackedMeter(model)
    meter.watch(optimizer)
    for _ in range(2):
        with meter.step():
            with meter.phase("forward"):
                loss = model(input_ids=tokens, labels=tokens).loss
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                optimizer.step()
            optimizer.zero_grad()
            del loss
    return meter.measured()


def allocated(model: LlamaForCausalLM) -> int:
    """The parameters as an allocator of 512-byte blocks holds them."""
    return sum(rounded(param.nbytes) for param in model.parameters())


def test_adamw_state_is_eight_bytes_a_parameter_and_a_step_count_each():
    model = llama()
    measured = measure(model, rows=1, foreach=True)
    num_tensors = len(list(model.parameters()))
    assert measured.parts["optimizer_state"] == 2 * allocated(model) + num_tensors * 512
    assert measured.parts["gradients"] == allocated(model)
    assert all(param.nbytes % 512 == 0 or param.nbytes == 64 * 4 for param in model.parameters())
    buffers = sum(rounded(buffer.nbytes) for buffer in model.buffers())
    assert measured.parts["weights"] == allocated(model) + buffers


def test_foreach_needs_one_more_copy_of_the_weights_than_fused():
    model = llama()
    fused, foreach = (measure(model, rows=1, length=4, **{variant: True}) for variant in ("fused", "foreach"))
    for part in ("weights", "gradients", "optimizer_state", "other"):
        assert fused.parts[part] == foreach.parts[part]
    assert foreach.parts["temporary"] == allocated(model)
    # Fused peaks at the last product of backward, beside which little of four tokens is alive.
    assert fused.parts["temporary"] + fused.parts["activations"] < 0.05 * allocated(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["fused", "foreach"])
def test_parts_sum_to_the_peak_and_runs_repeat_to_the_byte(checkpointing, variant):
    first = measure(llama(checkpointing=checkpointing), **{variant: True})
    again = measure(llama(checkpointing=checkpointing), **{variant: True})
    assert first == again
    assert sum(first.parts.values()) == first.peak_bytes
    assert first.warnings == []


def test_checkpointing_lowers_the_peak_of_a_large_batch():
    plain, checkpointed = (
        measure(llama(), rows=16, fused=True),
        measure(llama(checkpointing=True), rows=16, fused=True),
    )
    assert checkpointed.parts["activations"] < 0.6 * plain.parts["activations"]
    assert checkpointed.peak_bytes < plain.peak_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_forward_and_backward_agrees_with_the_profiler(checkpointing):
    model = llama(checkpointing=checkpointing)
    tokens = torch.arange(8 * TOKENS).reshape(8, TOKENS) % 512

    def forward_and_backward() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    forward_and_backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_and_backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_and_backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)

    model.zero_grad()
    tracker = exact_tracker(model)
    with tracker:
        forward_and_backward()
    fullest = tracker.fullest()
    made = fullest.peak_bytes - fullest.parts["weights"] - tokens.nbytes
    assert made == pytest.approx(peak, rel=0.01)
