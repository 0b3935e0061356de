"""A model with int8 weights in anyone's Trainer: it learns, is saved, and goes on bit by bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

import lowmem
from lowmem.errors import RefusedError
from lowmem.hf import Int8Config
from lowmem.quant.int8_weight import Int8Module
from tests.hf.test_trainer_mixin import trained as trained_with_mixin
from tests.hf.test_trainer_override import LR, SETTINGS, arguments, rows, tiny_llama
from tests.hf.tiny_runs import tiny_config


def int8_llama(folder, *, embeddings: bool = False, config=None):
    model = tiny_llama() if config is None else AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    settings = Int8Config(group_size=8, quantize_embeddings=embeddings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


def trainer(folder, name, model=None, embeddings=False, **changes):
    args = arguments(folder, max_grad_norm=0, **changes)
    given = lowmem.hf.optimizer(name, lr=LR.get(name, 1e-2), args=args, **SETTINGS.get(name, {}))
    model = model or int8_llama(folder / "model", embeddings=embeddings)
    return Trainer(model, args, train_dataset=rows(), optimizer_cls_and_kwargs=given)


def same(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("embeddings", [False, True], ids=["float embeddings", "int8 embeddings"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd_sai", "galore"])
def test_a_plain_trainer_trains_saves_and_resumes_bit_by_bit(name, embeddings, tmp_path):
    whole = trainer(tmp_path / "whole", name, embeddings=embeddings)
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    matrices = [key for key in start if key.endswith("weight_codes")]
    assert len(matrices) == 7 + 2 * embeddings
    assert not any(torch.equal(start[key], whole.model.state_dict()[key]) for key in matrices)

    again = trainer(tmp_path / "again", name, embeddings=embeddings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(whole.model, again.model)


def test_a_checkpoint_is_a_model_folder(tmp_path):
    run = trainer(tmp_path, "galore")
    run.train()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8"), run.model)


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    models = []
    for batch, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path / str(batch), "sgd", per_device_train_batch_size=batch, max_steps=4,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        run.train()
        models.append([m for m in run.model.modules() if isinstance(m, Int8Module)])
    for one, other in zip(*models, strict=True):
        apart = (one.weight_codes.int() - other.weight_codes.int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() < 0.02, "but for codes that fell between two"


def test_a_clipping_that_would_see_half_the_gradients_is_refused_with_the_mend(tmp_path):
    for args, said in (
        (None, "not known here"),
        (arguments(tmp_path, max_grad_norm=0.5), "max_grad_norm is 0.5"),
    ):
        given = lowmem.hf.optimizer("sgd", lr=1e-2, args=args)
        bare = Trainer(
            int8_llama(tmp_path / "model"), arguments(tmp_path), train_dataset=rows(),
            optimizer_cls_and_kwargs=given,
        )  # fmt: skip
        with pytest.raises(RefusedError, match=said) as raised:
            bare.train()
        assert "LowMemTrainerMixin" in str(raised.value)
        assert "max_grad_norm=0" in str(raised.value)


def test_several_processes_without_the_mixin_are_refused(tmp_path, monkeypatch):
    run = trainer(tmp_path, "sgd")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RefusedError, match="would drift apart. Use class MyTrainer"):
        run.create_optimizer()


def test_an_optimizer_of_someone_elses_is_told_at_the_first_backward_pass(tmp_path):
    run = Trainer(int8_llama(tmp_path / "model"), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(RuntimeError, match="no optimizer of lowmem's has its parameter"):
        run.train()


# ---------------------------------------------------------------- with the mixin


def norms_of(trainer) -> list[float]:
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


@pytest.fixture
def int8_models(monkeypatch, tmp_path):
    """The mixin's tests' models, in int8."""

    class Int8Llama:
        def __new__(cls, config):
            return int8_llama(tmp_path / "float", config=config)

    monkeypatch.setattr("tests.hf.test_trainer_mixin.LlamaForCausalLM", Int8Llama)


@pytest.mark.parametrize("clip", [0, 0.05])
def test_executions_make_the_same_steps(int8_models, tmp_path, clip):
    how = {"max_grad_norm": clip, "max_steps": 6}
    plain, project = (trained_with_mixin(tmp_path, execution=each, **how) for each in ("plain", "project"))
    for one, other in zip(
        plain.model.state_dict().values(), project.model.state_dict().values(), strict=True
    ):
        if one.dtype is torch.int8:
            assert (one.int() - other.int()).abs().float().mean() < 0.02, (
                "but for codes that fell between two"
            )
    if not clip:
        assert same(trained_with_mixin(tmp_path, execution="fused", **how).model, plain.model)
    else:
        assert norms_of(project) == pytest.approx(norms_of(plain), rel=1e-2)


@pytest.mark.parametrize(
    ("name", "execution"),
    [(name, how) for name in ("adamw", "sgd", "galore") for how in ("plain", "fused")]
    + [("galore", "project")],
)
def test_a_cut_run_ends_as_one_that_was_not(int8_models, tmp_path, name, execution):
    how = {
        "execution": execution,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 5,
        "max_grad_norm": 0 if execution == "fused" else 0.5,
    }
    whole = trained_with_mixin(tmp_path / "run", name, **how)
    resumed = trained_with_mixin(
        tmp_path / "again", name, resume=str(tmp_path / "run" / "checkpoint-5"), **how
    )
    assert resumed.state.global_step == 8
    assert same(whole.model, resumed.model)


def test_the_norm_that_is_clipped_is_that_of_a_float_model_with_the_same_weights(tmp_path, monkeypatch):
    config = tiny_config(hidden_size=24, intermediate_size=48)
    int8, twin = int8_llama(tmp_path / "model", config=config), LlamaForCausalLM(config)
    twin.load_state_dict(int8.state_dict(), strict=False)
    with torch.no_grad():
        for path, module in int8.named_modules():
            if isinstance(module, Int8Module):
                twin.get_submodule(path).weight.copy_(module.dequantized())
    found = []
    for model in (int8, twin):
        monkeypatch.setattr("tests.hf.test_trainer_mixin.LlamaForCausalLM", lambda config, model=model: model)
        found += norms_of(trained_with_mixin(tmp_path, "sgd", max_steps=1, max_grad_norm=1e-3))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
