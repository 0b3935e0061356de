"""The formulas against simulations of the real code, against the constants they repeat, and in their own terms."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from lowmem.data.batches import collate
from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.planned_batches import planned_batch
from lowmem.hf.simulated_run import simulate_run
from lowmem.hf.tiled_cross_entropy import FEWEST_COLUMNS, TILE_BYTES
from lowmem.hf.tiled_cross_entropy import columns_per_tile as real_columns_per_tile
from lowmem.memory import (
    activation_loss,
    estimate_method,
    frugal_states,
    low_rank_formulas,
    row_gradient_formulas,
    state_formulas,
    step_formulas,
    update_tiles,
    workspaces,
)
from lowmem.memory.architecture import FAMILIES, Architecture
from lowmem.memory.estimate import BASELINES, CUBLAS_BYTES, PAD_TO, estimate, estimate_baseline
from lowmem.memory.ledger import rounded
from lowmem.memory.row_gradient_formulas import takes_rows
from lowmem.memory.tracker import ByteTracker
from lowmem.numerics import int4_groups, int8_blocks, tiles
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.settings import settings_of
from lowmem.recipe.schema import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    SourceRecipe,
    TrainRecipe,
)
from tests.optim.cases import CASES

ROOT = Path(__file__).parent.parent.parent

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_32_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_31_8B = {
    **LLAMA_2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN_25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


def recipe(
    optimizer: str = "adamw",
    *,
    tokens: int = 256,
    packing: bool = False,
    lora: LoraRecipe | None = None,
    model: dict | None = None,
    settings: dict | None = None,
    fallback: dict | None = None,
    head: dict | None = None,
    **train: object,
) -> Recipe:
    return Recipe(
        model=ModelRecipe(name_or_path="model", **(model or {})),
        lora=lora,
        data=DataRecipe(train=SourceRecipe(builtin="arithmetic"), max_length=tokens, packing=packing),
        optimizer=OptimizerRecipe(
            name=optimizer, fallback=fallback, head=head, settings={"lr": 1e-4, **(settings or {})}
        ),
        train=TrainRecipe(**{"max_grad_norm": None, "execution": "plain", **train}),
    )


def simulated(
    config: dict,
    work: Recipe,
    *,
    full_rows: bool = False,
    on_cuda: bool = False,
    optimizer_of=None,
    refreshes: bool = False,
):
    """Steps of the real code on fake tensors: one that makes the state, one that has it, one that `refreshes`."""
    batch = planned_batch(work, full_rows=full_rows)
    return simulate_run(
        work,
        [[batch] * work.train.gradient_accumulation_steps] * (3 if refreshes else 2),
        refresh=refreshes,
        on_cuda=on_cuda,
        config=AutoConfig.for_model(**config),
        optimizer_of=optimizer_of,
    )


def assert_agrees(found, run, *, of_the_rest: float = 0.01) -> None:
    """Within 2 % of the peak and, which is stricter, closely on what is neither weights nor state."""
    peak, parts = run.measured.peak_bytes, run.measured.parts
    assert found.peak_bytes == pytest.approx(peak, rel=0.02)
    assert found.parts["weights"] == parts["weights"]
    assert found.parts["optimizer_state"] == parts["optimizer_state"]
    rest = peak - parts["weights"] - parts["optimizer_state"]
    assert abs(found.peak_bytes - peak) < of_the_rest * rest
    assert sum(found.parts.values()) == found.peak_bytes
    assert found.conditions["parameters"] == run.parameters
    assert found.conditions["trained_parameters"] == run.trained_parameters


# ---------------------------------------------------------------- against simulations


@pytest.mark.parametrize(
    ("model_type", "checkpointing", "layers"),
    [
        ("llama", False, 4),
        ("qwen3", True, 4),
        ("olmo2", True, 2),
        ("granite", True, 2),
        *((name, False, 2) for name in FAMILIES if name not in ("llama", "mistral", "smollm3")),
        *(pytest.param(name, False, 2, marks=pytest.mark.slow) for name in ("mistral", "smollm3")),
    ],
)
def test_every_family_agrees_with_its_simulation(model_type, checkpointing, layers):
    config = {**SMALL, "model_type": model_type, "num_hidden_layers": layers}
    work = recipe("sgd", per_device_batch_size=2, activation_checkpointing=checkpointing)
    assert_agrees(estimate(work, Architecture.from_config(config), on_cuda=False), simulated(config, work))


VARIANTS = {
    "whole logits": dict(loss="plain"),
    "whole logits in float32": dict(loss="plain", model={"dtype": "float32"}),
    "tiles in float32": dict(model={"dtype": "float32"}, activation_checkpointing=True),
    "several tiles": dict(tokens=1024, per_device_batch_size=16, activation_checkpointing=True),
    "several tiles in float32": dict(
        tokens=1024, per_device_batch_size=16, activation_checkpointing=True, model={"dtype": "float32"}
    ),
    "accumulation": dict(gradient_accumulation_steps=2, activation_checkpointing=True),
    "packing": dict(packing=True, per_device_batch_size=2),
    "whole attention scores": dict(model={"attn": "eager"}, per_device_batch_size=2),
    "adapters": dict(lora=LoraRecipe(r=8, dropout=0.1), per_device_batch_size=2),
    "few adapters, recomputed": dict(
        lora=LoraRecipe(r=8, target=["q_proj", "v_proj"]), activation_checkpointing=True, loss="plain"
    ),
    "adapters, recomputed": dict(
        lora=LoraRecipe(r=16), per_device_batch_size=4, activation_checkpointing=True
    ),
    "adapters on 4-bit codes": dict(lora=LoraRecipe(r=8), model={"weights": "nf4"}, per_device_batch_size=2),
    "adapters on 4-bit codes, recomputed": dict(
        lora=LoraRecipe(r=16),
        model={"weights": "nf4"},
        per_device_batch_size=4,
        activation_checkpointing=True,
    ),
    "adapters in float32": dict(lora=LoraRecipe(r=8), model={"dtype": "float32"}),
}


SLOW_VARIANTS = ("whole logits in float32", "several tiles in float32", "adapters in float32", "accumulation")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_VARIANTS else []) for name in VARIANTS],
)
def test_every_way_to_train_agrees_with_its_simulation(variant):
    if "4-bit" in variant:
        pytest.importorskip("bitsandbytes", reason="4-bit codes are bitsandbytes'")
    config = {**SMALL, "model_type": "llama"}
    work = recipe("sgd", **VARIANTS[variant])
    assert_agrees(estimate(work, Architecture.from_config(config), on_cuda=False), simulated(config, work))


@pytest.mark.parametrize("layers", [2, 3, 4, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offloaded_inputs_agree_with_their_simulation(dtype, layers):
    config = {**SMALL, "model_type": "llama", "num_hidden_layers": layers}
    work = recipe(
        "sgd",
        model={"dtype": dtype},
        tokens=512,
        per_device_batch_size=16,
        loss="plain",
        activation_checkpointing=True,
        activation_offload=True,
    )
    found, run = estimate(work, Architecture.from_config(config)), simulated(config, work, on_cuda=True)
    assert_agrees(found, run, of_the_rest=0.03)
    for part in ("activations", "temporary"):
        assert found.parts[part] == pytest.approx(run.measured.parts[part], rel=0.001)
    itemsize = 2 if dtype == "bfloat16" else 4
    assert found.pinned_host_bytes == run.pinned_host_bytes == layers * 16 * 512 * 256 * itemsize


def test_inputs_below_the_smallest_size_and_runs_on_a_cpu_are_estimated_without_offload():
    architecture = Architecture.from_config({**SMALL, "model_type": "llama", "num_hidden_layers": 9})
    for tokens, on_cuda in ((64, True), (4096, False)):
        with_offload, without = (
            estimate(
                recipe(tokens=tokens, activation_checkpointing=True, activation_offload=on),
                architecture,
                on_cuda=on_cuda,
            )
            for on in (True, False)
        )
        assert with_offload.parts == without.parts
        assert with_offload.pinned_host_bytes == 0


RANK = {"rank": 32}
EXECUTIONS = {
    "fused": (recipe("sgd_sai", execution="fused"), "backward"),
    "fused, accumulation": (
        recipe("adamw", execution="fused", gradient_accumulation_steps=3, activation_checkpointing=True),
        "backward",
    ),
    "fused, added to the momentum": (
        recipe("sgd_sai", execution="fused", gradient_accumulation_steps=3, activation_checkpointing=True),
        "backward",
    ),
    "fused, added to a wider momentum": (
        recipe(
            "sgd",
            settings={"momentum": 0.9, "storage": {"moment": "fp32"}},
            gradient_accumulation_steps=2,
            execution="auto",
            activation_checkpointing=True,
        ),
        "backward",
    ),
    "fused, low rank": (
        recipe("galore", settings=RANK, execution="fused", activation_checkpointing=True),
        "backward",
    ),
    "fused, factored": (recipe("adafactor", execution="fused"), "backward"),
    "fused, stateless": (
        recipe("sinkgd", fallback={"name": "adafactor"}, execution="fused", activation_checkpointing=True),
        "backward",
    ),
    "projected": (
        recipe("galore", settings=RANK, execution="project", per_device_batch_size=2),
        "backward",
    ),
    "projected, accumulation": (
        recipe(
            "galore",
            settings={**RANK, "accumulator": "fp32"},
            execution="project",
            gradient_accumulation_steps=2,
            per_device_batch_size=2,
            activation_checkpointing=True,
        ),
        "backward",
    ),
    "projected, all refreshed in one step": (
        recipe(
            "galore",
            settings={**RANK, "stagger": False, "refresh_every": 2},
            execution="project",
            gradient_accumulation_steps=2,
        ),
        "backward",
    ),
    "projected at the boundary": (
        recipe("galore", settings=RANK, max_grad_norm=1.0, tokens=64, activation_checkpointing=True),
        "optimizer",
    ),
}


@pytest.mark.parametrize("case", EXECUTIONS)
def test_every_execution_agrees_with_its_simulation(case):
    work, phase = EXECUTIONS[case]
    config = {**SMALL, "model_type": "llama", "num_hidden_layers": 4 if case == "fused, low rank" else 2}
    found = estimate(work, Architecture.from_config(config), on_cuda=False)
    assert_agrees(found, simulated(config, work, refreshes=case.startswith("projected,")), of_the_rest=0.02)
    assert found.phase == phase


LARGE_VOCABULARY = {**SMALL, "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 32768}
BY_ROWS = {
    "sgd": (recipe("sgd", execution="fused", tokens=16), {}),
    "adamw, tied": (recipe("adamw", execution="fused", tokens=16), {"tie_word_embeddings": True}),
    "adamw by torch's kernels": (
        recipe("adamw", execution="fused", tokens=16, model={"dtype": "float32"}),
        {"tie_word_embeddings": True},
    ),
    "adafactor": (recipe("adafactor", execution="fused", tokens=16), {}),
    "adafactor in float32, tied": (
        recipe("adafactor", execution="fused", tokens=16, model={"dtype": "float32"}),
        {"tie_word_embeddings": True},
    ),
    "sgd_sai, long": (recipe("sgd_sai", execution="fused", tokens=512, activation_checkpointing=True), {}),
    "scaled logits": (recipe("sgd", execution="fused", tokens=16), {"model_type": "granite"}),
    "whole logits": (recipe("adamw", execution="fused", tokens=16, loss="plain"), {}),
    "a head that is whitened": (
        recipe("sgd", execution="fused", tokens=16, head={"name": "muon"}),
        {},
    ),
    "whole gradients": (recipe("sgd", execution="fused", tokens=16, head_gradient="whole"), {}),
}


@pytest.mark.parametrize("case", BY_ROWS)
def test_a_large_vocabulary_by_rows_agrees_with_its_simulation(case):
    work, changes = BY_ROWS[case]
    config = {**LARGE_VOCABULARY, **changes}
    found = estimate(work, Architecture.from_config(config), on_cuda=False)
    assert_agrees(found, simulated(config, work), of_the_rest=0.02)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=map(str, CASES))
def test_who_takes_a_gradient_by_rows_is_known_to_the_formulas(name, settings):
    group = {key: setting.default for key, setting in settings_of(optimizer_class(name)).items()} | settings
    for shape in [(24, 48), (48, 24), (4, 4)]:
        rule = optimizer_class(name).rule(group, shape)
        assert takes_rows(name, settings, shape) == rule.takes_rows, shape


@pytest.mark.parametrize("tied", [False, True])
def test_by_rows_no_gradient_of_the_heads_size_is_planned(tied):
    config = {**LARGE_VOCABULARY, "tie_word_embeddings": tied}
    whole, by_rows = (
        simulated(config, recipe("sgd", execution="fused", tokens=16, head_gradient=how)).measured
        for how in ("whole", "auto")
    )
    head = LARGE_VOCABULARY["vocab_size"] * LARGE_VOCABULARY["hidden_size"] * 2
    assert whole.parts["gradients"] >= head
    assert by_rows.parts["gradients"] < head / 2
    assert by_rows.peak_bytes < whole.peak_bytes - head / 2


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("execution", ["plain", "project", "fused"])
def test_every_execution_agrees_at_real_widths(execution, accumulation):
    work = recipe(
        "galore",
        tokens=512,
        execution=execution,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=True,
    )
    config = {**LLAMA_2_7B, "num_hidden_layers": 2}
    run = simulated(config, work, on_cuda=True, refreshes=True)
    assert_agrees(estimate(work, Architecture.from_config(config)), run, of_the_rest=0.04)


def test_an_execution_that_cannot_do_what_is_asked_for_is_refused_as_a_run_refuses_it():
    architecture = Architecture.from_config({**SMALL, "model_type": "llama"})
    with pytest.raises(RefusedError, match="optimizer.clip: tensor"):
        estimate(recipe(execution="fused", max_grad_norm=1.0), architecture)


@pytest.mark.parametrize("name", ["adamw_fused", "adamw_foreach", "adamw_fused_backward"])
def test_the_adamw_baselines_agree_with_their_simulations(name):
    config = {**SMALL, "model_type": "llama", "tie_word_embeddings": True}
    work = recipe(activation_checkpointing=True)
    run = simulated(config, work, full_rows=True, optimizer_of=adamw_variants(1e-4, 0.0)[name])
    found = estimate_baseline(name, work, Architecture.from_config(config), masked=False, on_cuda=False)
    assert_agrees(found, run)


WIDE = {
    "Llama-3.2-1B, AdamW": (LLAMA_32_1B, dict(tokens=2048), "adamw_fused", True),
    "Llama-3.2-1B, AdamW in backward": (
        LLAMA_32_1B,
        dict(tokens=512, per_device_batch_size=4, activation_checkpointing=True),
        "adamw_fused_backward",
        False,
    ),
    "Llama-2-7B, GaLore": (LLAMA_2_7B, dict(optimizer="galore", tokens=512), None, False),
    "Llama-2-7B, SGD-SaI": (
        LLAMA_2_7B,
        dict(optimizer="sgd_sai", tokens=1024, activation_checkpointing=True, model={"dtype": "float32"}),
        None,
        True,
    ),
    "Llama-3.1-8B, AdamW, long rows": (
        LLAMA_31_8B,
        dict(tokens=4096, activation_checkpointing=True),
        "adamw_fused",
        False,
    ),
    "Qwen2.5-7B, AdamW foreach, whole logits": (
        QWEN_25_7B,
        dict(tokens=512, per_device_batch_size=4, loss="plain"),
        "adamw_foreach",
        False,
    ),
}


SLOW = ("Llama-2-7B, GaLore", "Llama-2-7B, SGD-SaI", "Llama-3.1-8B, AdamW, long rows", "Llama-3.2-1B, AdamW")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in WIDE]
)
def test_real_widths_agree_with_their_simulations_on_cuda(case):
    config, train, baseline, full_rows = WIDE[case]
    config, work = {**config, "num_hidden_layers": 2}, recipe(**train)
    architecture = Architecture.from_config(config)
    if baseline is None:
        found, optimizer_of = estimate(work, architecture, masked=not full_rows), None
    else:
        found = estimate_baseline(baseline, work, architecture, masked=not full_rows)
        optimizer_of = adamw_variants(1e-4, 0.0)[baseline]
    run = simulated(config, work, full_rows=full_rows, on_cuda=True, optimizer_of=optimizer_of)
    # The simulated allocator holds blocks that are up to 1 MiB larger than their tensors.
    assert_agrees(found, run, of_the_rest=0.03)
    assert found.phase == max(run.moments, key=lambda moment: moment.peak_bytes).phase


# ---------------------------------------------------------------- the update of one parameter

UPDATES = [
    {},
    {"rounding": "nearest"},
    {"storage": {"moment": "fp32"}},
    {"storage": {"moment": "bf16", "variance": "bf16", "basis": "fp32"}},
    {"storage": {"moment": "int8", "variance": "int8", "basis": "int4"}},
    {"storage": {"moment": "int8", "basis": "int8"}, "rounding": "nearest"},
    {"storage": {"moment": "int8"}, "momentum": 0.9},
    {"storage": {"moment": "int8", "variance": "int8", "basis": "int4"}, "rank": 24},
    {"momentum": 0.9},
    {"momentum": 0.0},
    {"momentum": 0.9, "nesterov": True},
    {"rank": 24},
    {"rank": 24, "projection": "svd"},
    {"rank": 24, "projection": "dct", "on_refresh": "rotate"},
    {"rank": 24, "residual": "none"},
    {"rank": 200, "rounding": "nearest"},
    {"beta1": 0.9},
    {"beta1": 0.9, "relative": True, "storage": {"moment": "fp32"}},
    {"beta1": 0.9, "storage": {"moment": "int8"}},
    {"relative": True},
    {"normalize": "row"},
    {"normalize": "column"},
    {"momentum": 0.9, "iterations": 2},
    {"whitening": "newton_schulz"},
    {"whitening": "eigh", "storage": {"moment": "fp32"}},
    {"density": 0.0, "residual": "sgd"},
    {"density": 1.0, "inner": "lion"},
    {"density": 0.9},
    {"density": 0.6, "inner": "momentum", "storage": {"moment": "int8"}},
    {"density": 0.6, "inner": "momentum", "rounding": "nearest"},
    {"density": 0.4, "inner": "sign"},
    {"density": 0.4, "projection": "block"},
    {"density": 0.2, "projection": "random"},
    {
        "density": 0.2,
        "projection": "subspace",
        "inner": "lion",
        "storage": {"moment": "fp32", "basis": "fp32"},
    },
    {"density": 0.2, "projection": "svd", "inner": "momentum", "residual": "none", "rounding": "nearest"},
    {"density": 0.4, "projection": "block", "inner": "momentum", "storage": {"moment": "fp32"}},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(96, 640), (640, 96), (50_000,)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_temporaries_of_an_update_are_those_that_a_tracker_counts(name, shape, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_NUMEL", 1 << 14)
    monkeypatch.setattr(update_tiles, "TILE_NUMEL", 1 << 14)
    monkeypatch.setattr(tiles, "CODED_NUMEL", 1 << 12)
    monkeypatch.setattr(update_tiles, "CODED_NUMEL", 1 << 12)
    known = optimizer_class(name)([nn.Parameter(torch.ones(1))]).param_groups[0]
    for settings in UPDATES:
        if not set(settings) <= set(known):
            continue
        param = nn.Parameter(torch.randn(shape).to(dtype))
        param.grad = torch.randn(shape).to(dtype)
        optimizer = optimizer_class(name)([param], **settings)
        for _ in range(2):  # the state exists in the second
            tracker = ByteTracker(partial(owned, param, optimizer), round_to=1)
            with tracker, tracker.phase("optimizer"):
                optimizer.step()
        counted = tracker.fullest().peak_bytes - sum(
            tensor.nbytes for _, tensor, _ in owned(param, optimizer)
        )
        expected = step_formulas.update_bytes(name, settings, shape, dtype.itemsize, on_cuda=False)
        if is_refreshed_only_once(name, settings, shape):
            assert counted <= expected + 512  # scalars
        else:
            assert counted == pytest.approx(expected, rel=0.03, abs=2048), (settings, counted, expected)


def owned(param, optimizer):
    yield "weights", param, "weight"
    yield "gradients", param.grad, "gradient"
    for state in optimizer.state.values():
        yield from (("optimizer_state", tensor, name) for name, tensor in state.items())


def is_refreshed_only_once(name: str, settings: dict, shape: tuple[int, ...]) -> bool:
    """The second step has no refresh, and the formula's number is of one that has."""
    return (
        name == "sgd_sai"
        or (name in ("galore", "q_galore", "fira") and len(shape) == 2 and settings.get("rank", 128) < 96)
        or (name == "frugal" and len(shape) == 2 and settings.get("projection") in frugal_states.SUBSPACES)
    )


