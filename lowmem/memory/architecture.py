"""The shapes of a decoder from its config.json: every parameter's name and size, without torch.

Each family below is a model of transformers whose module was compared name by name and byte by byte with what is
written here; the tests hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lowmem.errors import RecipeError, RefusedError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """In what the decoders of one model_type differ from Llama. None: the config says it, under the usual key."""

    attention_bias: bool | None = None
    """On query, key and value."""
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    tied: bool = False
    """Whether head and embedding share a weight where the config says nothing."""
    norms: Literal["before", "after"] = "before"
    """Where attention and MLP have their norm: on what goes in, or on what comes out."""
    casts_before_scaling: bool = True
    """Whether a norm returns to the model's dtype before it is multiplied by its weight."""
    query_norm: Literal["none", "head", "row"] = "none"
    """Queries and keys are normalised a head at a time, a row at a time, or not."""
    is_fused: bool = False
    """One matrix for query, key and value, and one for gate and up."""
    scales_residuals: bool = False
    """Multiplies embeddings, each branch and the logits by constants."""
    key_value_heads: int | None = None
    """Where the config says nothing; None: as many as query heads."""
    head_dim: int | None = None
    """Where the config says nothing; None: width / heads."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(attention_bias=False, output_bias=False, mlp_bias=False, key_value_heads=8),
    "qwen2": Family(attention_bias=True, output_bias=False, mlp_bias=False, key_value_heads=32),
    "qwen3": Family(mlp_bias=False, query_norm="head", key_value_heads=32, head_dim=128),
    "smollm3": Family(tied=True, key_value_heads=4),
    "granite": Family(scales_residuals=True),
    "olmo2": Family(mlp_bias=False, norms="after", casts_before_scaling=False, query_norm="row"),
    "phi3": Family(attention_bias=False, output_bias=False, mlp_bias=False, is_fused=True),
}


@dataclass(frozen=True)
class Parameter:
    """`layer` is None outside the decoder's layers. `is_linear`: the weight of an nn.Linear that is no head."""

    name: str
    shape: Shape
    is_linear: bool
    layer: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only language model: widths and counts, in elements."""

    model_type: str
    family: Family
    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    is_tied: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    longest: int | None
    """Positions the model knows, None where the config does not say."""
    sliding_window: int | None
    """Tokens every layer looks back; a longer sequence needs an explicit mask."""

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Architecture:
        """From the content of a config.json.

        Raises RefusedError for a model_type without formulas, RecipeError for a config that lacks a size.
        """
        name = str(config.get("model_type", "without a model_type"))
        family = FAMILIES.get(name)
        if family is None:
            raise RefusedError(
                f"The fast memory plan has formulas for {', '.join(FAMILIES)}, and this model is {name}. "
                "The simulation handles every model: lowmem plan without --formula or --search."
            )
        heads = _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        attention_bias = bool(config.get("attention_bias", False))
        uses_window = config.get("use_sliding_window", name == "mistral")
        return Architecture(
            model_type=name,
            family=family,
            vocabulary=_size(config, "vocab_size"),
            hidden=hidden,
            mlp=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or family.key_value_heads or heads,
            head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
            is_tied=bool(config.get("tie_word_embeddings", family.tied)),
            attention_bias=attention_bias if family.attention_bias is None else family.attention_bias,
            output_bias=attention_bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
            longest=config.get("max_position_embeddings"),
            sliding_window=config.get("sliding_window") if uses_window else None,
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.key_value_heads * self.head_dim

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter in the order of `model.named_parameters()`; tied ones once."""
        found = [Parameter("model.embed_tokens.weight", (self.vocabulary, self.hidden), is_linear=False)]
        for layer in range(self.layers):
            for name, shape, is_linear in self._of_a_layer():
                found.append(Parameter(f"model.layers.{layer}.{name}", shape, is_linear, layer))
        found.append(Parameter("model.norm.weight", (self.hidden,), is_linear=False))
        if not self.is_tied:
            found.append(Parameter("lm_head.weight", (self.vocabulary, self.hidden), is_linear=False))
        return tuple(found)

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def buffer_numels(self) -> tuple[int, ...]:
        """Elements of the float32 buffers: the rotary frequencies, and those before any scaling."""
        return (self.head_dim // 2, self.head_dim // 2)

    def _of_a_layer(self) -> Iterator[tuple[str, Shape, bool]]:
        hidden, queries, keys = self.hidden, self.query_width, self.key_value_width
        if self.family.is_fused:
            yield from _linear("self_attn.o_proj", queries, hidden, self.output_bias)
            yield from _linear("self_attn.qkv_proj", hidden, queries + 2 * keys, self.attention_bias)
            yield from _linear("mlp.gate_up_proj", hidden, 2 * self.mlp, self.mlp_bias)
        else:
            yield from _linear("self_attn.q_proj", hidden, queries, self.attention_bias)
            yield from _linear("self_attn.k_proj", hidden, keys, self.attention_bias)
            yield from _linear("self_attn.v_proj", hidden, keys, self.attention_bias)
            yield from _linear("self_attn.o_proj", queries, hidden, self.output_bias)
            if self.family.query_norm != "none":
                by_head = self.family.query_norm == "head"
                yield "self_attn.q_norm.weight", (self.head_dim if by_head else queries,), False
                yield "self_attn.k_norm.weight", (self.head_dim if by_head else keys,), False
            yield from _linear("mlp.gate_proj", hidden, self.mlp, self.mlp_bias)
            yield from _linear("mlp.up_proj", hidden, self.mlp, self.mlp_bias)
        yield from _linear("mlp.down_proj", self.mlp, hidden, self.mlp_bias)
        before = self.family.norms == "before"
        yield ("input_layernorm.weight" if before else "post_attention_layernorm.weight"), (hidden,), False
        yield (
            ("post_attention_layernorm.weight" if before else "post_feedforward_layernorm.weight"),
            (hidden,),
            False,
        )


def _linear(name: str, inputs: int, outputs: int, has_bias: bool) -> Iterator[tuple[str, Shape, bool]]:
    yield f"{name}.weight", (outputs, inputs), True
    if has_bias:
        yield f"{name}.bias", (outputs,), False


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(
            f"model.name_or_path: config.json says {key}: {value}; a memory plan needs a whole number >= 1 there."
        )
    return value
