"""Logits that a model's forward may handle but that are not computed until someone looks at them.

`DeferredLogits` is not a tensor. It stands where the head's output would stand, remembers the hidden states
and the head, and writes down each element-by-element function that the model applies to it (a scale, a
soft-cap, a cast). The chunked loss takes these apart again; any other use turns it into the real logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lowmem.hf.logit_tiles import Elementwise
from lowmem.hf.tiled_cross_entropy import autocast_here

if TYPE_CHECKING:
    from lowmem.hf.deferring_heads import Deferring

logger = logging.getLogger(__name__)

# fmt: off
ELEMENTWISE = frozenset((
    "add", "clamp", "div", "divide", "mul", "multiply", "neg", "negative", "sigmoid", "sub", "subtract",
    "tanh", "true_divide",
))
# fmt: on
CASTS = frozenset(["bfloat16", "double", "float", "half"])
OPERATORS = ("__add__", "__mul__", "__neg__", "__radd__", "__rmul__", "__sub__", "__truediv__")
# fmt: off
OTHER_OPERATORS = (
    "__abs__", "__eq__", "__floordiv__", "__ge__", "__getitem__", "__gt__", "__iter__", "__le__", "__len__",
    "__lt__", "__matmul__", "__mod__", "__ne__", "__pow__", "__rmatmul__", "__rpow__", "__rsub__",
    "__rtruediv__", "__setitem__",
)
# fmt: on


class DeferredLogits:
    """What `functions(head(hidden))` would be, (..., V), without computing it.

    hidden: (..., H). `tensor(why)` computes the logits once and keeps them; from then on this object is
    nothing but that tensor, so changes made to it in place count.
    """

    def __init__(self, hidden: Tensor, head: Deferring, functions: tuple[Elementwise, ...] = ()) -> None:
        self.hidden = hidden
        self.head = head
        self.functions = functions
        self._autocast = autocast_here(hidden.device.type)
        self._tensor: Tensor | None = None

    @property
    def is_deferred(self) -> bool:
        return self._tensor is None

    def tensor(self, why: str) -> Tensor:
        """The real logits. `why` names who asked, for the message that is logged once a model."""
        if self._tensor is None:
            if self.head.materialised_by is None:
                self.head.materialised_by = why
                logger.warning(
                    "The full logits are computed after all, because %s was called on them; the chunked loss "
                    "saves no memory here.",
                    why,
                )
            with torch.autocast(**self._autocast):
                logits = self.head.logits(self.hidden)
                for function in self.functions:
                    logits = function(logits)
            self._tensor = logits
        return self._tensor

    def then(self, function: Elementwise) -> Any:
        """The same with one more elementwise function at the end."""
        if self._tensor is not None:
            return function(self._tensor)
        return DeferredLogits(self.hidden, self.head, (*self.functions, function))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    @property
    def dtype(self) -> torch.dtype:
        dtype = self._autocast["dtype"] if self._autocast["enabled"] else self.head.weight.dtype
        sample = torch.empty(0, dtype=dtype, device=self.device)
        with torch.autocast(**self._autocast):
            for function in self.functions:
                sample = function(sample)
        return sample.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def dim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> DeferredLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1:
            if isinstance(args[0], torch.dtype):
                return self.then(lambda logits: logits.to(args[0]))
            if args[0] == self.device:
                return self
        if not args and kwargs.keys() == {"dtype"}:
            return self.then(lambda logits: logits.to(**kwargs))
        return self.tensor("Tensor.to").to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Methods of a tensor: recorded where they are elementwise, otherwise asked of the real logits."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in ELEMENTWISE or name in CASTS:
            return lambda *args, **kwargs: _record(getattr(Tensor, name), self, args, kwargs)
        return getattr(self.tensor(f"Tensor.{name}"), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        is_recordable = name in ELEMENTWISE and bool(args) and isinstance(args[0], DeferredLogits)
        if is_recordable and func in (getattr(torch, name, None), getattr(Tensor, name, None)):
            return _record(func, args[0], args[1:], kwargs)
        args, kwargs = tree_map(lambda leaf: _real(leaf, name), (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, functions={len(self.functions)})"


def _record(
    func: Callable[..., Any], logits: DeferredLogits, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Write `func(logits, *args)` down, if what it takes besides the logits is plain numbers."""
    if all(_is_number(value) for value in (*args, *kwargs.values())):
        return logits.then(lambda real: func(real, *args, **kwargs))
    name = func.__name__
    args, kwargs = tree_map(lambda leaf: _real(leaf, name), (args, kwargs))
    return func(logits.tensor(f"{name} with a tensor"), *args, **kwargs)


def _is_number(value: Any) -> bool:
    # A number that is learned needs a gradient, which only the real logits give.
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.requires_grad
    return value is None or isinstance(value, (int, float))


def _real(leaf: Any, why: str) -> Any:
    return leaf.tensor(why) if isinstance(leaf, DeferredLogits) else leaf


def _recording_operator(name: str) -> Callable[..., Any]:
    def operator(self: DeferredLogits, *args: Any) -> Any:
        return _record(getattr(Tensor, name), self, args, {})

    return operator


def _materialising_operator(name: str) -> Callable[..., Any]:
    def operator(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.tensor(name), name)(*args)

    return operator


for _name in OPERATORS:
    setattr(DeferredLogits, _name, _recording_operator(_name))
for _name in OTHER_OPERATORS:
    setattr(DeferredLogits, _name, _materialising_operator(_name))
