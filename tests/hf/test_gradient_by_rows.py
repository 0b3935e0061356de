"""Head and embedding updated some rows at a time: the same steps, and no gradient of their size."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem.errors import RefusedError
from lowmem.hf.chunked_loss import use_chunked_loss
from lowmem.numerics import tiles
from lowmem.numerics.held_weights import held_weight
from lowmem.numerics.row_gradients import RowGradient, SumOfRows, gradient_of, row_taker
from lowmem.optim import build_optimizer
from lowmem.run.embedding_by_rows import EmbeddingByRows
from lowmem.run.execution import Execution
from lowmem.run.fused_backward import FusedBackward
from lowmem.run.fused_by_rows import FusedByRows
from tests.hf.test_chunked_loss import oracle
from tests.hf.test_chunked_loss_int8 import int8_and_float
from tests.hf.test_chunked_loss_memory import AllocationLog
from tests.hf.tiny_models import checkpoint_activations, tiny_batch, tiny_model

VOCABULARY, WIDTH = 199, 16
SMALL_TILE = 1  # bytes of logits; gives the narrowest tiles there are, 64 columns


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """A vocabulary of several blocks: 32 rows of 16 values each, and 7 rows in the last."""
    monkeypatch.setattr(tiles, "TILE_NUMEL", 512)
    monkeypatch.setattr("lowmem.quant.int8_weight.TILE_NUMEL", 512)


KINDS = ["llama", "llama_tied", "gpt2", "phi_head_bias", "cohere_logit_scale", "granite_logits_scaling"]
OPTIMIZERS = {
    "adamw": {"weight_decay": 0.1},
    "sgd": {},
    "sgd with momentum": {"momentum": 0.9},
    "sgd_sai": {},
    "adafactor": {"weight_decay": 0.1},
    "adafactor with momentum": {"beta1": 0.9},
    "galore": {"rank": 4},
    "sinkgd, factored fallback": {"fallback": {"name": "adafactor"}},
    "galore, int8 fallback": {
        "rank": 4,
        "fallback": {"name": "adamw", "storage": {"moment": "int8", "variance": "int8"}},
    },
}


def train(
    model: PreTrainedModel, way: type[Execution], optimizer: str = "adamw", *, steps: int = 4, batches=None
) -> list[float]:
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    name = optimizer.split(",")[0].split(" ")[0]
    made = build_optimizer(model, name, lr=1e-2, **OPTIMIZERS[optimizer])
    execution = way(made)
    execution.attach(model)
    losses = []
    for step in range(steps):
        execution.begin_micro_batch(is_first=True, is_last=True)
        generator = torch.Generator().manual_seed(step)
        batch = {
            name: value[:, torch.randperm(value.shape[1], generator=generator)]
            for name, value in tiny_batch().items()
        }
        loss = model(**batch).loss
        loss.backward()
        execution.finish_backward()
        made.step()
        losses.append(loss.item())
    execution.detach()
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, param in model.named_parameters():
        held = held_weight(param)
        found[name] = param.detach() if held is None else held.module.dequantized()
    return found


def furthest(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of a weight, in units of the largest value of its tensor."""
    ours, theirs = weights_of(model), weights_of(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in ours)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_the_steps_are_those_of_whole_gradients(kind: str, optimizer: str) -> None:
    whole, by_rows = tiny_model(kind), tiny_model(kind)
    losses = train(whole, FusedBackward, optimizer), train(by_rows, FusedByRows, optimizer)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    # A stored code may be another where its value lies between two.
    assert furthest(by_rows, whole) <= (1e-6 if "int8" not in optimizer else 1e-3)


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_in_bfloat16_the_bits_are_those_of_whole_gradients(kind: str) -> None:
    """Tiles of the logits are kept in neither, blocks are those of the whole gradient, and so is their noise."""
    whole, by_rows = tiny_model(kind, dtype=torch.bfloat16), tiny_model(kind, dtype=torch.bfloat16)
    assert train(whole, FusedBackward) == train(by_rows, FusedByRows)
    assert furthest(by_rows, whole) == 0


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_an_int8_head_makes_the_same_steps(kind: str) -> None:
    whole, by_rows = int8_and_float(kind)[0], int8_and_float(kind)[0]
    assert train(whole, FusedBackward, "sgd") == pytest.approx(train(by_rows, FusedByRows, "sgd"), rel=1e-5)
    assert furthest(by_rows, whole) <= 1 / 127 + 1e-6, "a value between two codes may take the other one"


