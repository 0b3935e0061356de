"""State in few bits beyond single codes: what a step asks of the device, and what a low-rank run loses."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.optim import AdamW, GaLore
from lowmem.optim.codecs import Int8Blocks
from tests.optim.cases import LOW_BIT, LOW_BIT_CASES, as_parameters, case_id, gradients, make, run, weights

READS_A_VALUE = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", LOW_BIT_CASES, ids=case_id)
def test_a_steady_step_reads_no_value_from_the_device(case):
    """A GPU would have to finish all its work first."""
    params = as_parameters(weights(torch.bfloat16))
    optimizer = make(case, params)
    run(optimizer, params, range(2), torch.bfloat16)
    for param, grad in zip(params, gradients(2, torch.bfloat16), strict=True):
        param.grad = grad
    due = [
        optimizer.rule_of(param, group).needs_refresh(optimizer.coming_context(param, group))
        for group in optimizer.param_groups
        for param in group["params"]
    ]
    with Operators() as operators:
        for param, is_due in zip(params, due, strict=True):
            if not is_due:
                optimizer.step_param(param, optimizer.param_groups[0])
    assert operators.seen
    assert not operators.seen & READS_A_VALUE


def test_that_a_value_is_read_would_be_seen():
    with Operators() as operators:
        torch.ones(3).sum().item()
    assert operators.seen & READS_A_VALUE


def test_eight_bit_state_of_a_model_is_a_quarter_of_float32_state():
    params = as_parameters([torch.zeros(512, 256), torch.zeros(256)])
    whole, eight = (AdamW(params, storage=storage).state_bytes() for storage in (None, LOW_BIT))
    assert eight / whole == pytest.approx(0.254, abs=0.001)


def test_a_basis_takes_an_eighth_of_a_float32_one_and_is_packed_in_memory():
    param = torch.nn.Parameter(torch.randn(64, 96))
    param.grad = torch.randn(64, 96)
    optimizer = GaLore([param], rank=16, storage={"basis": "int4"})
    optimizer.step()
    state = optimizer.state[param]
    assert state["basis"].dtype == torch.uint8
    assert state["basis"].numel() == 64 * 16 // 2
    kept = sum(state[name].untyped_storage().nbytes() for name in ("basis", "basis_scale", "basis_zero"))
    assert kept <= 0.53 * 64 * 16


def test_a_slice_that_cuts_a_block_is_a_mistake_of_ours():
    codec = Int8Blocks(name="m", shape=(600,), signed=True, stochastic=False)
    stored = codec.allocate(torch.device("cpu"))
    codec.save_(stored, torch.ones(344), slice(256, 600), None)
    assert torch.equal(codec.load(stored), torch.cat([torch.zeros(256), torch.ones(344)]))
    for part in (slice(0, 100), slice(100, 256)):
        with pytest.raises(AssertionError, match="cuts a block of 256"):
            codec.load(stored, part)


@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate"])
def test_galore_in_few_bits_ends_near_the_loss_of_galore_in_float(on_refresh):
    """A linear map of full rank is recovered through fifteen bases of rank 6."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 40, generator=generator), torch.randn(40, 24, generator=generator)

    def loss_after(storage):
        param = torch.nn.Parameter(torch.zeros(40, 24))
        optimizer = GaLore(
            [param],
            lr=2e-2,
            rank=6,
            refresh_every=20,
            storage=storage,
            on_refresh=on_refresh,
            betas=(0.9, 0.99),
        )
        for _ in range(300):
            optimizer.zero_grad()
            loss = (x @ (param - target)).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    start = (x @ target).square().mean().item()
    in_float, in_few_bits = loss_after(None), loss_after(LOW_BIT)
    assert in_float < start / 10
    assert in_few_bits < start / 10
    assert in_few_bits == pytest.approx(in_float, rel=0.25)
