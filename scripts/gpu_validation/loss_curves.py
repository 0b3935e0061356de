"""The loss of a 1B-shaped model on real text under several optimizers: the same batches, the same first weights."""

from __future__ import annotations

import gc
import pydoc_data.topics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_validation.configurations import Configuration
from lowmem.hf.model_setup import recompute_activations
from lowmem.optim.build import build_optimizer
from lowmem.quant.convert import quantize_model_
from lowmem.run.choose import EXECUTIONS

STEPS, ROWS, TOKENS = 100, 4, 1024
SMALL_STEPS, SMALL_ROWS, SMALL_TOKENS = 3, 2, 32
WARM_UP = 0.1


@dataclass(frozen=True)
class Method:
    """An optimizer with the settings it is compared with. Every gradient is used and freed inside backward."""

    name: str
    optimizer: str
    lr: float
    settings: dict[str, Any]
    int8: bool = False


# Learning rates are those of fine-tuning; none was searched for.
LOW_RANK = {"rank": 256, "refresh_every": 25}
METHODS = (
    Method("AdamW, bfloat16", "adamw", 2e-4, {}),
    Method("GaLore r=256, bfloat16", "galore", 2e-4, LOW_RANK),
    Method("Q-GaLore r=256, int8", "q_galore", 2e-4, LOW_RANK, int8=True),
    Method("Adafactor, int8", "adafactor", 2e-4, {}, int8=True),
)


def loss_curves(device: torch.device, *, small: bool) -> Iterator[dict[str, Any]]:
    """A row of JSON values for each method."""
    for method in METHODS:
        yield _trained(method, device, small=small)
        gc.collect()


def _trained(method: Method, device: torch.device, *, small: bool) -> dict[str, Any]:
    steps = SMALL_STEPS if small else STEPS
    torch.manual_seed(0)
    with device:
        shape = Configuration("text", "LLaMA-3.2-1B").shape(small=small)
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    recompute_activations(model)
    if method.int8:
        quantize_model_(model)
    settings = {
        name: value // 32 if small and name == "rank" else value for name, value in method.settings.items()
    }
    optimizer = build_optimizer(model, method.optimizer, lr=method.lr, **settings)
    execution = EXECUTIONS["fused"](optimizer)
    execution.attach(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, start = [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = method.lr * min(1.0, (step + 1) / (WARM_UP * steps))
        execution.begin_micro_batch(is_first=True, is_last=True)
        ids = batch(step, small=small).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        execution.finish_backward()
        optimizer.step()
        model.zero_grad()
        losses.append(round(loss.item(), 4))
    seconds = time.perf_counter() - start
    tenth = losses[-max(1, steps // 10) :]
    return {
        "method": method.name,
        "lr": method.lr,
        "settings": settings,
        "losses": losses,
        "last_losses_mean": round(sum(tenth) / len(tenth), 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "tokens_per_second": round(steps * ids.numel() / seconds, 1),
    }


def batch(step: int, *, small: bool) -> Tensor:
    """Rows of consecutive bytes of the Python language's own reference text, the same for every method."""
    rows, tokens = (SMALL_ROWS, SMALL_TOKENS) if small else (ROWS, TOKENS)
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - tokens, (rows,), generator=generator).tolist()
    return torch.tensor([list(text[start : start + tokens]) for start in starts])