def test_recomputed_activations_change_nothing() -> None:
    recomputed, kept = tiny_model("llama_tied"), tiny_model("llama_tied")
    checkpoint_activations(recomputed)
    assert train(recomputed, FusedByRows) == pytest.approx(train(kept, FusedByRows), rel=1e-6)
    assert furthest(recomputed, kept) <= 1e-6


class Seen(FusedByRows):
    """Keeps what each gradient by rows looks like, whole, before it is used."""

    def attach(self, model: nn.Module) -> None:
        self.whole: dict[str, Tensor] = {}
        super().attach(model)

    def _use_rows(self, param, taker) -> None:
        grad = gradient_of(param)
        assert isinstance(grad, RowGradient)
        pieces = [grad[rows] for rows in tiles.row_slices(grad.shape)]
        self.whole[self.optimizer.place_of(param)[0]] = torch.cat(pieces)
        super()._use_rows(param, taker)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "phi_head_bias", "granite_logits_scaling"])
def test_rows_are_those_of_the_gradient_in_float64(kind: str) -> None:
    model, batch = tiny_model(kind, dtype=torch.float64), tiny_batch()
    _, expected = oracle(copy.deepcopy(model), batch)
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    for param in model.parameters():
        param.requires_grad_(param.shape == (VOCABULARY, WIDTH))
    seen = Seen(build_optimizer(model, "sgd", lr=1e-3))
    seen.attach(model)
    seen.begin_micro_batch(is_first=True, is_last=True)
    model(**batch).loss.backward()
    assert len(seen.whole) == (1 if kind == "llama_tied" else 2)
    for name, whole in seen.whole.items():
        torch.testing.assert_close(whole, expected[name], rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ what is alive


def step_logged(model: PreTrainedModel, way: type[Execution], *, micro_batches: int = 1, **settings) -> int:
    """Elements of the largest storage that a step makes."""
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    optimizer = build_optimizer(model, "sgd", lr=1e-2)
    execution = way(optimizer, **settings)
    execution.attach(model)
    with AllocationLog() as log:
        for number in range(micro_batches):
            execution.begin_micro_batch(is_first=number == 0, is_last=number == micro_batches - 1)
            model(**tiny_batch()).loss.backward()
        execution.finish_backward()
        optimizer.step()
    return max(elements for elements, _ in log.allocations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "phi_head_bias"])
def test_nothing_of_the_size_of_the_head_is_ever_made(kind: str, dtype: torch.dtype) -> None:
    size = VOCABULARY * WIDTH
    assert step_logged(tiny_model(kind, dtype=dtype), FusedBackward) >= size
    assert step_logged(tiny_model(kind, dtype=dtype), FusedByRows) < size


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_nothing_of_the_size_of_an_int8_head_is_ever_made(kind: str) -> None:
    model, _ = int8_and_float(kind)
    assert step_logged(model, FusedByRows) < VOCABULARY * WIDTH


@pytest.mark.parametrize("settings", [{"micro_batches": 2}, {"clip": "tensor", "max_norm": 1.0}], ids=str)
def test_with_accumulation_or_clipping_gradients_are_whole(settings: dict) -> None:
    whole, other = tiny_model(), tiny_model()
    assert step_logged(whole, FusedBackward, **settings) == step_logged(other, FusedByRows, **settings)
    assert furthest(other, whole) == 0


def test_nothing_stays_alive_after_the_step() -> None:
    model = tiny_model("llama_tied")
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    optimizer = build_optimizer(model, "sgd", lr=1e-2)
    execution = FusedByRows(optimizer)
    execution.attach(model)
    execution.begin_micro_batch(is_first=True, is_last=True)
    out = model(**tiny_batch(), output_hidden_states=True)
    hidden = weakref.ref(out.hidden_states[-1])
    out.loss.backward()
    del out
    assert hidden() is None
    assert all(param.grad is None for param in model.parameters())
    assert not row_taker(model.lm_head.weight).parts


# ------------------------------------------------------------------ odd moments and models


@pytest.mark.parametrize("what", ["loss", "hidden states"])
def test_a_gradient_that_is_not_finite_is_left_out_and_named(what: str) -> None:
    model = tiny_model("llama_tied")
    before = copy.deepcopy(model)
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    optimizer = build_optimizer(model, "sgd", lr=1e-2)
    execution = FusedByRows(optimizer)
    execution.attach(model)
    execution.begin_micro_batch(is_first=True, is_last=True)
    if what == "hidden states":
        model.model.norm.register_full_backward_hook(lambda m, dx, dy: (dx[0] * float("nan"),))
    loss = model(**tiny_batch()).loss
    if what == "loss":
        execution.note_loss(torch.tensor(float("nan")))
    loss.backward()
    execution.finish_backward()
    assert any(param is model.lm_head.weight for param in execution.not_finite)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert not row_taker(model.lm_head.weight).parts


