# ruff: noqa: RUF009 -- key() is dataclasses.field() with a doc; it makes no shared default
"""Every key a recipe may hold, with its type, default, range and meaning.

The dataclasses below are the only description of a recipe: `load.py` checks files against them,
`lowmem show --schema` prints them, and the training flow reads them. A key that is not here does not
exist. The settings inside `optimizer:` belong to each algorithm and come from `optimizers.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED: Any = object()


def key(
    default: Any = REQUIRED,
    doc: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """One recipe key. `at_least` and `at_most` are inclusive, `above` is exclusive; None stays allowed
    where the annotation allows it."""
    metadata = {"doc": doc, "at_least": at_least, "above": above, "at_most": at_most}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, (type, list, dict)):
        factory = default if isinstance(default, type) else default.copy
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Int8Recipe:
    embeddings: bool = key(False, "the input embedding and the output head in int8, too")
    group_size: int = key(256, "neighbours of a row that share a scale", at_least=16)
    scales: Literal["fp32", "bf16"] = key("fp32", "what scales are stored in; 4 or 2 bytes a group")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    name_or_path: str = key(
        doc="Hugging Face id, a local folder with config.json and safetensors, or builtin:tiny-llama"
    )
    dtype: Literal["bfloat16", "float32"] = key("bfloat16", "what the weights are stored and trained in")
    weights: Literal["bf16", "int8", "nf4"] = key(
        "bf16",
        "bf16: plain numbers of model.dtype, float32 among them; nf4: frozen 4-bit codes of the linear layers, for "
        "lora:, through bitsandbytes; int8: 8-bit codes of the linear layers, trained in place",
    )
    int8: Int8Recipe | None = key(
        None, "how, with weights: int8; a folder that is stored in int8 keeps the settings it has"
    )
    attn: Literal["sdpa", "eager", "flash_attention_2"] = key("sdpa", "attention implementation")
    revision: str | None = key(None, "branch, tag or commit of a Hugging Face id")
    trust_remote_code: bool = key(
        False, "run Python code that comes with the model; off unless asked by name"
    )


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    r: int = key(16, "rank of the adapters", at_least=1)
    alpha: float = key(32.0, "adapters are scaled by alpha / r", above=0)
    dropout: float = key(0.0, "dropout on the adapters' input", at_least=0, at_most=0.9)
    target: str | list[str] = key("all-linear", "all-linear, or names of the modules that get adapters")


@dataclass(frozen=True, kw_only=True)
class SourceRecipe:
    """Where rows come from. Exactly one of `path`, `hub` and `builtin`."""

    path: str | None = key(
        None, "JSONL, JSON, Parquet or text file, .gz too; relative to the working directory"
    )
    hub: str | None = key(None, "data set id on the Hugging Face Hub (through datasets)")
    builtin: str | None = key(None, "a generated data set; lowmem ls builtins lists them")
    name: str | None = key(None, "configuration name of a hub data set")
    split: str | None = key(None, "split of a hub data set (train), or of a builtin (train | held_out)")
    format: Literal["alpaca", "sharegpt", "messages", "prompt_response", "text"] | None = key(
        None, "shape of a row; required with path and hub"
    )
    skip: float | None = key(
        None, "leave out the first N rows (>= 1) or this fraction of all rows (< 1)", at_least=0
    )
    take: float | None = key(
        None, "use N rows (>= 1) or this fraction of all rows (< 1), after skip", above=0
    )
    size: int | None = key(None, "number of rows a builtin generates", at_least=1)


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    train: SourceRecipe = key(doc="training rows")
    eval: SourceRecipe | None = key(None, "held-out rows")
    template: str = key(
        "auto", "auto (the tokenizer's own, else plain), a name from lowmem ls templates, or a .jinja file"
    )
    train_on: Literal["assistant", "last_turn", "all"] = key("assistant", "which tokens carry loss")
    max_length: int = key(1024, "longest sequence in tokens", at_least=8)
    packing: bool = key(False, "put several documents in one sequence, never attending across them")
    on_too_long: Literal["drop", "truncate_left", "truncate_right"] = key(
        "truncate_right", "rows over max_length"
    )
    on_bad_row: Literal["error", "skip"] = key("error", "malformed rows and rows without any trained token")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """`name`, where it applies, and the algorithm's own settings (lr, weight_decay, rank, ...)."""

    name: str = key(doc="lowmem ls optimizers lists them")
    target: list[str] = key(
        ["attn", "mlp"], "matrix rules treat the linear layers whose module path contains one of these"
    )
    clip: Literal["applied", "full", "tensor"] = key(
        "applied",
        "what train.max_grad_norm limits: the norm of the gradients as the rules use them (projected where they "
        "are), of the whole gradients, or each parameter's gradient by itself, to its share",
    )
    refresh_from: Literal["boundary", "first_micro_batch"] = key(
        "boundary",
        "whose gradient a basis that is due is fitted to; the first basis comes from the first micro-batch",
    )
    head: dict[str, Any] | None = key(
        None, "another optimizer, {name: ..., its settings}, for the output head and an embedding tied to it"
    )
    fallback: dict[str, Any] | None = key(
        None, "another optimizer, {name: ..., its settings}, for embeddings, head, norms and biases"
    )
    groups: list[dict[str, Any]] = key(
        list,
        "for some parameters other settings, {match: [parts of their names], settings}, or another optimizer with "
        "name: ...; before target, head and fallback",
    )
    beta2_half_life_tokens: float | None = key(
        None,
        "tokens after which a second moment has forgotten half; gives beta2, of the fallback too, from the mean number "
        "of tokens in a step (arXiv:2507.07101)",
        above=0,
    )
    settings: dict[str, Any] = key(dict, "the algorithm's settings; written directly under optimizer:")


