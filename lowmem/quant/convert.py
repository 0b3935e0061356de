"""Which modules of a model become int8, and their replacement in place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from lowmem.quant.int8_embedding import Int8Embedding, Int8TiedLinear
from lowmem.quant.int8_linear import Int8Linear
from lowmem.quant.int8_weight import GROUP, Int8Module


@dataclass(frozen=True)
class Int8Choice:
    """How matrices become int8, and which.

    Linear layers do; the input embedding and the output head with `embeddings`. `keep` names modules that stay
    float: a whole path, its last names, or the name of a module that they are inside of.
    """

    group_size: int = GROUP
    scale_dtype: torch.dtype = torch.float32
    embeddings: bool = False
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Int8Places:
    """Paths of the modules that become int8, and of what else holds matrices and stays float, with the reason."""

    linear: list[str]
    embedding: str | None = None
    tied_head: str | None = None
    """The head that uses the codes of the embedding."""
    left_float: dict[str, str] = field(default_factory=dict)


def int8_places(model: nn.Module, choice: Int8Choice, *, is_tied: bool | None = None) -> Int8Places:
    """Where `choice` puts int8 matrices in `model`. `is_tied`: whether head and embedding share their weight,
    None to see it from the model.

    Raises ValueError, naming modules, where there is no linear layer to be converted (GPT-2 keeps its matrices
    transposed, in Conv1D), where an embedding or head that is asked for cannot be int8, and for a name in
    `keep` that is not in the model.
    """
    modules = dict(model.named_modules())
    embedding, head = _path_of(model, "get_input_embeddings"), _path_of(model, "get_output_embeddings")
    if is_tied is None:
        is_tied = None not in (embedding, head) and modules[embedding].weight is modules[head].weight
    _check_names(choice.keep, modules)
    linear: list[str] = []
    left_float: dict[str, str] = {}
    for path, module in modules.items():
        if path in (embedding, head):
            continue
        if type(module).__name__ == "Conv1D":
            left_float[path] = "Conv1D, which keeps its matrix transposed"
        elif type(module) is nn.Linear:
            if is_kept(path, choice.keep):
                left_float[path] = "asked for"
            else:
                linear.append(path)
    if not linear:
        raise ValueError(_nothing_to_convert(model, left_float))
    if not choice.embeddings:
        return Int8Places(linear, left_float=left_float)
    keeps = {path for path in (embedding, head) if path is not None and is_kept(path, choice.keep)}
    if is_tied and keeps:
        keeps = {path for path in (embedding, head) if path is not None}
    wanted = [path for path in (embedding, head) if path is not None and path not in keeps]
    if problems := [why for path in wanted if (why := _objection(path, modules[path], is_tied=is_tied))]:
        raise ValueError(" ".join(problems))
    if head in wanted and not is_tied:
        linear.append(head)
    return Int8Places(
        linear,
        embedding=embedding if embedding in wanted else None,
        tied_head=head if is_tied and head in wanted else None,
        left_float=left_float,
    )


def quantize_model_(
    model: nn.Module, choice: Int8Choice | None = None, *, is_tied: bool | None = None
) -> Int8Places:
    """Replace the matrices of `model` by int8 ones, one at a time. To be called before an optimizer is made.

    Weights that have no values yet, on the meta device or fake, become int8 ones without values. Raises
    ValueError as `int8_places` does.
    """
    choice = choice or Int8Choice()
    places = int8_places(model, choice, is_tied=is_tied)
    quantize_places_(model, places, choice)
    return places


@torch.no_grad()
def quantize_places_(model: nn.Module, places: Int8Places, choice: Int8Choice) -> None:
    """`quantize_model_` at the places it would choose; what is int8 there already stays as it is."""
    for path in [*places.linear, *([] if places.embedding is None else [places.embedding])]:
        module = model.get_submodule(path)
        if not isinstance(module, Int8Module):
            replace_(model, path, int8_twin(module, choice))
    if places.embedding is not None and places.tied_head is not None:
        tie_head_(model, places.tied_head, model.get_submodule(places.embedding))


@torch.no_grad()
def dequantize_model_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the int8 modules of `model` by float ones in `dtype`, by default that of each, one at a time."""
    heads = {path: module for path, module in model.named_modules() if isinstance(module, Int8TiedLinear)}
    weights: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Module):
            weight = nn.Parameter(module.dequantized(dtype), requires_grad=module.weight.requires_grad)
            weights[module.weight] = weight
            replace_(model, path, _float_twin(module, weight))
    for path, head in heads.items():
        replace_(model, path, _float_twin(head, weights[head.weight]))


