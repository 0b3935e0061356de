"""The smallest proof that an installation trains: one GaLore step of a two-layer LLaMA."""

from __future__ import annotations


def take_tiny_step(device: str) -> str | None:
    """None when the step worked, otherwise the error in one line.

    Every exception is caught: whatever is broken on this machine is the answer.
    """
    try:
        return _step(device)
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _step(device: str) -> str | None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowmem.optim import build_optimizer

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM(config)
    model.to(device=device, dtype=torch.bfloat16)
    optimizer = build_optimizer(model, "galore", lr=1e-3, rank=4)
    tokens = torch.randint(0, 64, (2, 16), device=device)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss):
        return f"the loss of the step is {loss.item()}"
    if all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)):
        return "the step changed no weight"
    return None