@dataclass(frozen=True, kw_only=True)
class EvalRecipe:
    every: int | None = key(
        None, "evaluate each N steps; always once at the end when data.eval is given", at_least=1
    )
    at_start: bool = key(False, "evaluate before the first step too")
    max_batches: int | None = key(50, "batches of the loss; null for all", at_least=1)
    batch_size: int | None = key(
        None, "rows per device and batch; null for train.per_device_batch_size", at_least=1
    )
    loss_only: bool = key(True, "false: also generate answers and count exact matches")
    max_answers: int = key(100, "answers to generate when loss_only is false", at_least=1)
    max_new_tokens: int = key(64, "longest generated answer", at_least=1)


@dataclass(frozen=True, kw_only=True)
class SchedulerRecipe:
    name: Literal["constant", "linear", "cosine"] = key("cosine", "shape after the warm-up")
    warmup_ratio: float = key(0.03, "part of all steps that warms up", at_least=0, at_most=1)
    warmup_steps: int | None = key(None, "steps that warm up; wins over warmup_ratio", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    epochs: float = key(1.0, "passes over the training rows", above=0)
    max_steps: int | None = key(None, "stop after so many optimizer steps; wins over epochs", at_least=1)
    per_device_batch_size: int = key(1, "sequences per device and micro-batch", at_least=1)
    gradient_accumulation_steps: int = key(1, "micro-batches per optimizer step", at_least=1)
    max_grad_norm: float | None = key(
        1.0, "global norm the gradient is clipped to; null for no clipping", above=0
    )
    lr_scheduler: SchedulerRecipe = key(SchedulerRecipe, "learning-rate schedule")
    execution: Literal["auto", "plain", "project", "fused"] = key(
        "auto",
        "plain keeps gradients until the step, project keeps them projected, fused updates in backward; auto takes "
        "the leanest that can do the accumulation and clipping asked for",
    )
    activation_checkpointing: bool = key(False, "recompute activations in backward instead of keeping them")
    activation_offload: bool = key(
        False,
        "on CUDA, keep what activation checkpointing keeps in the host's pinned memory; the bits stay the same",
    )
    loss: Literal["chunked", "plain"] = key("chunked", "chunked never holds the whole logits")
    head_gradient: Literal["auto", "whole"] = key(
        "auto",
        "auto: with execution fused, the gradients of output head and embedding are made and used some rows at a time "
        "where that is exact, which takes a few more matrix products of the head; whole: never",
    )
    seed: int = key(0, "seed of weights, data order and stochastic rounding", at_least=0)


@dataclass(frozen=True, kw_only=True)
class SaveRecipe:
    dir: str | None = key(None, "run folder; null for runs/<recipe name>")
    every: int | None = key(None, "checkpoint each N steps; null for none but at an interrupt", at_least=1)
    keep: int = key(2, "checkpoints kept", at_least=1)
    optimizer_states: Literal["newest", "all"] = key(
        "newest", "checkpoints that can be continued exactly; older ones keep the weights alone"
    )
    probe_at_start: bool = key(True, "write and read a checkpoint on trial before the first step")
    model: bool = key(True, "write the final model (plain safetensors, or the LoRA adapters) to <dir>/model")
    merge_lora: bool = key(False, "write the merged model instead of the adapters")
    int8: bool = key(
        False,
        "with model.weights: int8, write the final model in int8, which only lowmem loads, not in model.dtype",
    )


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    baseline: Literal["adamw", "none"] = key(
        "adamw", "run a few AdamW steps on the same work to compare memory"
    )
    plan: bool = key(True, "simulate the measured steps afterwards, to hold plan against measurement")
    log_every: int = key(10, "steps between two lines of metrics.jsonl", at_least=1)
    memory_snapshot: bool = key(
        False, "on CUDA, write one step's allocations for the viewer at pytorch.org/memory_viz"
    )


@dataclass(frozen=True, kw_only=True)
class DistributedRecipe:
    strategy: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = key(
        "auto",
        "how several processes share the work; auto takes what the launcher started, another must match it",
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: ModelRecipe = key(doc="what is fine-tuned")
    lora: LoraRecipe | None = key(None, "train LoRA adapters (through peft) instead of every parameter")
    data: DataRecipe = key(doc="what it is trained on")
    optimizer: OptimizerRecipe = key(doc="how it is trained")
    eval: EvalRecipe = key(EvalRecipe, "evaluation")
    train: TrainRecipe = key(TrainRecipe, "length, batch, schedule")
    save: SaveRecipe = key(SaveRecipe, "what is written where")
    resume: str = key("auto", "auto (the newest checkpoint of save.dir), never, or a checkpoint folder")
    report: ReportRecipe = key(ReportRecipe, "logging and the memory report")
    distributed: DistributedRecipe = key(DistributedRecipe, "several processes")
