"""The Trainer's step: token-weighted means, the loss that is logged, the meter's borders."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback, set_seed

from lowmem.data.batches import TokenDataset, collate
from lowmem.data.example import Example
from lowmem.errors import RefusedError
from lowmem.hf.callbacks import MeterBorders
from lowmem.hf.chunked_loss import use_chunked_loss
from lowmem.hf.compare import refuse_several_processes
from lowmem.hf.metering import StepWatch, steps_to_watch
from lowmem.hf.trainer import LowMemTrainer
from lowmem.hf.training_arguments import training_arguments
from lowmem.recipe.schema import SchedulerRecipe
from tests.hf.tiny_runs import tiny_config, tiny_recipe, write_model


class NoMeter:
    @contextmanager
    def step(self):
        yield

    @contextmanager
    def phase(self, name):
        yield

    def measured(self):
        raise AssertionError("nothing is measured here")


class Losses(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, **kwargs):
        if "loss" in kwargs["logs"]:
            self.rows.append(kwargs["logs"])


def uneven_examples(count: int) -> list[Example]:
    """Sequences of 3 to 30 tokens, of which a different part each is trained."""
    draw = torch.Generator().manual_seed(5)
    examples = []
    for index in range(count):
        length = 3 + (index * 7) % 28
        ids = torch.randint(3, 90, (length,), generator=draw).tolist()
        untrained = index % 3
        examples.append(Example(ids, [-100] * untrained + ids[untrained:]))
    return examples


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def trainer_for(
    tmp_path, model_folder, examples, *overrides, model=None, watch=None, optimizer_of=None, callbacks=()
):
    recipe = tiny_recipe(tmp_path, model_folder, *overrides)
    args = training_arguments(recipe, tmp_path / "out")
    args.train_sampling_strategy = "sequential"
    if model is None:
        set_seed(0)
        model = LlamaForCausalLM(tiny_config())
    return LowMemTrainer(
        model=model,
        args=args,
        optimizer_of=optimizer_of or (lambda m: torch.optim.SGD(m.parameters(), lr=0.5)),
        schedule=SchedulerRecipe(name="constant", warmup_ratio=0.0),
        train_dataset=TokenDataset(examples) if isinstance(examples, list) else examples,
        collate=collate(0),
        watch=watch or StepWatch(NoMeter()),
        callbacks=list(callbacks),
    )


def weights_after(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("chunked", [False, True])
def test_accumulation_over_uneven_rows_equals_one_batch(tmp_path, model_folder, chunked):
    def model():
        set_seed(0)
        made = LlamaForCausalLM(tiny_config())
        if chunked:
            use_chunked_loss(made)
        return made

    common = ("train.max_steps=3", "train.max_grad_norm=null")
    whole = ("train.per_device_batch_size=8",)
    split = ("train.per_device_batch_size=2", "train.gradient_accumulation_steps=4")
    examples = uneven_examples(24)
    one = weights_after(trainer_for(tmp_path, model_folder, examples, *common, *whole, model=model()))
    many = weights_after(trainer_for(tmp_path, model_folder, examples, *common, *split, model=model()))
    start = dict(model().named_parameters())
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    apart = max((one[name] - many[name]).abs().max().item() for name in one)
    assert moved > 1e-2
    assert apart < 1e-6


def test_the_logged_loss_is_the_mean_over_all_tokens_of_the_step(tmp_path, model_folder):
    examples = uneven_examples(8)
    set_seed(0)
    model = LlamaForCausalLM(tiny_config())
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
            targets = torch.tensor(example.labels[1:])
            total += nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            tokens += int((targets != -100).sum())
    losses = Losses()
    settings = ("train.max_steps=1", "train.per_device_batch_size=2", "train.gradient_accumulation_steps=4")
    trainer = trainer_for(
        tmp_path, model_folder, examples, *settings, "report.log_every=1", model=model, callbacks=[losses]
    )
    trainer.train()
    assert losses.rows[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert losses.rows[0]["tokens"] == sum(len(example.input_ids) for example in examples)


def test_a_step_without_trained_tokens_has_loss_zero_and_leaves_the_weights(tmp_path, model_folder):
    ids = list(range(3, 13))
    losses = Losses()
    trainer = trainer_for(
        tmp_path,
        model_folder,
        [Example(ids, [-100] * len(ids))] * 4,
        "train.max_steps=1",
        "report.log_every=1",
        callbacks=[losses],
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    after = weights_after(trainer)
    assert losses.rows[0]["loss"] == 0.0
    assert losses.rows[0]["grad_norm"] == 0.0
    assert all(torch.equal(before[name], after[name]) for name in before)


class LossOfStep(nn.Module):
    """A model whose loss is what the labels say, NaN where they hold 13."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        value = math.nan if (labels == 13).any() else float(labels.max())
        return {"loss": self.weight.sum() * 0 + value}