# ---------------------------------------------------------------- what is stated and what follows


def test_constants_are_those_of_the_code_they_describe():
    assert activation_loss.TILE_BYTES == TILE_BYTES
    assert activation_loss.FEWEST_COLUMNS == FEWEST_COLUMNS
    for tokens in (0, 1, 100, 4096, 200_000):
        assert activation_loss.columns_per_tile(tokens) == real_columns_per_tile(tokens, TILE_BYTES)
    assert update_tiles.TILE_NUMEL == tiles.TILE_NUMEL
    assert update_tiles.CODED_NUMEL == tiles.CODED_NUMEL
    assert row_gradient_formulas.SLICES_START_AT == tiles.SLICES_START_AT
    for shape in ((32000, 4096), (152064, 3584), (40, 48), (300_000, 10)):
        assert row_gradient_formulas.rows_in_a_block(shape) == next(tiles.state_row_slices(shape)).stop
    assert (state_formulas.INT8_BLOCK, state_formulas.INT4_GROUP) == (int8_blocks.BLOCK, int4_groups.GROUP)
    assert CUBLAS_BYTES == workspaces.CUBLAS_BYTES
    assert workspaces._COPIES[torch.ops.aten._linalg_svd.default] == low_rank_formulas.SVD_COPIES
    assert workspaces._COPIES[torch.ops.aten.linalg_qr.default] == low_rank_formulas.QR_COPIES
    assert workspaces._COPIES[torch.ops.aten._fft_r2c.default] == low_rank_formulas.FFT_COPIES
    one = collate(0)([{"input_ids": [1], "labels": [1]}])
    assert one["input_ids"].shape[1] == PAD_TO


