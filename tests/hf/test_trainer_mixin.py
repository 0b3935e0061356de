"""LowMemTrainerMixin in a plain transformers.Trainer: what anyone's training script gets."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lowmem
from lowmem.errors import FaultError, RefusedError
from lowmem.hf.trainer_mixin import TOLERATED_IN_A_ROW
from lowmem.optim.registry import OPTIMIZERS
from tests.hf.every_way import every_way, settings_for
from tests.hf.tiny_runs import tiny_config


class Rows(Dataset):
    def __init__(self, broken: set[int] = frozenset()):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 90, (64, 12), generator=generator)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {
            "input_ids": self.ids[index],
            "labels": self.ids[index],
            "scale": torch.tensor(float("nan") if index in self.broken else 1.0),
        }


class MyTrainer(lowmem.hf.LowMemTrainerMixin, Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        scale = inputs.pop("scale").mean()
        return scale * super().compute_loss(model, inputs, **kwargs)


def trained(tmp_path, name="galore", broken=frozenset(), settings=None, resume=None, callbacks=(), **how):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden_size=24, intermediate_size=48)).to(
        how.pop("dtype", torch.float32)
    )
    how_trained = how.pop("trainer", MyTrainer)
    mixin = {key: how.pop(key) for key in ("execution", "clip", "refresh_from") if key in how}
    arguments = {
        "max_steps": 10, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "train_sampling_strategy": "sequential",
        "remove_unused_columns": False, "lr_scheduler_type": "linear",
    }  # fmt: skip
    args = TrainingArguments(str(tmp_path), **{**arguments, **how})
    settings = (
        settings if settings is not None else ({"rank": 4, "refresh_every": 4} if name == "galore" else {})
    )
    trainer = how_trained(
        model=model, args=args, train_dataset=Rows(broken), callbacks=list(callbacks),
        optimizer_cls_and_kwargs=lowmem.hf.optimizer(name, lr=1e-2, **settings), **mixin,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer) -> list[torch.Tensor]:
    return [param.detach() for param in trainer.model.parameters()]


def same(one, other, tolerance=0.0) -> bool:
    pairs = zip(weights(one), weights(other), strict=True)
    return all((a - b).abs().max().item() <= tolerance for a, b in pairs)


def logged(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_accumulation_clipping_and_schedule_work_in_project_as_in_plain(tmp_path):
    how = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1}
    plain = trained(tmp_path, execution="plain", **how)
    project = trained(tmp_path, execution="project", **how)
    assert project.execution.mode == "project"
    assert same(plain, project, tolerance=1e-5)
    norms = logged(project, "grad_norm")
    assert len(norms) == 10
    assert min(norms) > 0.1, "the norm before clipping, and the clipping has bitten"
    assert norms == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize(
    ("execution", "micro_batches", "known"),
    [
        ("plain", 3, {"applied", "full"}),
        ("project", 1, {"applied", "full"}),
        ("project", 3, {"applied"}),  # norms of parts of a sum do not add up
        ("fused", 1, set()),
    ],
)
def test_the_norms_that_can_be_known_are_logged_under_their_names(tmp_path, execution, micro_batches, known):
    max_norm = 0 if execution == "fused" else 0.1
    how = {"gradient_accumulation_steps": micro_batches, "max_grad_norm": max_norm}
    ours = trained(tmp_path, execution=execution, **how)
    assert {of for of in ("applied", "full") if logged(ours, f"{of}_grad_norm")} == known
    by_torch = trained(tmp_path, "adamw", execution="plain", **how)  # the same gradients at the first step
    if "full" in known:
        first = logged(by_torch, "grad_norm")[0]
        assert logged(ours, "full_grad_norm")[0] == pytest.approx(first, rel=1e-4)
        assert logged(ours, "applied_grad_norm")[0] < first, "a projection makes it shorter"
    if "applied" in known:
        assert logged(ours, "applied_grad_norm") == logged(ours, "grad_norm")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_makes_the_bits_of_plain(tmp_path, name):
    plain, fused = (trained(tmp_path, name, execution=each, max_grad_norm=0) for each in ("plain", "fused"))
    assert fused.execution.mode == "fused"
    assert same(plain, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "execution"), every_way())
def test_a_run_interrupted_and_resumed_has_the_bits_of_one_that_was_not(tmp_path, name, execution, dtype):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 7

    how = {
        "execution": execution,
        "gradient_accumulation_steps": 2,
        "dtype": dtype,
        "max_grad_norm": 0 if execution == "fused" else 0.5,
        "settings": {key: value for key, value in settings_for(name).items() if key != "lr"},
    }
    whole = trained(tmp_path / "whole", name, **how)
    trained(tmp_path / "cut", name, callbacks=[StopAt()], **how)
    resumed = trained(tmp_path / "cut", name, resume=True, **how)
    assert resumed.state.global_step == 10
    assert same(whole, resumed)


@pytest.mark.parametrize("execution", ["plain", "project"])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(tmp_path, execution, caplog):
    logging.getLogger("lowmem").setLevel(logging.INFO)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.lm_head.weight.detach().clone())

    trainer = trained(tmp_path, broken={9}, execution=execution, callbacks=[Watch()])
    assert trainer.skipped_steps == 1
    assert torch.equal(seen[4], seen[3]), "row 9 is in step 5"
    assert not torch.equal(seen[5], seen[4])
    assert all(torch.isfinite(weight).all() for weight in weights(trainer))
    assert "step 5 is left out: the gradient of model." in caplog.text


def test_fused_leaves_out_a_micro_batch_whose_loss_is_not_finite(tmp_path):
    trainer = trained(tmp_path, broken={9}, execution="fused", max_grad_norm=0)
    assert trainer.skipped_steps == 1
    assert all(torch.isfinite(weight).all() for weight in weights(trainer))


def test_fused_uses_what_the_other_micro_batches_of_a_step_gave(tmp_path, caplog):
    """Row 9 is in the first micro-batch of step 3; the second moves the weights."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.lm_head.weight.detach().clone())

    how = {"settings": {"momentum": 0.9}, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    trainer = trained(tmp_path, "sgd", broken={9}, callbacks=[Watch()], **how)
    assert trainer.execution.mode == "fused"
    assert trainer.skipped_steps == 1
    assert not torch.equal(seen[2], seen[1])
    assert all(torch.isfinite(weight).all() for weight in weights(trainer))
    assert "step 3 leaves out gradients of" in caplog.text


@pytest.mark.parametrize("execution", ["project", "fused"])
def test_a_run_that_never_gets_finite_gradients_stops_and_says_where(tmp_path, execution):
    with pytest.raises(FaultError, match=r"21 steps in a row were not finite.*There is no checkpoint yet"):
        trained(tmp_path, broken=set(range(64)), execution=execution, max_steps=40, max_grad_norm=0)
    assert TOLERATED_IN_A_ROW == 20


def test_auto_says_what_it_chose_and_what_that_means(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lowmem"):
        assert trained(tmp_path, gradient_accumulation_steps=2, max_steps=2).execution.mode == "project"
    assert "execution: project, gradients take " in caplog.text
    assert "projected as they arrive and freed" in caplog.text
    assert trained(tmp_path, max_grad_norm=0, max_steps=2).execution.mode == "fused"
    assert trained(tmp_path, "adamw", max_steps=2).execution.mode == "plain"


def test_what_cannot_work_is_refused_when_training_begins(tmp_path):
    with pytest.raises(RefusedError, match="optimizer.clip: tensor"):
        trained(tmp_path, execution="fused", max_grad_norm=1.0)
    model = LlamaForCausalLM(tiny_config())
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, remove_unused_columns=False
    )
    trainer = MyTrainer(model=model, args=args, train_dataset=Rows(), execution="fused")
    with pytest.raises(RefusedError, match="needs an optimizer of lowmem's, and this one is AdamW"):
        trainer.train()


class TwoBackwardPasses(Trainer):
    retain_graph = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        scale = inputs.pop("scale")
        loss = self.compute_loss(model, {**inputs, "scale": scale})
        self.accelerator.backward(loss, retain_graph=self.retain_graph)
        again = loss if self.retain_graph else self.compute_loss(model, {**inputs, "scale": scale})
        self.accelerator.backward(again)
        return loss.detach()


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("execution", ["project", "fused"])
def test_a_trainer_that_goes_backward_twice_is_refused_and_told_what_to_do(tmp_path, execution, retain_graph):
    class Mine(MyTrainer, TwoBackwardPasses):
        pass

    Mine.retain_graph = retain_graph
    how = {"max_grad_norm": 0, "max_steps": 2}
    with pytest.raises(
        RefusedError, match=r"Call backward once for each micro-batch.*train.execution: plain"
    ):
        trained(tmp_path, execution=execution, trainer=Mine, **how)
    assert trained(tmp_path, execution="plain", trainer=Mine, **how).state.global_step == 2


def test_a_model_that_will_be_compiled_as_a_whole_keeps_its_gradients(tmp_path):
    how = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_grad_norm": 0, "max_steps": 1}
    with pytest.raises(RefusedError, match="Compile the layers one by one"):
        trained(tmp_path, execution="fused", **how)


def test_a_grad_scaler_keeps_gradients(tmp_path):
    class Scaled(MyTrainer):
        def create_optimizer(self, *args):
            self.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
            return super().create_optimizer(*args)

    with pytest.raises(RefusedError, match="GradScaler can unscale only what is there.*bfloat16"):
        trained(tmp_path, execution="project", trainer=Scaled)
    assert trained(tmp_path, max_grad_norm=0, max_steps=1, trainer=Scaled).execution.mode == "plain"