def test_a_nan_loss_is_logged_as_nan_and_later_losses_as_they_are(tmp_path, model_folder):
    losses = Losses()
    rows = [Example([value] * 4, [value] * 4) for value in (5, 13, 7, 9)]
    trainer = trainer_for(
        tmp_path,
        model_folder,
        rows,
        "train.max_steps=4",
        "train.per_device_batch_size=1",
        "report.log_every=1",
        model=LossOfStep(),
        callbacks=[losses],
    )
    trainer.train()
    logged = [row["loss"] for row in losses.rows]
    assert math.isnan(logged[1])
    assert [logged[0], *logged[2:]] == [5.0, 7.0, 9.0]


def test_losses_between_two_log_lines_are_averaged(tmp_path, model_folder):
    losses = Losses()
    rows = [Example([value] * 4, [value] * 4) for value in (4, 6, 7, 9)]
    settings = ("train.max_steps=4", "train.per_device_batch_size=1", "report.log_every=2")
    trainer_for(tmp_path, model_folder, rows, *settings, model=LossOfStep(), callbacks=[losses]).train()
    assert [row["loss"] for row in losses.rows] == [5.0, 8.0]


class BatchMeanOnly(LossOfStep):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": self.weight.sum()}


def test_a_model_that_cannot_weigh_tokens_over_micro_batches_is_refused(tmp_path, model_folder):
    rows = uneven_examples(4)
    trainer_for(tmp_path, model_folder, rows, model=BatchMeanOnly())
    with pytest.raises(RefusedError, match="gradient_accumulation_steps=1"):
        trainer_for(
            tmp_path, model_folder, rows, "train.gradient_accumulation_steps=2", model=BatchMeanOnly()
        )


class EventMeter(NoMeter):
    """Writes down when the model, the optimizer and the meter are at work."""

    def __init__(self):
        self.events: list[str] = []

    @contextmanager
    def step(self):
        self.events.append("step(")
        yield
        self.events.append(")")

    @contextmanager
    def phase(self, name):
        self.events.append(f"{name}(")
        yield
        self.events.append(")")


def test_the_meter_sees_forward_backward_and_optimizer_of_watched_steps_only(tmp_path, model_folder):
    meter = EventMeter()
    watch = StepWatch(meter)

    class Noisy(LossOfStep):
        def forward(self, *args, **kwargs):
            meter.events.append("model")
            loss = super().forward(*args, **kwargs)["loss"]
            loss.register_hook(lambda grad: meter.events.append("gradient"))
            return {"loss": loss}

    class NoisySGD(torch.optim.SGD):
        def step(self, closure=None):
            meter.events.append("update")
            return super().step(closure)

    trainer = trainer_for(
        tmp_path,
        model_folder,
        [Example([5] * 4, [5] * 4)] * 8,
        "train.max_steps=4",
        "train.per_device_batch_size=1",
        "train.gradient_accumulation_steps=2",
        model=Noisy(),
        watch=watch,
        optimizer_of=lambda m: NoisySGD(m.parameters(), lr=0.1),
        callbacks=[MeterBorders(watch)],
    )
    trainer.train()
    micro_batch = ["forward(", "model", ")", "backward(", "gradient", ")"]
    watched = ["step(", *micro_batch * 2, "optimizer(", "update", ")", ")"]
    bare = [*["model", "gradient"] * 2, "update"]
    assert meter.events == [*watched, *watched, *bare, *watched]


@pytest.mark.parametrize(
    ("first", "last", "steps"), [(1, 100, {1, 2, 5}), (1, 1, {1}), (1, 3, {1, 2, 3}), (41, 43, {41, 42, 43})]
)
def test_the_first_two_steps_and_a_later_one_are_watched(first, last, steps):
    assert steps_to_watch(first, last) == steps


def test_deepspeed_that_is_not_there_is_answered_with_the_command_that_installs_it(
    tmp_path, model_folder, monkeypatch
):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RefusedError, match=r"zero2 needs DeepSpeed.*pip install 'lowmem\[deepspeed\]'"):
        training_arguments(tiny_recipe(tmp_path, model_folder), tmp_path)


@pytest.mark.parametrize(
    "variables", [{"FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true"}, {"WORLD_SIZE": "2"}]
)
def test_a_comparison_is_refused_under_a_launcher(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RefusedError, match="Run lowmem compare without a launcher"):
        refuse_several_processes()


def test_the_launcher_cannot_switch_mixed_precision_on(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = trainer_for(tmp_path, model_folder, uneven_examples(4))
    assert trainer.accelerator.mixed_precision == "no"
