"""What Q-GaLore adds to GaLore: formats by default, bounded gaps, bytes in memory and on disk, int8 weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowmem.optim import GaLore, QGaLore
from lowmem.optim.lazy_refresh import SCHEDULE
from lowmem.quant.convert import quantize_model_


def stepped(param: nn.Parameter, steps: int = 1, **settings) -> QGaLore:
    optimizer = QGaLore([param], lr=1e-2, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return optimizer


def test_a_basis_value_takes_at_most_053_bytes_in_memory_and_in_the_file(tmp_path):
    param = nn.Parameter(torch.randn(300, 700))
    state = stepped(param, rank=75).state[param]
    basis = {name: value for name, value in state.items() if name.startswith("basis")}
    assert sum(value.untyped_storage().nbytes() for value in basis.values()) <= 0.53 * 300 * 75
    save_file(basis, tmp_path / "basis.safetensors")
    header = 400  # three entries of JSON
    assert (tmp_path / "basis.safetensors").stat().st_size - header <= 0.53 * 300 * 75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_takes_little_more_than_a_quarter_of_galores_in_float32(dtype):
    param = nn.Parameter(torch.randn(512, 1024).to(dtype))
    low, whole = QGaLore([param], rank=128), GaLore([nn.Parameter(torch.randn(512, 1024))], rank=128)
    m, n, r = 512, 1024, 128
    assert low.state_bytes() == pytest.approx(0.5235 * m * r + 2 * (1 + 4 / 256) * r * n, abs=64)
    assert low.state_bytes() < 0.26 * whole.state_bytes()


def test_roles_left_out_of_storage_keep_their_few_bits():
    param = nn.Parameter(torch.randn(32, 48))
    state = stepped(param, rank=8, storage={"moment": "fp32"}).state[param]
    assert state["exp_avg"].dtype == torch.float32
    assert state["exp_avg_sq"].dtype == torch.uint8
    assert state["basis"].dtype == torch.uint8


def test_a_stored_basis_is_used_as_it_is_stored():
    """The projection and the way back must agree, or the step is not the gradient's."""
    param = nn.Parameter(torch.zeros(32, 48))
    optimizer = stepped(param, rank=8, storage={"moment": "fp32", "variance": "fp32"}, eps=1e-8)
    rule, state = optimizer.rule_of(param, optimizer.param_groups[0]), optimizer.state[param]
    assert rule.rank == 8
    codes = state["basis"]
    zero, scale = state["basis_zero"], state["basis_scale"]
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).view(-1).float()
    groups = torch.arange(unpacked.numel()) // 128
    P = ((unpacked - zero.float()[groups]) * scale.float()[groups]).view(32, 8)
    rest = param.detach() - P @ torch.linalg.lstsq(P, param.detach()).solution
    assert rest.norm() < 1e-4 * param.norm()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (40, 40), (3, 24, 40)])
def test_a_gap_is_the_matrixs_own_and_saved_with_its_state(shape):
    param = nn.Parameter(torch.randn(shape))
    optimizer = stepped(
        param, 12, rank=4, refresh_every=2, similarity_threshold=0.0, similarity_window=1, stagger=False
    )
    assert optimizer.state[param][SCHEDULE][0] > 0
    other = QGaLore([param], rank=4)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[param][SCHEDULE], optimizer.state[param][SCHEDULE])


def test_without_lazy_it_refreshes_as_galore_does():
    ours, galores = nn.Parameter(torch.ones(24, 40)), nn.Parameter(torch.ones(24, 40))
    storage = {"moment": "fp32", "variance": "fp32", "basis": "fp32"}
    a = QGaLore([ours], lr=1e-2, rank=4, refresh_every=3, lazy=False, storage=storage)
    b = GaLore([galores], lr=1e-2, rank=4, refresh_every=3, storage=storage)
    for step in range(10):
        grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
        ours.grad, galores.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    assert torch.equal(ours, galores)


def test_a_longest_gap_below_the_first_one_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="max_refresh_every 10 is below refresh_every 200"):
        QGaLore([nn.Parameter(torch.randn(24, 40))], rank=4, max_refresh_every=10)


@pytest.mark.parametrize("bias", [False, True])
def test_it_trains_int8_weights_to_a_lower_loss_without_a_float_copy(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=bias), nn.Tanh(), nn.Linear(96, 64, bias=bias))
    model = nn.ModuleDict({"body": model})
    quantize_model_(model)
    optimizer = QGaLore(model.parameters(), lr=3e-3, rank=16, refresh_every=10)
    x = torch.randn(128, 64)
    target = x @ torch.randn(64, 64) / 8
    losses = []
    for _ in range(60):
        loss = (model["body"](x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    float_values = sum(p.numel() for p in model.parameters())
    assert float_values == (96 + 64 if bias else 0)