def test_logits_that_were_computed_after_all_count_too() -> None:
    """Their part of a tied weight's gradient is whole and arrives first."""
    models = [tiny_model("llama_tied") for _ in range(2)]
    for model, way in zip(models, (FusedBackward, FusedByRows), strict=True):
        use_chunked_loss(model)
        optimizer = build_optimizer(model, "adamw", lr=1e-2)
        execution = way(optimizer)
        execution.attach(model)
        for _ in range(3):
            execution.begin_micro_batch(is_first=True, is_last=True)
            out = model(**tiny_batch())
            (out.loss + out.logits.exp().mean()).backward()
            execution.finish_backward()
            optimizer.step()
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    assert furthest(*models) <= 1e-6


def test_a_weight_whose_gradient_goes_on_arriving_is_refused() -> None:
    model = tiny_model()
    use_chunked_loss(model)
    execution = FusedByRows(build_optimizer(model, "sgd", lr=1e-2))
    execution.attach(model)
    execution.begin_micro_batch(is_first=True, is_last=True)
    late = model.lm_head.weight.square().sum()  # made before the head is used, so it comes later in backward
    with pytest.raises(RefusedError, match=r"lm_head\.weight.*train\.head_gradient: whole"):
        (late + model(**tiny_batch()).loss).backward()


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_a_second_backward_pass_is_refused(kind: str) -> None:
    model = tiny_model(kind)
    use_chunked_loss(model)
    execution = FusedByRows(build_optimizer(model, "sgd", lr=1e-2))
    execution.attach(model)
    execution.begin_micro_batch(is_first=True, is_last=True)
    model(**tiny_batch()).loss.backward()
    with pytest.raises(RefusedError, match="backward"):
        model(**tiny_batch()).loss.backward()


def test_a_frozen_head_and_a_head_without_a_chunked_loss_are_left_alone() -> None:
    frozen, plain = tiny_model(), tiny_model()
    frozen.lm_head.weight.requires_grad_(False)
    use_chunked_loss(frozen)
    for model in (frozen, plain):
        FusedByRows(build_optimizer(model, "sgd", lr=1e-2)).attach(model)
        assert row_taker(model.lm_head.weight) is None
        assert row_taker(model.model.embed_tokens.weight) is not None


def test_an_embedding_that_does_more_than_look_up_keeps_a_whole_gradient() -> None:
    model = tiny_model("gemma2_softcap")  # scales what it looks up, and is tied to the head
    use_chunked_loss(model)
    FusedByRows(build_optimizer(model, "sgd", lr=1e-2)).attach(model)
    assert row_taker(model.lm_head.weight) is None


def test_detaching_gives_the_model_back_as_it_was() -> None:
    model = tiny_model("llama_tied")
    use_chunked_loss(model)
    execution = FusedByRows(build_optimizer(model, "sgd", lr=1e-2))
    execution.attach(model)
    assert type(model.model.embed_tokens) is EmbeddingByRows
    assert type(copy.deepcopy(model).lm_head.weight) is nn.Parameter
    assert row_taker(copy.deepcopy(model).lm_head.weight) is None
    execution.detach()
    assert type(model.model.embed_tokens) is nn.Embedding
    assert row_taker(model.lm_head.weight) is None


def test_padding_tokens_leave_no_gradient() -> None:
    table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3, dtype=torch.float64)
    ids = torch.tensor([[3, 5, 5, 198], [0, 3, 7, 64]])
    expected = copy.deepcopy(table)
    (expected(ids) ** 2).sum().backward()
    seen = Seen(build_optimizer(table, "sgd", lr=1e-3))
    seen.attach(table)
    seen.begin_micro_batch(is_first=True, is_last=True)
    (table(ids) ** 2).sum().backward()
    torch.testing.assert_close(seen.whole["weight"], expected.weight.grad)
    assert not seen.whole["weight"][3].any()


def test_parts_of_a_sum_are_added() -> None:
    class Rows(RowGradient):
        def __init__(self, whole: Tensor):
            super().__init__(tuple(whole.shape), whole.dtype, whole.device)
            self.of = whole

        def __getitem__(self, rows: slice) -> Tensor:
            return self.of[rows].clone()

        def magnitude(self) -> Tensor:
            return self.of.norm()

    one, two, whole = torch.randn(3, 5, 4)
    total = SumOfRows([Rows(one), Rows(two)], whole)
    kept = whole.clone()
    torch.testing.assert_close(total[1:4], (one + two + whole)[1:4])
    assert torch.equal(whole, kept)
    whole[0, 0] = float("inf")
    assert not total.magnitude().isfinite()
