"""The chunked loss against torch's cross-entropy on whole logits in float64, inside real model code."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedModel

from lowmem.errors import RefusedError
from lowmem.hf.chunked_loss import chunked_loss_agrees, loss_only, use_chunked_loss, use_plain_loss
from lowmem.hf.deferred_logits import DeferredLogits
from lowmem.hf.lora import add_lora
from lowmem.recipe.schema import LoraRecipe
from tests.hf.tiny_models import KINDS, checkpoint_activations, tiny_batch, tiny_model

SMALL_TILE = 1  # bytes; gives the narrowest tiles there are, 64 columns
Gradients = dict[str, Tensor]


def gradients_of(model: nn.Module) -> Gradients:
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def oracle(
    model: PreTrainedModel, batch: dict[str, Tensor], count: int | None = None
) -> tuple[float, Gradients]:
    """torch's cross-entropy of the unpatched model's whole logits, in the logits' own precision."""
    out = model(input_ids=batch["input_ids"])
    logits, targets = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    loss = cross_entropy(logits, targets, ignore_index=-100, reduction="mean" if count is None else "sum")
    if count is not None:
        loss = loss / count
    if getattr(model.config, "output_router_logits", False):
        loss = loss + model.config.router_aux_loss_coef * out.aux_loss
    loss.backward()
    return loss.item(), gradients_of(model)


def chunked(
    model: nn.Module, batch: dict[str, Tensor], tile_bytes: int = SMALL_TILE, **arguments: object
) -> tuple[float, Gradients]:
    use_chunked_loss(model, tile_bytes=tile_bytes)
    loss = model(**batch, **arguments).loss
    loss.backward()
    return loss.item(), gradients_of(model)


def assert_same(got: tuple[float, Gradients], expected: tuple[float, Gradients], tolerance: float) -> None:
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    assert got[1].keys() == expected[1].keys()
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_equal_cross_entropy_in_float64(kind: str) -> None:
    # Router losses and state-space scans take float32 steps inside the models themselves.
    tolerance = 1e-6 if kind in ("mixtral_router_loss", "mamba") else 1e-9
    model, batch = tiny_model(kind, dtype=torch.float64), tiny_batch()
    expected = oracle(model, batch)
    assert_same(chunked(model, batch), expected, tolerance)
    assert model.get_output_embeddings().materialised_by is None


@pytest.mark.parametrize("kind", ["llama", "gemma2_softcap", "mixtral_router_loss"])
def test_the_count_of_items_in_the_batch_divides_the_sum(kind: str) -> None:
    model, batch = tiny_model(kind, dtype=torch.float64), tiny_batch()
    expected = oracle(model, batch, count=37)
    assert_same(chunked(model, batch, num_items_in_batch=torch.tensor(37)), expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_close_to_float64_as_the_models_own_loss(
    kind: str, dtype: torch.dtype
) -> None:
    batch = tiny_batch()
    model = tiny_model(kind, dtype=dtype)
    reference = copy.deepcopy(model).double()
    exact_loss, exact = oracle(reference, batch)
    own = model(**batch).loss
    own.backward()
    own_gradients = gradients_of(model)
    loss, gradients = chunked(model, batch)

    def error(found: Gradients) -> float:
        return sum((found[name] - exact[name]).square().sum().item() for name in exact) ** 0.5

    assert abs(loss - exact_loss) <= 1.5 * abs(own.item() - exact_loss) + 1e-6
    # Both are rounded differently on the way through the layers; a real mistake is many times larger.
    assert error(gradients) <= 1.5 * error(own_gradients) + 1e-6


@pytest.mark.parametrize("vocab_size", [5, 63, 64, 65, 128, 257])
@pytest.mark.parametrize("tile_bytes", [SMALL_TILE, 2**25])
def test_any_vocabulary_size_gives_the_same_result(vocab_size: int, tile_bytes: int) -> None:
    model = tiny_model(vocab_size=vocab_size, dtype=torch.float64)
    batch = tiny_batch(vocab_size)
    expected = oracle(model, batch)
    assert_same(chunked(model, batch, tile_bytes), expected, 1e-9)


def test_a_single_trained_token_is_enough() -> None:
    model, batch = tiny_model(dtype=torch.float64), tiny_batch(rows=1, tokens=2)
    batch["labels"] = batch["input_ids"]
    assert_same(chunked(model, batch), oracle(tiny_model(dtype=torch.float64), batch), 1e-9)


def test_labels_that_are_shifted_already_are_not_shifted_again() -> None:
    model, batch = tiny_model(dtype=torch.float64), tiny_batch()
    expected = oracle(model, batch)
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), -100)], dim=1)
    assert_same(chunked(model, batch, shift_labels=shifted), expected, 1e-9)


