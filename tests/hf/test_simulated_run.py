"""A simulated run against the same run on real tensors, and against closed forms."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from accelerate.state import PartialState
from transformers import AutoConfig, LlamaConfig
from transformers.utils import import_utils

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.baseline import measure_variant
from lowmem.hf.fake_tensor_shims import real_attention_path
from lowmem.hf.flow import train
from lowmem.hf.make_optimizer import make_optimizer
from lowmem.hf.planned_batches import planned_batch
from lowmem.hf.recorded_batches import StepBatches
from lowmem.hf.simulated_run import simulate_run
from lowmem.memory.ledger import rounded
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe
from tests.hf.tiny_runs import tiny_config, tiny_recipe, write_model

MIB = 2**20


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("quickstart", ["data.max_length=40", "train.per_device_batch_size=2", *overrides])


def steps_of(recipe: Recipe, **batch) -> list[list[dict[str, torch.Tensor]]]:
    """Of tokens that differ and do not pad: from others some gradients are zeros, which SGD-SaI cannot use."""
    one = planned_batch(recipe, **batch)
    one["input_ids"] += 3 + torch.arange(one["input_ids"].numel()).view_as(one["input_ids"]) % 7
    micro_batches = recipe.train.gradient_accumulation_steps
    return [
        [{name: value.clone() for name, value in one.items()} for _ in range(micro_batches)] for _ in range(3)
    ]


def measured(recipe: Recipe, steps, tmp_path: Path, optimizer_of=None):
    unpacked = replace(
        recipe, data=replace(recipe.data, packing=False)
    )  # it was probed when the batches were made
    make = optimizer_of or (lambda model: make_optimizer(model, recipe))
    return measure_variant(unpacked, StepBatches(steps), make, tmp_path / "replay")


LONG = ["train.per_device_batch_size=8", "data.max_length=96"]  # the peak lies in backward
SHORT = ["train.per_device_batch_size=1", "data.max_length=8"]  # the peak lies in the optimizer's step


def projects(name: str) -> bool:
    group = optimizer_class(name)([torch.nn.Parameter(torch.zeros(512, 512))]).param_groups[0]
    return optimizer_class(name).rule(group, (512, 512)).is_projected


WAYS = [
    *(
        (name, execution, micro_batches)
        for name in OPTIMIZERS
        for execution, micro_batches in (("plain", 1), ("project", 2), ("fused", 1), ("fused", 2))
        if execution != "project" or projects(name)
    ),
    ("sgd, momentum: 0.9", "fused", 3),
    ("sgd_sai, storage: {moment: fp32}", "fused", 3),
]


def _is_one_of_many_alike(way: tuple[str, str, int], length: list[str]) -> bool:
    """Micro-batches of rules that use whole gradients differ in nothing that the others do not show."""
    name, execution, micro_batches = way
    return (
        length is LONG
        and (execution, micro_batches) == ("fused", 2)
        and name not in ("sgd", "sgd_sai", "galore")
    )


@pytest.mark.parametrize(
    ("way", "length"),
    [
        pytest.param(
            way,
            length,
            id=f"{way}-{shown}",
            marks=[pytest.mark.slow] if _is_one_of_many_alike(way, length) else [],
        )
        for way in WAYS
        for length, shown in ((LONG, "long"), (SHORT, "short"))
    ],
)
def test_simulated_parts_equal_the_measured_ones_to_the_byte(way, length, tmp_path):
    name, execution, micro_batches = way
    recipe = recipe_of(
        f"optimizer={{name: {name}, lr: 1.0e-3}}", "model.dtype=bfloat16", f"train.execution={execution}",
        f"train.gradient_accumulation_steps={micro_batches}", *length,
        *(["train.max_grad_norm=null"] if execution == "fused" else []),
    )  # fmt: skip
    found = simulate_run(recipe, steps_of(recipe), on_cuda=False).measured
    real = measured(recipe, steps_of(recipe), tmp_path)
    assert found.parts == real.parts
    assert (found.peak_bytes, found.steady_peak_bytes) == (real.peak_bytes, real.steady_peak_bytes)


INT8_WAYS = [
    ("adamw", "plain", 1, "false", "bfloat16"),
    ("sgd", "fused", 1, "true", "bfloat16"),
    ("sinkgd", "fused", 1, "true", "float32"),
    ("adafactor", "plain", 2, "false", "bfloat16"),
    ("swan", "fused", 1, "false", "bfloat16"),
    ("galore", "plain", 2, "true", "float32"),
    ("galore", "project", 2, "false", "bfloat16"),
    ("galore", "fused", 1, "false", "bfloat16"),
]


@pytest.mark.parametrize("length", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("way", INT8_WAYS, ids=str)
def test_int8_weights_are_simulated_to_the_byte(way, length, tmp_path):
    name, execution, micro_batches, embeddings, dtype = way
    recipe = recipe_of(
        f"optimizer={{name: {name}, lr: 1.0e-3}}", f"model.dtype={dtype}", f"train.execution={execution}",
        "model.weights=int8", f"model.int8.embeddings={embeddings}",
        f"train.gradient_accumulation_steps={micro_batches}", *length,
        *(["train.max_grad_norm=null"] if execution == "fused" else ["train.activation_checkpointing=true"]),
    )  # fmt: skip
    found = simulate_run(recipe, steps_of(recipe), on_cuda=False)
    real = measured(recipe, steps_of(recipe), tmp_path)
    assert found.measured.parts == real.parts
    assert found.measured.peak_bytes == real.peak_bytes
    assert found.parameters == 826_560


VARIATIONS = {
    "accumulated, checkpointed, packed": [
        "train.gradient_accumulation_steps=3", "train.activation_checkpointing=true", "data.packing=true",
    ],
    "whole logits, unclipped": ["train.loss=plain", "train.max_grad_norm=null"],
    "eager attention": ["model.attn=eager"],
    "LoRA, checkpointed": ["lora={r: 4}", "train.activation_checkpointing=true", "model.dtype=bfloat16"],
    "exact projection, rotated": ["optimizer={name: galore, lr: 1.0e-3, rank: 8, projection: svd, on_refresh: rotate}"],
    "state in few bits": [
        "optimizer={name: galore, lr: 1.0e-3, rank: 8, storage: {moment: int8, variance: int8, basis: int4}, "
        "fallback: {name: adamw, storage: {moment: int8, variance: int8}}}",
        "train.execution=project", "train.gradient_accumulation_steps=2", "model.dtype=bfloat16", *SHORT,
    ],
    "blocks in turn": [
        "optimizer={name: frugal, lr: 1.0e-3, projection: block, density: 0.4, refresh_every: 2}",
        "model.dtype=bfloat16", *SHORT,
    ],
    "one layer at a time": [
        "optimizer={name: block_adam, lr: 1.0e-3, order: ascending, refresh_every: 1}", "model.dtype=bfloat16",
        "train.activation_checkpointing=true",
    ],
    "AdamW in eight bits": [
        "optimizer={name: adamw, lr: 1.0e-3, storage: {moment: int8, variance: int8}}", "model.dtype=bfloat16", *SHORT,
    ],
}  # fmt: skip


@pytest.mark.parametrize("full_rows", [False, True], ids=["masked", "unmasked"])
@pytest.mark.parametrize("overrides", VARIATIONS.values(), ids=VARIATIONS)
def test_every_way_to_train_is_simulated_to_the_byte(overrides, full_rows, tmp_path):
    recipe = recipe_of(*overrides)
    steps = steps_of(recipe, full_rows=full_rows)
    found, real = simulate_run(recipe, steps, on_cuda=False).measured, measured(recipe, steps, tmp_path)
    assert found.parts == real.parts


@pytest.mark.parametrize("variant", ["adamw_fused", "adamw_foreach", "adamw_fused_backward"])
def test_the_baselines_are_simulated_to_the_byte(variant, tmp_path):
    recipe = recipe_of(*SHORT)
    of = adamw_variants(1e-3, 0.0)[variant]
    found = simulate_run(recipe, steps_of(recipe), on_cuda=False, optimizer_of=of).measured
    assert found.parts == measured(recipe, steps_of(recipe), tmp_path, of).parts


def test_micro_batches_left_out_cost_what_their_tokens_take():
    recipe = recipe_of("train.gradient_accumulation_steps=4")
    steps = steps_of(recipe)
    whole = simulate_run(recipe, steps, on_cuda=False).measured
    rest = 2 * sum(rounded(value.nbytes) for value in steps[0][0].values())
    two = simulate_run(
        recipe, [step[:2] for step in steps], on_cuda=False, batches_left_out_bytes=rest
    ).measured
    assert two.parts == whole.parts


# ------------------------------------------------------------------ closed forms, at the width of LLaMA-2-7B


@pytest.fixture(scope="module")
def wide():
    def of(layers: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
            num_attention_heads=32, architectures=["LlamaForCausalLM"],
        )  # fmt: skip

    return of


LORA = [
    "lora={r: 4}",
    "train.activation_checkpointing=true",
]  # few gradients: the peak lies where activations are


def wide_run(config, *overrides: str, length: int = 64, variant: str | None = None, **batch):
    recipe = recipe_of(
        "model.dtype=bfloat16", f"data.max_length={length}", "train.per_device_batch_size=1",
        "optimizer={name: adamw, lr: 1.0e-3}", "train.max_grad_norm=null", *overrides,
    )  # fmt: skip
    of = None if variant is None else adamw_variants(1e-3, 0.0)[variant]
    return simulate_run(
        recipe, steps_of(recipe, full_rows=True)[:2], on_cuda=False, config=config, optimizer_of=of, **batch
    )


def test_adamw_foreach_needs_ten_bytes_a_parameter_and_fused_eight(wide):
    foreach, fused = (wide_run(wide(2), variant=name) for name in ("adamw_foreach", "adamw_fused"))
    P = foreach.parameters
    assert foreach.measured.peak_bytes == pytest.approx(10 * P, rel=1e-3)
    assert foreach.measured.parts["temporary"] == pytest.approx(2 * P, rel=1e-3)
    assert foreach.moments[-1].phase == "optimizer"
    assert fused.measured.peak_bytes == pytest.approx(8 * P, rel=0.02), "and the last layer's activations"
    weights, gradients, state = (
        fused.moments[-1].parts[part] for part in ("weights", "gradients", "optimizer_state")
    )
    assert state == pytest.approx(4 * P, rel=1e-4)
    assert weights == pytest.approx(2 * P, rel=1e-4)
    assert gradients <= 2 * P


def test_adamw_in_backward_holds_one_gradient_at_a_time(wide):
    run = wide_run(wide(2), variant="adamw_fused_backward")
    largest = 32000 * 4096 * 2
    assert run.measured.peak_bytes < 6 * run.parameters + 1.5 * largest


def test_a_checkpointed_layer_keeps_its_input_and_nothing_else(wide):
    shallow, deep = (
        wide_run(wide(layers), *LORA, length=512).moments[-1].parts["activations"] for layers in (2, 6)
    )
    assert deep - shallow == 4 * 512 * 4096 * 2, "layers x tokens x width x bf16"


def test_whole_logits_cost_their_bf16_and_their_fp32_copies(wide):
    peaks = {}
    for loss in ("chunked", "plain"):
        recipe = recipe_of("model.dtype=bfloat16", f"train.loss={loss}")
        rows = planned_batch(recipe, rows=1, length=2048, full_rows=True)
        run = simulate_run(recipe, steps_of(recipe)[:1], on_cuda=False, config=wide(1), evaluation=rows)
        assert run.moments[-1].name == "evaluation"
        peaks[loss] = sum(run.moments[-1].parts[part] for part in ("activations", "temporary"))
    logits = 2048 * 32000
    assert peaks["plain"] == pytest.approx((2 + 4 + 4) * logits, rel=0.05), (
        "bf16, their upcast, their log-softmax"
    )
    assert peaks["chunked"] < 6 * logits, "less than any whole copy in fp32 would leave room for"


def test_the_state_is_what_the_optimizer_declares(wide):
    run = wide_run(wide(2), "optimizer={name: galore, lr: 1.0e-3, rank: 128}")
    tensors = 2 * 7 * 4 + (2 * 2 + 1 + 2) * 3
    state = run.moments[-1].parts["optimizer_state"]
    assert run.state_bytes <= state <= run.state_bytes + 512 * tensors


# ------------------------------------------------------------------ what is around a simulation


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def test_a_simulation_leaves_the_process_as_it_was():
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    before = random.random(), numpy.random.rand(), torch.rand(1)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    states, is_fake = dict(PartialState._shared_state), import_utils.is_fake_tensor
    recipe = recipe_of(*SHORT)
    simulate_run(recipe, steps_of(recipe), on_cuda=True)
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == before
    assert PartialState._shared_state == states
    assert import_utils.is_fake_tensor is is_fake
    assert torch.zeros(1).item() == 0


def test_the_shim_for_attention_says_when_transformers_has_changed(monkeypatch):
    monkeypatch.delattr(import_utils, "is_fake_tensor")
    with pytest.raises(RuntimeError, match="decides elsewhere"), real_attention_path():
        pass


def test_only_the_configuration_of_a_model_is_needed(tmp_path):
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    recipe = recipe_of(f"model.name_or_path={tmp_path}")
    run = simulate_run(recipe, steps_of(recipe), on_cuda=False)
    assert (
        run.parameters
        == AutoConfig.from_pretrained(tmp_path).vocab_size * 16 * 2
        + 2 * (3 * 16 * 24 + 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16)
        + 16
    )


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            RecipeError,
            "causal language model",
        ),
        ({"model_type": "nosuch"}, RecipeError, "model_type"),
        ({}, RecipeError, "model_type"),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused(config, error, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = recipe_of(f"model.name_or_path={tmp_path}")
    with pytest.raises(error, match=says):
        simulate_run(recipe, steps_of(recipe), on_cuda=False)


def test_a_run_holds_its_measurement_against_a_plan_of_the_same_steps(tmp_path, model_folder):
    assert (
        train(tiny_recipe(tmp_path, model_folder, "report.plan=true", "train.gradient_accumulation_steps=2"))
        == 0
    )
    found = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert found["planned"]["source"] == "simulated"
    assert found["planned"]["error"] == 0
    assert found["planned"]["parts"] == found["parts"]
    assert "0.0 % of what was measured" in (tmp_path / "run" / "report.md").read_text()


def test_a_run_whose_simulation_fails_is_done_and_says_so(tmp_path, model_folder, monkeypatch):
    def fails(*args, **kwargs):
        raise RefusedError("this model cannot be simulated")

    monkeypatch.setattr("lowmem.hf.planned_beside.simulate_run", fails)
    assert train(tiny_recipe(tmp_path, model_folder, "report.plan=true")) == 0
    found = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert found["planned"] is None
    assert "this model cannot be simulated" in found["not_measured"]["planned"]


# ------------------------------------------------------------------ state in turn


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_the_plan_of_layers_in_turn_is_that_of_the_fullest_of_their_turns(order, tmp_path):
    recipe = recipe_of(
        f"optimizer={{name: block_adam, lr: 1.0e-3, order: {order}}}", "model.dtype=bfloat16", *LONG
    )
    steps = steps_of(recipe)
    planned = simulate_run(recipe, steps, on_cuda=False, refresh=True)

    def in_turn(number):
        def make(model):
            optimizer = make_optimizer(model, recipe)
            for group in optimizer.param_groups:
                group["steps"] = number * group["refresh_every"]
            return optimizer

        return make

    peaks = [measured(recipe, steps, tmp_path / str(turn), in_turn(turn)).peak_bytes for turn in range(6)]
    assert planned.measured.peak_bytes == max(peaks)
    assert min(peaks) < 0.95 * max(peaks)
