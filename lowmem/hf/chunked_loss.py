"""Train a causal language model without ever holding its full logits.

The loss is replaced inside the model's own forward: while it trains, the head answers with DeferredLogits
and the model's loss function computes a tiled cross-entropy from them. All that the model does around the
loss (logit scale, soft-cap, router losses, label shift, `num_items_in_batch`) stays the model's own code.
In training `outputs.logits` is the DeferredLogits object; whoever uses it gets the real logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lowmem.errors import RefusedError
from lowmem.hf.causal_lm_loss import chunked_causal_lm_loss
from lowmem.hf.deferring_heads import DEFERRING, Deferring
from lowmem.hf.eval_mode import eval_mode
from lowmem.hf.tiled_cross_entropy import TILE_BYTES
from lowmem.numerics.held_weights import held_weight

NEAREST = "Use train.loss: plain, which computes the model's own loss from whole logits."


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The outermost transformers model with an output embedding inside `model`, which may be wrapped."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise RefusedError(
        f"{type(model).__name__} has no output embedding to compute a chunked loss from. {NEAREST}"
    )


def use_chunked_loss(model: nn.Module, *, tile_bytes: int = TILE_BYTES) -> None:
    """Make `model` (wrapped by PEFT or not) compute its training loss by tiles of the vocabulary.

    tile_bytes: size of one tile of float32 logits. Undo with `use_plain_loss`. Calling it twice is harmless.

    Raises RefusedError when the output embedding is neither a plain nn.Linear nor one in int8, or the model's
    loss is not transformers' causal language model loss.
    """
    owner = causal_model(model)
    head = owner.get_output_embeddings()
    if not isinstance(head, Deferring):
        if type(head) not in DEFERRING:
            raise RefusedError(
                f"train.loss: chunked needs a plain nn.Linear, or one in int8, as output embedding; "
                f"that of {type(owner).__name__} is {type(head).__name__}. {NEAREST}"
            )
        if owner.loss_function is not ForCausalLMLoss:
            name = getattr(owner.loss_function, "__name__", type(owner.loss_function).__name__)
            raise RefusedError(
                f"train.loss: chunked replaces transformers' ForCausalLMLoss; "
                f"the loss of {type(owner).__name__} is {name}. {NEAREST}"
            )
        head.__class__ = DEFERRING[type(head)]
        owner.loss_function = chunked_causal_lm_loss
    head.tile_bytes = tile_bytes


def use_plain_loss(model: nn.Module) -> None:
    """Give `model` its own loss back. Harmless when it has it."""
    owner = causal_model(model)
    head = owner.get_output_embeddings()
    if isinstance(head, Deferring):
        head.stop_deferring()
        owner.loss_function = ForCausalLMLoss


@contextmanager
def loss_only(model: nn.Module) -> Iterator[None]:
    """Compute the loss by tiles in evaluation too, where nobody wants the logits; no effect on a plain model.

    Inside, a batch without trained tokens has loss 0, as in training.
    """
    head = causal_model(model).get_output_embeddings()
    if not isinstance(head, Deferring):
        yield
        return
    before, head.defers_always = head.defers_always, True
    try:
        yield
    finally:
        head.defers_always = before


# What a forward that cannot deal with deferred logits may raise.
FORWARD_ERRORS = (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)

# The probe costs a forward and a backward of at most this many rows and tokens, whole logits included.
PROBE_ROWS, PROBE_TOKENS = 2, 48

WEIGHT = "head's weight"


def chunked_loss_agrees(model: nn.Module, batch: Mapping[str, Tensor]) -> str | None:
    """Compare the chunked loss with the model's own on a corner of `batch`.

    batch: what the model is called with, `input_ids` (B, S) and what goes with them; its labels are not used.
    Returns None when the loss and its gradients at the head agree, otherwise in words why the model should
    keep its own loss, which covers what `use_chunked_loss` refuses. Gradients, training flags and whether the
    model is patched stay as they were.
    """
    try:
        head = causal_model(model).get_output_embeddings()
        was_patched = isinstance(head, Deferring)
        use_chunked_loss(model, tile_bytes=head.tile_bytes if was_patched else TILE_BYTES)
    except RefusedError as refusal:
        return str(refusal)
    try:
        with eval_mode(model), torch.enable_grad(), _others_held_frozen(model, head):
            for extra in _loss_arguments(model):
                reason = _disagreement(model, head, _corner(model, batch) | extra)
                if reason is not None:
                    return reason
            return None
    finally:
        if not was_patched:
            use_plain_loss(model)


@contextmanager
def _others_held_frozen(model: nn.Module, head: Deferring) -> Iterator[None]:
    """A tied head's gradient goes through all layers; those whose weights are no tensor of autograd would add theirs
    to a sum that belongs to training."""
    frozen = [
        param
        for param in model.parameters()
        if param is not head.weight and param.requires_grad and held_weight(param) is not None
    ]
    for param in frozen:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(True)


def _corner(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    device = causal_model(model).device
    corner: dict[str, Any] = {
        name: value[:PROBE_ROWS, :PROBE_TOKENS].to(device) for name, value in batch.items() if value.ndim == 2
    }
    labels = corner["input_ids"].clone()
    labels[:, : labels.shape[1] // 4] = -100
    return corner | {"labels": labels}


def _loss_arguments(model: nn.Module) -> list[dict[str, Any]]:
    parameters = inspect.signature(type(causal_model(model)).forward).parameters.values()
    takes_count = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return [{}, {"num_items_in_batch": torch.tensor(37)}] if takes_count else [{}]


def _disagreement(model: nn.Module, head: Deferring, batch: dict[str, Any]) -> str | None:
    own_loss, own_gradients = _loss_and_gradients(model, head, batch)
    try:
        with loss_only(model):
            loss, gradients = _loss_and_gradients(model, head, batch)
    except torch.OutOfMemoryError:
        raise
    except FORWARD_ERRORS as error:
        return f"the model's forward cannot work with it ({type(error).__name__}: {error})"
    if head.materialised_by is not None:
        return f"the model computes its whole logits anyway, through {head.materialised_by}"
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 3e-2
    if not abs(loss - own_loss) <= tolerance * max(1.0, abs(own_loss)):
        return f"its loss is {loss:.6g} where the model's own is {own_loss:.6g}"
    for name, own in own_gradients.items():
        difference = (gradients[name] - own).norm() / own.norm().clamp(min=torch.finfo(torch.float32).tiny)
        if not difference <= tolerance:
            return f"its gradient of the {name} differs from the model's own by {difference:.1%}"
    return None


def _loss_and_gradients(
    model: nn.Module, head: Deferring, batch: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradients at the head. That of the weight is folded into one random combination of
    its rows and one of its columns, so that two whole ones are never held."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        loss = model(**batch, use_cache=False).loss
    finally:
        hook.remove()
    candidates = {"hidden states": seen[0], WEIGHT: head.weight, "head's bias": head.bias}
    inputs = {name: value for name, value in candidates.items() if value is not None and value.requires_grad}
    folded = {}
    for name, gradient in _gradients_of(loss, inputs).items():
        generator = torch.Generator().manual_seed(0)
        if name == WEIGHT:
            rows, columns = (torch.randn(size, generator=generator).to(gradient) for size in gradient.shape)
            gradient = torch.cat([rows @ gradient, gradient @ columns])
        folded[name] = gradient.float()
    return loss.item(), folded


def _gradients_of(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name. That of a weight in another format than its parameter's is handed over beside autograd."""
    held = held_weight(inputs[WEIGHT]) if WEIGHT in inputs else None
    if held is None:
        return dict(
            zip(inputs, torch.autograd.grad(loss, list(inputs.values())) if inputs else (), strict=True)
        )
    trainer, grad = held.trainer, held.grad
    held.trainer, held.grad = inputs, None
    try:
        found = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
        assert held.grad is not None
        return {**found, WEIGHT: held.grad}
    finally:
        held.trainer, held.grad = trainer, grad
