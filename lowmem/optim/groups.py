"""Which rule treats which parameter of a model.

Matrix rules suit the linear layers of attention and MLP. Embeddings, the output head, norms and biases
take the fallback: their gradients are sparse or one-dimensional, and a low-rank step harms them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.claims import claimed, near_words
from lowmem.numerics.held_weights import held_weight, numel_of, shape_of


def target_names(model: nn.Module, target: Sequence[str]) -> set[str]:
    """Names of the weights of linear layers (and 3-D expert weights) whose path contains one of `target`.

    The output head is left out even where a pattern matches it, and so is every weight tied to it.
    Raises ValueError, listing near names, for a pattern that matches nothing.
    """
    head = _head_weight(model)
    found: set[str] = set()
    matched: set[str] = set()
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}" if module_name else name
            patterns = {pattern for pattern in target if pattern in path}
            if patterns and param is not head and _is_matrix_layer(module, param):
                found.add(path)
                matched |= patterns
    if unmatched := [pattern for pattern in target if pattern not in matched]:
        raise ValueError(_no_match(model, unmatched))
    return found


def split_for_decay(
    named: Iterable[tuple[str, Tensor]],
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(decayed, not decayed): norms and biases, which have fewer than two dimensions, are not decayed."""
    decayed: list[tuple[str, Tensor]] = []
    plain: list[tuple[str, Tensor]] = []
    for name, param in named:
        (decayed if len(shape_of(param)) >= 2 else plain).append((name, param))
    return decayed, plain


def model_groups(
    model: nn.Module,
    *,
    own: dict[str, Any],
    target: Sequence[str] | None,
    fallback: dict[str, Any] | None,
    head: dict[str, Any] | None = None,
    others: Sequence[tuple[Sequence[str], dict[str, Any]]] = (),
) -> list[dict[str, Any]]:
    """Param groups for every trainable parameter of `model`, each in exactly one.

    `own` are the settings of the main optimizer's groups, `head` those of the output head where it has its own,
    `others` patterns in names and the settings of what they match, `fallback` the settings of the rest; with
    `target=None` there is no rest. Groups without parameters are left out.
    Raises ValueError where `head` is given and the model has none, and for parameters that are claimed twice.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter with requires_grad=True, so there is nothing to train")
    chosen = {name for name, _ in trainable} if target is None else target_names(model, target)
    of_head = None if head is None else _head_weight(model)
    if head is not None and of_head is None:
        raise ValueError(
            f"head={head}: the model has no output head (get_output_embeddings gives no linear layer). Leave head out."
        )
    heads = [(name, param) for name, param in trainable if param is of_head]
    head_name = heads[0][0] if heads else None
    members_of_others = claimed(trainable, [patterns for patterns, _ in others], head=head_name)
    taken = {name for members in (heads, *members_of_others) for name, _ in members}
    mine = [(name, param) for name, param in trainable if name in chosen and name not in taken]
    rest = [(name, param) for name, param in trainable if name not in chosen and name not in taken]
    groups = []
    of_others = zip(members_of_others, (settings for _, settings in others), strict=True)
    for members, settings in ((mine, own), (heads, head or {}), *of_others, (rest, fallback or {})):
        decayed, plain = split_for_decay(members)
        groups.append({**settings, "params": decayed})
        groups.append({**settings, "params": plain, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _is_matrix_layer(module: nn.Module, param: Tensor) -> bool:
    if isinstance(module, nn.Embedding):
        return False
    if held_weight(param) is not None:
        return hasattr(module, "in_features")
    return (
        param.dim() == 2 and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ) or param.dim() == 3


def _head_weight(model: nn.Module) -> Tensor | None:
    """The weight of a Hugging Face model's output head, by identity, so that tied ones are found too."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    weight = getattr(head, "weight", None)
    is_linear = isinstance(head, nn.Linear) or (weight is not None and held_weight(weight) is not None)
    return weight if is_linear else None


def _no_match(model: nn.Module, unmatched: list[str]) -> str:
    paths = [name for name, _ in model.named_modules()]
    shown = dict.fromkeys(word for pattern in unmatched for word in near_words(pattern, paths))
    return (
        f"target {', '.join(repr(pattern) for pattern in unmatched)} matches no linear layer of the model. "
        f"Names in its paths: {', '.join(shown)}"
    )


def parameter_count(params: Iterable[torch.Tensor]) -> int:
    """Elements of all `params`."""
    return sum(numel_of(param) for param in params)