def test_a_float32_master_takes_sixteen_bytes_a_parameter():
    config = {**SMALL, "model_type": "llama"}
    architecture = Architecture.from_config(config)
    found = estimate_baseline("adamw_fp32_master", recipe(tokens=8), architecture)
    kept = sum(found.parts[part] for part in ("weights", "gradients", "optimizer_state"))
    assert found.phase == "optimizer"
    assert kept == pytest.approx(16 * architecture.num_parameters, rel=0.01)


def test_nf4_takes_what_bitsandbytes_stores():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
        weight = torch.randn(1024, 2048)
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = codes.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert weight.numel() * estimate_method.NF4_BYTES == pytest.approx(stored, rel=0.001)


def test_four_bit_weights_save_on_linear_layers_only():
    architecture = Architecture.from_config({**LLAMA_32_1B, "num_hidden_layers": 2})
    work = recipe()
    lora, qlora = (estimate_baseline(name, work, architecture) for name in ("lora_r16", "qlora_r16"))
    linear = sum(each.numel for each in architecture.parameters if each.is_linear)
    saved = lora.parts["weights"] - qlora.parts["weights"]
    assert saved == pytest.approx(linear * (2 - estimate_method.NF4_BYTES), rel=0.01)
    assert lora.parts["optimizer_state"] == qlora.parts["optimizer_state"]


