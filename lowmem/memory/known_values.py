"""The values of small whole numbers, followed beside fake tensors.

Fake tensors have shapes and no values, but a training step asks for some: is a token padded, where do the
documents of a packed row begin, which tokens carry loss. All of these are computed from the batch, from
integers and truth values alone. So each fake tensor that comes from known integers gets a real twin, the
same operators are run on the twins, and a question about a value is answered from there. Nothing of the
model's size is ever computed, and the fake tensors, whose bytes are counted, go their own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from lowmem.errors import RefusedError

LARGEST_NUMEL = 1 << 20
"""Twins are for ids, masks and positions; a mask of all pairs of tokens is left without one."""

_TWIN = "_lowmem_twin"
_DEPENDS_ON_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_CHANGE_IN_PLACE_ONLY = (torch.ops.aten._fused_sgd_.default, torch.ops.aten._fused_sgd_.tensor_lr)
"""Fused optimizers that PyTorch cannot run on fake tensors; they make no tensor."""

_MEASURE = "Measure it instead: lowmem train with train.max_steps=5 writes memory.json."

_ONE_VALUE = torch.ops.aten._local_scalar_dense.default


class KnownValues(TorchDispatchMode):
    """Enter it inside `fake_mode`. `fake(real)` makes a fake tensor whose value is known.

    A number that is not known is taken as 1: the loss and the gradient norm, which are printed and compared
    with nothing. A truth value that is not known raises RefusedError: what the step does depends on it.
    """

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self._fake_mode = fake_mode

    def fake(self, real: Tensor) -> Tensor:
        with _disable_current_modes():
            twin = real.detach().clone()
        made = self._fake_mode.from_tensor(twin)
        self._remember(made, twin)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_known = not _is_drawn(func) and all(
            not isinstance(tensor, FakeTensor) or hasattr(tensor, _TWIN) for tensor in tensors
        )
        if is_known and any(tag in func.tags for tag in _DEPENDS_ON_VALUES):
            twins = self._on_twins(func, args, kwargs)
            return tree_map(lambda leaf: self.fake(leaf) if isinstance(leaf, Tensor) else leaf, twins)
        if func is _ONE_VALUE:
            return _unknown_number(args[0])
        if func._schema.is_mutable and not is_known:
            for tensor in tensors:
                if hasattr(tensor, _TWIN) and _is_written(func, tensor, args, kwargs):
                    delattr(tensor, _TWIN)
        if func in _CHANGE_IN_PLACE_ONLY:
            return None
        try:
            result = func(*args, **kwargs)
        except (UnsupportedOperatorException, UnsupportedFakeTensorException) as error:
            raise RefusedError(
                f"{func} cannot be simulated: PyTorch does not know its result's shape. {_MEASURE}"
            ) from error
        if is_known and _is_small_and_whole(result):
            twins = self._on_twins(func, args, kwargs)
            for made, twin in zip(tree_leaves(result), tree_leaves(twins), strict=True):
                self._remember(made, twin)
        return result

    def _on_twins(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda leaf: getattr(leaf, _TWIN, leaf), (args, kwargs))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _remember(self, made: Any, twin: Any) -> None:
        if isinstance(made, FakeTensor):
            setattr(made, _TWIN, twin)


def _is_drawn(func: Any) -> bool:
    """Whether the values that `func` gives are random, or whatever was in memory."""
    return torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name


def _is_small_and_whole(result: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(
        tensor.numel() <= LARGEST_NUMEL and not (tensor.is_floating_point() or tensor.is_complex())
        for tensor in tensors
    )


def _is_written(func: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and given is tensor:
            return True
    return False


def _unknown_number(tensor: Tensor) -> int | float:
    if tensor.dtype == torch.bool:
        raise RefusedError(
            "This model decides by the values of its activations what it computes, which cannot be planned "
            f"without values. {_MEASURE}"
        )
    return 1.0 if tensor.is_floating_point() else 1
