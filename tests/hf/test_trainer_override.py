"""One argument puts our optimizers into a plain `transformers.Trainer`, and nothing is dropped on the way."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lowmem
from lowmem.errors import RefusedError
from lowmem.optim.registry import OPTIMIZERS, optimizer_class

LR = {"sgd": 1.0}
SETTINGS = {"galore": {"rank": 4, "refresh_every": 3}, "sgd": {"momentum": 0.9}}


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )


def rows(count=32):
    """Counting from different numbers: something to learn."""
    ids = (torch.arange(count)[:, None] + torch.arange(12)) % 40
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **changes):
    defaults = dict(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=7e-3,
        report_to=[],
        logging_steps=1,
        save_steps=4,
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="linear",
        warmup_steps=2,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(**{**defaults, **changes})


def trainer(folder, name, model=None, settings=None, **changes):
    args = arguments(folder, **changes)
    given = lowmem.hf.optimizer(name, lr=LR.get(name, 1e-2), **{**SETTINGS.get(name, {}), **(settings or {})})
    return Trainer(model or tiny_llama(), args, train_dataset=rows(), optimizer_cls_and_kwargs=given)


def inner(optimizer):
    """Accelerate wraps the optimizer during training."""
    return getattr(optimizer, "optimizer", optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trainer_really_uses_our_optimizer_and_the_model_learns(name, tmp_path):
    run = trainer(tmp_path, name)
    run.train()
    assert type(inner(run.optimizer)) is optimizer_class(name)
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_trainer_ends_bit_equal(name, tmp_path):
    whole = trainer(tmp_path / "whole", name)
    whole.train()
    again = trainer(tmp_path / "again", name)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_weight_decay_reaches_matrices_and_spares_norms(tmp_path):
    run = trainer(tmp_path, "galore", settings={"weight_decay": 0.1})
    optimizer = run.create_optimizer()
    for group in optimizer.param_groups:
        assert all((param.dim() >= 2) == (group["weight_decay"] == 0.1) for param in group["params"])


def test_values_come_from_the_training_arguments_when_asked(tmp_path):
    args = arguments(tmp_path, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.2)
    factory, kwargs = lowmem.hf.optimizer("galore", args=args, rank=4, eps=1e-7)
    group = factory()(tiny_llama(), **kwargs).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        7e-3,
        (0.9, 0.95),
        1e-7,
        0.2,
    )


def test_without_arguments_lr_is_required():
    with pytest.raises(ValueError, match=r"needs lr=\.\.\., or args=training_args"):
        lowmem.hf.optimizer("galore", rank=4)


def test_an_unknown_setting_is_refused_before_training():
    with pytest.raises(ValueError, match="has no setting 'rnk'. Did you mean 'rank'"):
        lowmem.hf.optimizer("galore", lr=1e-3, rnk=4)
    with pytest.raises(ValueError, match="Did you mean 'galore'"):
        lowmem.hf.optimizer("galor", lr=1e-3)


def test_schedulers_are_honoured(tmp_path):
    run = trainer(tmp_path, "galore")
    run.train()
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert rates[:4] == pytest.approx([0.0, 5e-3, 1e-2, 1e-2 * 5 / 6])


def test_clipping_limits_the_applied_update(tmp_path):
    """SGD moves by lr times the clipped gradient, so the step's length over all weights is lr * max_grad_norm."""
    model = tiny_llama()
    start = [param.detach().clone() for param in model.parameters()]
    run = trainer(
        tmp_path, "sgd", model, {"momentum": 0.0}, max_steps=1, max_grad_norm=1e-3, warmup_steps=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), start, strict=True)]).norm()
    assert moved.item() == pytest.approx(1.0 * 1e-3, rel=0.02)


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    models = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = tiny_llama()
        run = trainer(
            tmp_path / str(batch), "galore", model, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, max_steps=4,
        )  # fmt: skip
        run.train()
        models.append(model)
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    ],
)
def test_a_launch_that_divides_matrices_is_refused_without_the_mixin(monkeypatch, variables):
    factory, _ = lowmem.hf.optimizer("galore", lr=1e-3, rank=4)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 8)})
    with pytest.raises(RefusedError, match="pieces of matrices.*LowMemTrainerMixin"):
        factory()(model)
