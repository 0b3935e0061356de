"""Int8 weights under data parallel training: what no reducer knows of is reduced, and never sent."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

from lowmem.errors import RefusedError
from lowmem.quant.int8_weight import Int8Module
from lowmem.run.same_weights import PIECE_BYTES, fingerprint
from tests.quant.test_int8_training import int8_net
from tests.run.test_execution import GALORE, batches, execution_for, optimizer_for, train

WORLD = 2
COMBINATIONS = [
    (mode, case, micro_batches, clip)
    for case in (GALORE, ("adamw", {}), ("sgd", {}))
    for mode in ("plain", "project", "fused")
    for micro_batches in (1, 3)
    for clip in (None, "applied")
    if not (mode == "project" and case is not GALORE) and not (mode == "fused" and clip == "applied")
]


def halves(step: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    return [ids[rank::WORLD] for ids in step]


def trained(combination, wrap, data) -> dict[str, torch.Tensor]:
    mode, case, micro_batches, clip = combination
    model = int8_net()
    optimizer = optimizer_for(case, model)
    settings = {} if clip is None else {"clip": clip, "max_norm": 0.05}
    execution = execution_for(mode, optimizer, model, **settings)
    train(wrap(model), optimizer, execution, data(batches(8, micro_batches)))
    return model.state_dict()


def refusal(rank: int, change) -> str:
    model = int8_net()
    if rank == 1:
        change(model)
    try:
        execution_for("plain", optimizer_for(GALORE, model), model)
    except RefusedError as error:
        return str(error)
    return ""


def other_code(model) -> None:
    model.blocks[1].mlp_up.weight_codes[3, 5] ^= 1


def other_scale(model) -> None:
    scales = model.blocks[0].mlp_down.weight_scales
    scales[0, 0] = torch.nextafter(scales[0, 0], torch.tensor(9.0))


def work(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        found = {
            str(combination): trained(
                combination, DistributedDataParallel, lambda data: [halves(step, rank) for step in data]
            )
            for combination in COMBINATIONS
        }
        refusals = [refusal(rank, change) for change in (other_code, other_scale, lambda model: None)]
        Path(out, f"{rank}.pickle").write_bytes(pickle.dumps((found, refusals)))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes have trained, all combinations in one start."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(work, args=(port, str(out)), nprocs=WORLD)
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_two_processes_make_the_steps_of_one(ranks, combination):
    alone = trained(combination, lambda model: model, lambda data: data)
    zero, one = (found[str(combination)] for found, _ in ranks)
    assert all(torch.equal(zero[name], one[name]) for name in alone), "the processes agree to the bit"
    start = int8_net().state_dict()
    moved = different = total = 0
    for name, value in alone.items():
        if value.dtype is torch.int8:
            apart = (zero[name].int() - value.int()).abs()
            assert apart.max() <= 1, "a code that was rounded the other way is the next one"
            different, total = different + int((apart > 0).sum()), total + value.numel()
            moved += int((start[name] != value).sum())
        else:
            assert (zero[name] - value).abs().max() < 2e-4
    assert moved > 0.005 * total, "codes were trained at all"
    assert different < 0.02 * total


def test_weights_that_are_not_the_same_everywhere_are_named_on_every_process(ranks):
    for _, (codes, scales, nothing) in ranks:
        assert "first blocks.1.mlp_up.weight_codes. Data parallel" in codes
        assert "first blocks.0.mlp_down.weight_scales. Data parallel" in scales
        assert nothing == ""


@pytest.mark.parametrize("numel", [1, 1000, 3 * PIECE_BYTES + 7])
def test_a_fingerprint_tells_single_bits_and_swaps_apart(numel):
    tensor = torch.randint(-127, 128, (numel,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.clone()))
    for place in {0, numel // 2, numel - 1}:
        changed = tensor.clone()
        changed[place] ^= 1
        assert not torch.equal(before, fingerprint(changed))
    if numel > 1:
        swapped = tensor.clone()
        at = int((tensor != tensor[0]).nonzero()[0])
        swapped[[0, at]] = tensor[[at, 0]]
        assert not torch.equal(before, fingerprint(swapped))


def test_a_model_without_an_ordinary_trained_weight_is_refused_before_a_reducer_is(monkeypatch):
    monkeypatch.setattr("lowmem.run.execution._world_size", lambda: 2)
    model = int8_net()
    for param in model.parameters():
        param.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Int8Module):
            module.weight.requires_grad_(True)
    with pytest.raises(RefusedError, match="Train its norms too"):
        execution_for("plain", optimizer_for(("sgd", {}), model), model)