def _float_twin(module: Int8Module | Int8TiedLinear, weight: nn.Parameter) -> nn.Module:
    made: nn.Linear | nn.Embedding
    with torch.device("meta"):
        if isinstance(module, Int8Embedding):
            made = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        else:
            assert isinstance(module, Int8Linear | Int8TiedLinear)
            made = nn.Linear(module.in_features, module.out_features, bias=False)
            made.register_parameter("bias", module.bias)
    made.weight = weight
    return made.train(module.training)


def int8_twin(module: nn.Module, choice: Int8Choice) -> Int8Module:
    """The int8 module for a linear layer or an embedding, with its values where it has any."""
    made: Int8Module
    if isinstance(module, nn.Embedding):
        made = Int8Embedding.from_embedding(
            module, group_size=choice.group_size, scale_dtype=choice.scale_dtype
        )
    else:
        assert isinstance(module, nn.Linear)
        made = Int8Linear.from_linear(module, group_size=choice.group_size, scale_dtype=choice.scale_dtype)
    return made.train(module.training)


def replace_(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def tie_head_(model: nn.Module, path: str, embedding: nn.Module) -> None:
    """Let the head at `path` use the codes of `embedding`."""
    assert isinstance(embedding, Int8Embedding)
    head = Int8TiedLinear(embedding)
    head.train(model.get_submodule(path).training)
    replace_(model, path, head)


def is_kept(path: str, keep: Iterable[str]) -> bool:
    """Whether one of the names `keep` is a run of whole names in `path`."""
    return any(f".{name}." in f".{path}." for name in keep)


def _path_of(model: nn.Module, getter: str) -> str | None:
    get = getattr(model, getter, None)
    try:
        wanted = get() if get is not None else None
    except NotImplementedError:
        return None
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _check_names(keep: Iterable[str], modules: dict[str, nn.Module]) -> None:
    for name in keep:
        if not any(is_kept(path, (name,)) for path in modules):
            words = sorted(
                {word for path in modules for word in path.split(".") if not word.isdigit() and word}
            )
            near = difflib.get_close_matches(name, words, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Names in its paths: {', '.join(words[:12])}."
            raise ValueError(f"{name!r}, which is to stay float, is no module of the model.{hint}")


def _objection(path: str, module: nn.Module, *, is_tied: bool) -> str | None:
    if type(module) not in (nn.Linear, nn.Embedding):
        return (
            f"{path} is a {type(module).__name__}, which does more than an embedding or a linear layer, and cannot "
            "be int8. Leave embeddings and head float."
        )
    if is_tied and getattr(module, "bias", None) is not None:
        return (
            f"{path} shares its weight and has a bias, and cannot be int8. Leave embeddings and head float."
        )
    return None


def _nothing_to_convert(model: nn.Module, left_float: dict[str, str]) -> str:
    if not left_float:
        return f"{type(model).__name__} has no linear layer besides its head that could be int8."
    few = [f"{path} ({why})" for path, why in list(left_float.items())[:3]]
    more = f" and {len(left_float) - 3} more" if len(left_float) > 3 else ""
    return (
        f"{type(model).__name__} has no linear layer that could be int8; its matrices are in "
        f"{', '.join(few)}{more}. Keep float weights."
    )
