"""What other implementations of int8 weights are known to get wrong, each shown to be right here.

Groups of one sign and rows of any length are in `tests/numerics/test_int8_groups.py`; accumulation, clipping and
resuming in `test_int8_training.py`.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from lowmem.optim import SGD
from lowmem.quant.int8_linear import Int8Linear
from tests.quant.test_int8_training import int8_net
from tests.run.test_execution import GALORE, batches, execution_for, optimizer_for, train

MODES = ["plain", "project", "fused"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False], ids=["int8 embedding", "float embedding"])
def test_embeddings_norms_and_head_are_trained_like_the_rest_and_leave_no_gradient(mode, tied):
    model = int8_net(tied=tied)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = optimizer_for(GALORE, model)
    train(model, optimizer, execution_for(mode, optimizer, model), batches(4, 1))
    weights = [name for name in start if not name.endswith("_scales")]
    assert [name for name in weights if torch.equal(start[name], model.state_dict()[name])] == []
    assert [name for name, param in model.named_parameters() if param.grad is not None] == []


@pytest.mark.parametrize("codes", [0.5, 0.1, 0.04])
def test_updates_of_part_of_a_code_add_up_in_a_bf16_model(codes):
    """A weight of 100 codes has neighbours half a code away in bfloat16, where such updates would be lost."""
    start = torch.full((16, 256), 100.0)
    start[:, ::2] = -100.0
    start[:, 0] = 127.0  # keeps the scale at 1
    layer = Int8Linear(256, 16, bias=False, dtype=torch.bfloat16)
    layer.quantize_(start.bfloat16())
    optimizer = SGD([layer.weight], lr=codes)
    grad = torch.ones(16, 256, dtype=torch.bfloat16)
    grad[:, 0] = 0.0
    before, steps = layer.dequantized(torch.float32), round(10 / codes)
    for _ in range(steps):
        layer.held.grad = grad.clone()
        optimizer.step()
    moved = (before - layer.dequantized(torch.float32))[:, 1:].mean().item()
    assert moved == pytest.approx(steps * codes, rel=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_no_float_copy_of_a_weight_is_alive_after_backward_or_after_a_step(mode):
    model = int8_net(torch.bfloat16, width=64, tied=False)
    optimizer = optimizer_for(GALORE, model)
    execution = execution_for(mode, optimizer, model)
    matrices = {
        tuple(module.weight_codes.shape) for module in model.modules() if isinstance(module, Int8Linear)
    }

    def float_matrices() -> int:
        gc.collect()
        return sum(
            issubclass(type(found), torch.Tensor)
            and found.is_floating_point()
            and tuple(found.shape) in matrices
            for found in gc.get_objects()
        )

    before = float_matrices()
    for (ids,) in batches(2, 1):
        execution.begin_micro_batch(is_first=True, is_last=True)
        model(ids).backward()
        gradients = sum(
            module.held.grad is not None for module in model.modules() if isinstance(module, Int8Linear)
        )
        assert float_matrices() - before == gradients
        assert gradients == (6 if mode == "plain" else 0)
        execution.finish_backward()
        optimizer.step()
        model.zero_grad()
        assert float_matrices() == before


@pytest.mark.parametrize("mode", MODES)
def test_a_state_dict_taken_after_a_step_is_whole(mode):
    model = int8_net()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    optimizer = optimizer_for(GALORE, model)
    train(model, optimizer, execution_for(mode, optimizer, model), batches(2, 1))
    taken = model.state_dict()
    assert {name: value.shape for name, value in taken.items()} == shapes
    again = int8_net()
    again.load_state_dict(taken)
    ids = batches(1, 1)[0][0]
    assert torch.equal(again(ids), model(ids))


def test_weights_of_any_shape_are_trained_and_not_those_of_whole_groups_only():
    for shape in ((1, 1), (3, 5), (7, 257), (300, 2)):
        layer = Int8Linear.from_linear(nn.Linear(shape[1], shape[0], bias=False))
        before = layer.dequantized()
        layer.held.grad = torch.ones(shape)
        SGD([layer.weight], lr=1.0).step()
        assert torch.allclose(layer.dequantized(), before - 1, atol=2 * (before.abs().max() + 1).item() / 127)
