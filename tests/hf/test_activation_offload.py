"""Offloaded activations in models, runs and plans."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem.hf.flow import train
from lowmem.hf.lora import add_lora
from lowmem.hf.model_setup import recompute_activations
from lowmem.hf.plan import plan
from lowmem.hf.planned_batches import planned_batch
from lowmem.hf.simulated_run import SimulatedRun, simulate_run
from lowmem.memory.plan_text import plan_text
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import LoraRecipe
from lowmem.run.activation_offload import OffloadedInputs
from tests.hf.tiny_models import tiny_batch, tiny_model
from tests.hf.tiny_runs import tiny_config, tiny_recipe, write_model


class Drawer:
    """A host that counts what is put into it."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def out(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        self.shapes.append(tuple(tensor.shape))
        return tensor.detach().clone(), lambda: None

    def back(self, host: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return host.clone(), lambda: None


def gradients_of(kind: str, offload: OffloadedInputs | None, *, lora: bool = False) -> dict[str, Tensor]:
    model = tiny_model(kind, num_hidden_layers=3)
    if lora:
        model = add_lora(model, LoraRecipe(r=2))
    recompute_activations(model.train(), offload)
    batch = tiny_batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -5:] = 0  # a mask that is real and goes to every layer
    for _ in range(2):
        model(**batch, use_cache=False).loss.backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize(
    ("kind", "lora"), [("llama", False), ("llama", True), ("gpt2", False), ("mixtral_router_loss", False)]
)
def test_a_models_gradients_have_the_same_bits_and_only_hidden_states_leave(kind: str, lora: bool) -> None:
    drawer = Drawer()
    offload = OffloadedInputs(drawer, lambda tensor: True, smallest_bytes=1)
    found, plain = gradients_of(kind, offload, lora=lora), gradients_of(kind, None, lora=lora)
    assert found.keys() == plain.keys()
    assert found
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert drawer.shapes == [(2, 21, 16)] * 3 * 2


def test_a_run_on_a_cpu_says_once_that_nothing_moves_and_is_held_against_a_plan_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["train.activation_checkpointing=true", "train.activation_offload=true", "train.max_steps=2"]
    recipe = tiny_recipe(tmp_path, write_model(tmp_path / "model"), *overrides, "report.plan=true")
    assert train(recipe) == 0
    assert capsys.readouterr().out.count("activation offload: nothing to do on cpu") == 1
    memory = json.loads((tmp_path / "run/memory.json").read_text())
    assert memory["conditions"]["activation_offload"] is False
    assert memory["planned"]["peak_bytes"] == memory["peak_bytes"]


LAYERS = 6
ROWS, TOKENS, WIDTH = 16, 512, 64
INPUT_BYTES = ROWS * TOKENS * WIDTH * 2
BASE = [
    "optimizer={name: sgd, lr: 1.0e-3}",
    f"data.max_length={TOKENS}",
    "data.eval=null",
    "eval={}",
    f"train.per_device_batch_size={ROWS}",
    "train.max_grad_norm=null",
    "train.loss=plain",
    "train.activation_checkpointing=true",
    "model.dtype=bfloat16",
]
CONFIG = tiny_config(
    hidden_size=WIDTH, head_dim=32, intermediate_size=64, num_hidden_layers=LAYERS, vocab_size=64
)


def simulated(*overrides: str, on_cuda: bool = True) -> SimulatedRun:
    recipe = load_recipe("quickstart", [*BASE, *overrides], files_must_exist=False)
    step = [planned_batch(recipe)] * recipe.train.gradient_accumulation_steps
    return simulate_run(recipe, [step], on_cuda=on_cuda, config=CONFIG)


@pytest.mark.parametrize(
    ("more", "stay"),
    [
        ([], 1),  # that of the layer computed again is dropped at once, the next one is on its way back
        (["train.gradient_accumulation_steps=2"], 1),
        (["data.packing=true"], 1),
        (["lora={r: 2}"], 3),  # that of the first layer stays: the graph ends in it, so autograd holds it
    ],
)
def test_simulated_for_a_gpu_the_inputs_are_away_and_the_host_pins_them(more: list[str], stay: int) -> None:
    kept, moved = simulated(*more), simulated("train.activation_offload=true", *more)
    held = [run.measured.parts["activations"] + run.measured.parts["temporary"] for run in (kept, moved)]
    assert held[0] - held[1] == (LAYERS - stay) * INPUT_BYTES
    assert (kept.pinned_host_bytes, moved.pinned_host_bytes) == (0, LAYERS * INPUT_BYTES)


def test_simulated_for_a_cpu_nothing_is_moved() -> None:
    kept, moved = (simulated(*more, on_cuda=False) for more in ([], ["train.activation_offload=true"]))
    assert moved.measured == kept.measured
    assert moved.pinned_host_bytes == 0


def test_a_plan_names_the_hosts_bytes_in_its_text_and_its_json(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    model, on = f"model.name_or_path={tmp_path}", "train.activation_offload=true"
    recipe, without = (
        load_recipe("quickstart", [model, *BASE, *more], files_must_exist=False) for more in ([on], [])
    )
    found, formula, plain = plan(recipe), plan(recipe, formula=True), plan(without, formula=True)
    assert found.document["pinned_host_bytes"] == LAYERS * INPUT_BYTES
    assert formula.document["pinned_host_bytes"] == LAYERS * INPUT_BYTES
    assert plain.document["pinned_host_bytes"] == 0
    assert [each.document["conditions"]["activation_offload"] for each in (found, formula, plain)] == [
        True,
        True,
        False,
    ]
    lines = plan_text(found.document, title="title").splitlines()
    assert [line.split() for line in lines if line.startswith("on the host")] == [
        ["on", "the", "host", "6.00", "pinned,", "for", "offloaded", "activations"]
    ]
    assert "on the host" not in plan_text(plain.document, title="title")
