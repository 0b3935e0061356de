"""What a launch is taken for, and what is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest

from lowmem.errors import RefusedError
from lowmem.hf import training_arguments
from lowmem.hf.flow import train
from lowmem.hf.launch import launched_strategy, strategy_for
from lowmem.hf.steps_in_pieces import keep_optimizer_when_offloaded_
from lowmem.run.checkpoint import seal
from tests.hf.tiny_runs import tiny_recipe, write_model

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.fixture
def environment(monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "single"),
        ({"WORLD_SIZE": "1"}, "single"),
        ({"WORLD_SIZE": "4"}, "ddp"),
        ({**FSDP, "FSDP_VERSION": "2"}, "fsdp2"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
    ],
)
def test_a_launch_is_known_by_what_the_launcher_has_set(environment, variables, expected):
    environment(variables)
    assert launched_strategy() == expected


def test_a_configuration_file_of_deepspeed_wins(environment, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    environment({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert launched_strategy() == "zero2"
    file.write_text("{")
    with pytest.raises(RefusedError, match="cannot be read"):
        launched_strategy()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (FSDP, "FSDP was launched in version 1.*fsdp_version: 2"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0; supported are 1, 2 and 3"),
    ],
)
def test_what_is_no_strategy_of_ours_is_refused(environment, variables, message):
    environment(variables)
    with pytest.raises(RefusedError, match=message):
        launched_strategy()


def test_a_recipe_that_wants_another_strategy_names_the_command_that_starts_it(environment, tmp_path):
    recipe = tiny_recipe(tmp_path, write_model(tmp_path / "model"), "distributed.strategy=zero3")
    with pytest.raises(RefusedError, match=r"zero3, and the launcher started single.*accelerate/zero3\.yaml"):
        strategy_for(recipe)
    environment({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
    assert strategy_for(recipe) == "zero3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.weights=int8", "model.int8.group_size=16"], r"int8 cannot be divided.*accelerate/ddp\.yaml"),
        (["train.execution=fused", "train.max_grad_norm=null"], "Set train.execution: auto"),
        (["optimizer.clip=tensor"], "Set optimizer.clip: full"),
        (["eval.loss_only=false"], "eval.loss_only: true, and run lowmem eval"),
    ],
)
def test_what_pieces_cannot_do_is_refused_with_what_can(environment, tmp_path, overrides, message):
    environment({**FSDP, "FSDP_VERSION": "2"})
    recipe = tiny_recipe(tmp_path, write_model(tmp_path / "model"), *overrides)
    with pytest.raises(RefusedError, match=message):
        strategy_for(recipe)


def test_state_that_another_number_of_processes_has_saved_is_refused_and_not_left_out(environment, tmp_path):
    model = write_model(tmp_path / "model")
    assert train(tiny_recipe(tmp_path, model, "train.max_steps=2", "save.every=1", "save.keep=1")) == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer-0-of-2.pt")
    seal(checkpoint, step=2)
    with pytest.raises(RefusedError, match=r"no optimizer\.pt.*Continue with the launch that saved it"):
        train(tiny_recipe(tmp_path, model, "train.max_steps=4", "save.every=1", "save.keep=1"))


def test_fsdp2_divides_each_gradient_in_each_micro_batch(environment, tmp_path, monkeypatch):
    environment({**FSDP, "FSDP_VERSION": "2"})
    for name in ("prepare_accelerate_", "refuse_other_strategy"):  # which need several processes
        monkeypatch.setattr(training_arguments, name, lambda *_: None)
    monkeypatch.setattr(training_arguments, "SHARDED", ())
    recipe = tiny_recipe(tmp_path, write_model(tmp_path / "model"))
    args = training_arguments.training_arguments(recipe, tmp_path / "run", use_cpu=True)
    assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}


def test_an_optimizer_whose_state_is_on_the_host_stays_the_recipes():
    config = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": None}
    }
    keep_optimizer_when_offloaded_(config)
    assert config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_force_ds_cpu_optimizer": True}, "replaces the recipe's optimizer.*Set it to false"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device to none or cpu"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param.*device to none"),
    ],
)
def test_offloading_that_was_never_tried_is_refused(config, message):
    with pytest.raises(RefusedError, match=message):
        keep_optimizer_when_offloaded_(config)