@pytest.mark.parametrize("count", [None, 0, 5])
@pytest.mark.parametrize("tile_bytes", [SMALL_TILE, 2**25])
def test_a_batch_without_trained_tokens_has_loss_zero_and_zero_gradients(
    count: int | None, tile_bytes: int
) -> None:
    model, batch = tiny_model(), tiny_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    items = None if count is None else torch.tensor(count)
    loss, gradients = chunked(model, batch, tile_bytes, num_items_in_batch=items)
    assert loss == 0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_micro_batches_with_the_true_count_add_up_to_the_whole_batch() -> None:
    model, batch = tiny_model(dtype=torch.float64), tiny_batch(rows=4)
    count = int((batch["labels"][:, 1:] != -100).sum())
    loss, gradients = oracle(model, batch, count)
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    total = 0.0
    for row in range(4):
        part = model(
            input_ids=batch["input_ids"][row : row + 1],
            labels=batch["labels"][row : row + 1],
            num_items_in_batch=torch.tensor(count),
        ).loss
        part.backward()
        total += part.item()
    assert_same((total, gradients_of(model)), (loss, gradients), 1e-9)


def test_activation_checkpointing_changes_nothing() -> None:
    model, batch = tiny_model(), tiny_batch()
    expected = chunked(model, batch)
    checkpoint_activations(model)
    assert any(
        module.gradient_checkpointing
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    )
    assert_same(chunked(model, batch), expected, 1e-6)


def test_a_model_wrapped_by_peft_trains_its_adapters_and_computes_no_head_gradient() -> None:
    batch = tiny_batch()
    model = add_lora(tiny_model(dtype=torch.float64), LoraRecipe(r=2, target=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    expected = oracle(model, batch)
    got = chunked(model, batch)
    assert_same(got, expected, 1e-9)
    assert all("lora_" in name for name in got[1])
    assert model.get_output_embeddings().weight.grad is None


def test_the_same_step_twice_gives_the_same_bits() -> None:
    model, batch = tiny_model(dtype=torch.bfloat16), tiny_batch()
    first, second = chunked(model, batch), chunked(model, batch)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    model, batch = tiny_model(vocab_size=64), tiny_batch(vocab_size=64)
    batch["labels"][0, 3] = 64
    use_chunked_loss(model)
    with pytest.raises(ValueError, match="label 64 is outside the vocabulary: ids go from 0 to 63"):
        model(**batch)


def test_evaluation_and_generation_see_real_logits() -> None:
    model, batch = tiny_model(), tiny_batch()
    plain = model.eval()(**batch)
    use_chunked_loss(model)
    patched = model(**batch)
    assert torch.equal(patched.logits, plain.logits)
    assert torch.equal(patched.loss, plain.loss)
    expected = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(
        model.train().generate(batch["input_ids"], max_new_tokens=4, do_sample=False), expected
    )


def test_an_evaluation_that_wants_only_the_loss_defers_too() -> None:
    model, batch = tiny_model(), tiny_batch()
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss
        with loss_only(model):
            out = model(**batch)
        assert isinstance(out.logits, DeferredLogits)
        assert isinstance(model(**batch).logits, Tensor)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_undoing_leaves_the_model_as_it_was() -> None:
    model, batch = tiny_model(), tiny_batch()
    before = dict(vars(model.lm_head))
    expected = model(**batch).loss
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    use_chunked_loss(model)
    use_plain_loss(model)
    use_plain_loss(model)
    assert type(model.lm_head) is nn.Linear
    assert vars(model.lm_head) == before
    assert torch.equal(model(**batch).loss, expected)


def test_a_patched_model_can_be_copied_pickled_and_saved(tmp_path: Path) -> None:
    model, batch = tiny_model(), tiny_batch()
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    loss = model(**batch).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).loss, loss)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        assert twin(**batch).loss.item() == pytest.approx(torch.log(torch.tensor(199.0)).item())
    assert torch.equal(model(**batch).loss, loss)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert type(again.lm_head) is nn.Linear


class HeadOfAnotherKind(nn.Linear):
    pass


def test_a_head_that_is_not_plainly_linear_is_refused() -> None:
    model = tiny_model()
    model.lm_head = HeadOfAnotherKind(16, 199, bias=False)
    with pytest.raises(RefusedError, match=r"LlamaForCausalLM is HeadOfAnotherKind.*train\.loss: plain"):
        use_chunked_loss(model)
    assert "HeadOfAnotherKind" in str(chunked_loss_agrees(model, tiny_batch()))
    with pytest.raises(RefusedError, match="no output embedding"):
        use_chunked_loss(model.model)


def test_a_model_with_a_loss_of_its_own_is_refused() -> None:
    model = tiny_model()

    def focal_loss(*args: object, **kwargs: object) -> Tensor:
        return torch.zeros(())

    model.loss_function = focal_loss
    with pytest.raises(RefusedError, match="the loss of LlamaForCausalLM is focal_loss"):
        use_chunked_loss(model)
    assert type(model.lm_head) is nn.Linear