def test_eight_bit_adamw_takes_a_quarter_of_float32_state():
    architecture = Architecture.from_config({**SMALL, "model_type": "llama"})
    work = recipe(model={"dtype": "float32"})
    fused, eight = (
        estimate_baseline(name, work, architecture) for name in ("adamw_fused", "bitsandbytes_adamw8bit")
    )
    assert eight.parts["optimizer_state"] == pytest.approx(fused.parts["optimizer_state"] / 4, rel=0.03)


@pytest.mark.parametrize("name", BASELINES)
def test_more_tokens_take_more_and_parts_always_sum_to_the_peak(name):
    architecture = Architecture.from_config({**SMALL, "model_type": "llama"})
    peaks = []
    for tokens in (512, 2048, 8192):
        found = estimate_baseline(name, recipe(), architecture, sequence_length=tokens)
        assert sum(found.parts.values()) == found.peak_bytes <= found.reserved_bytes
        assert min(found.parts.values()) >= 0
        assert found.conditions["sequence_length"] == tokens
        peaks.append(found.peak_bytes)
    assert peaks == sorted(set(peaks))


def test_layers_beyond_the_third_are_counted_like_the_middle_one():
    """In steps of whole layers the peak grows by the same bytes, with and without recomputation."""
    for checkpointing in (False, True):
        work = recipe("sgd", activation_checkpointing=checkpointing, tokens=512)
        peaks = [
            estimate(
                work, Architecture.from_config({**SMALL, "model_type": "llama", "num_hidden_layers": layers})
            ).peak_bytes
            for layers in (8, 9, 10, 80)
        ]
        assert peaks[1] - peaks[0] == peaks[2] - peaks[1] == (peaks[3] - peaks[2]) // 70


