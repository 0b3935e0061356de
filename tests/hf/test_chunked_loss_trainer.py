"""The chunked loss under transformers.Trainer and Accelerate's mixed precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from transformers import Trainer, TrainingArguments

from lowmem.hf.chunked_loss import loss_only, use_chunked_loss
from lowmem.hf.deferred_logits import DeferredLogits
from lowmem.hf.lora import add_lora
from lowmem.recipe.schema import LoraRecipe
from tests.hf.tiny_models import checkpoint_activations, tiny_batch, tiny_model


def rows() -> list[dict[str, Tensor]]:
    batch = tiny_batch(rows=8)
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(*batch.values(), strict=True)]


def train(folder: Path, *, chunked: bool, bf16: bool, lora: bool, checkpointing: bool) -> Trainer:
    model = tiny_model()
    if checkpointing:
        checkpoint_activations(model)
    if lora:
        model = add_lora(model, LoraRecipe(r=2))
    if chunked:
        use_chunked_loss(model, tile_bytes=1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        logging_steps=1,
        bf16=bf16,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        prediction_loss_only=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows()[:3])
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "conditions",
    [
        {"bf16": False, "lora": False, "checkpointing": False},
        {"bf16": True, "lora": False, "checkpointing": False},
        {"bf16": True, "lora": True, "checkpointing": True},
    ],
)
def test_trainer_reports_the_same_losses_as_with_the_models_own(
    tmp_path: Path, conditions: dict[str, bool]
) -> None:
    plain = train(tmp_path / "plain", chunked=False, **conditions)
    chunked = train(tmp_path / "chunked", chunked=True, **conditions)
    assert len(losses(plain)) == 4
    assert losses(plain)[0] != losses(plain)[-1]
    assert losses(chunked) == pytest.approx(losses(plain), rel=1e-2 if conditions["bf16"] else 1e-5)
    expected = plain.evaluate()["eval_loss"]
    with loss_only(chunked.model):
        assert chunked.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-2)
    assert chunked.model.get_output_embeddings().materialised_by is None


def test_accelerates_conversion_of_outputs_to_float32_records_a_cast() -> None:
    model, batch = tiny_model(dtype=torch.bfloat16), tiny_batch()
    use_chunked_loss(model)
    out = convert_outputs_to_fp32(model.forward)(**batch)
    assert isinstance(out.logits, DeferredLogits)
    assert out.logits.dtype == torch.float32
    assert out.logits.is_deferred
    assert torch.equal(out.logits.tensor("a test"), model.eval()(**batch).logits.float())