def test_a_longer_sequence_than_the_window_needs_a_mask():
    config = {**SMALL, "model_type": "mistral", "sliding_window": 512}
    architecture = Architecture.from_config(config)
    short, long = (estimate(recipe(tokens=tokens), architecture, masked=False) for tokens in (256, 512))
    assert not short.conditions["attention_mask"]
    assert long.conditions["attention_mask"]


def test_a_target_that_no_layer_has_is_answered_with_those_there_are():
    architecture = Architecture.from_config({**SMALL, "model_type": "llama"})
    with pytest.raises(RecipeError, match=r"qkv names no linear layer.*all-linear.*q_proj"):
        estimate(recipe("sgd", lora=LoraRecipe(target=["qkv"])), architecture)


def test_an_unknown_baseline_is_an_error():
    architecture = Architecture.from_config({**SMALL, "model_type": "llama"})
    with pytest.raises(ValueError, match="'adam' is not a baseline; baselines are adamw_fused"):
        estimate_baseline("adam", recipe(), architecture)


def test_rows_that_are_not_packed_are_padded_to_eight():
    architecture = Architecture.from_config({**SMALL, "model_type": "llama"})
    ragged, padded = (estimate(recipe(tokens=tokens), architecture) for tokens in (250, 256))
    assert ragged.peak_bytes == padded.peak_bytes
    packed = estimate(replace(recipe(tokens=250, packing=True)), architecture)
    assert packed.conditions["sequence_length"] == 250


def test_an_estimate_and_a_search_import_no_torch():
    code = (
        "import sys\n"
        "import lowmem.memory.search, lowmem.memory.estimate\n"
        "from lowmem.memory.architecture import Architecture\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & {"torch", "numpy", "transformers", "accelerate", "peft"}


def test_small_tensors_are_rounded_up_as_the_allocator_does():
    architecture = Architecture.from_config({**SMALL, "model_type": "llama"})
    found = estimate(recipe("sgd"), architecture)
    expected = sum(rounded(2 * each.numel) for each in architecture.parameters)
    assert found.parts["weights"] == expected + sum(rounded(4 * n) for n in architecture.buffer_numels)
