"""Parameters in pieces over processes, against one process that has them whole."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowmem.optim.registry import OPTIMIZERS
from lowmem.run.layouts.attach import attach_to_fsdp2
from lowmem.run.layouts.saved_pieces import load_pieces_, saved_pieces
from tests.optim.cases import CASES, case_id
from tests.run.test_execution import batches, net, optimizer_for

WORLD = 2
STEPS = 8
OF_EACH = {name: [case for case in CASES if case[0] == name][:2] for name in OPTIMIZERS}
CHOSEN = [case for cases in OF_EACH.values() for case in cases]
TURNS = [
    *(case for case in CASES if case[1].get("projection") == "block"),
    ("block_adam", {"refresh_every": 3, "lr": 1e-2}),
]
"""Whose state is another at each turn."""
MATRICES = 6 * 24 * 48
"""Values of the linear layers of `net`."""


def whole(param: torch.Tensor) -> torch.Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def train(model, optimizer, data) -> list[torch.Tensor]:
    for micro_batches in data:
        for ids in micro_batches:
            (model(ids) / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return [whole(param) for param in model.parameters()]


def trained_in_rows(case, rank: int, data, stop: int = STEPS) -> tuple[list[torch.Tensor], dict]:
    """All steps of `data`; those after the first `stop` by another optimizer that has loaded what this one saved."""
    model, optimizer, steps, whole_bytes = in_rows(case)
    data = [[ids[rank::WORLD] for ids in step] for step in data]
    weights = train(model, optimizer, data[:stop])
    if stop < len(data):
        saved, trained = saved_pieces(steps.pieces), model
        model, optimizer, steps, _ = in_rows(case)
        for new, old in zip(model.parameters(), trained.parameters(), strict=True):
            new.data.copy_(old.data)
        load_pieces_(steps.pieces, saved)
        weights = train(model, optimizer, data[stop:])
    pieces = steps.pieces
    held = sum(tensor.nbytes for state in pieces.state.values() for tensor in state.values())
    return weights, {
        "held": held,
        "whole": whole_bytes,
        "sent": pieces.sent,
        "declared": pieces.state_bytes(),
    }


def in_rows(case):
    model = net()
    optimizer = optimizer_for(case, model)
    whole_bytes = optimizer.state_bytes()
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    by_name = dict(model.named_parameters())
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    assert by_name.keys() == sharded.keys()
    for group, own in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [sharded[name] for name in own]
    with pytest.raises(ValueError, match="attach_to_fsdp2"):
        optimizer.step()
    return model, optimizer, attach_to_fsdp2(optimizer, model), whole_bytes


def work(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        found = {str(case): trained_in_rows(case, rank, batches(STEPS, 1)) for case in [*CHOSEN, *TURNS]}
        found |= {f"{case} resumed": trained_in_rows(case, rank, batches(STEPS, 1), stop=4) for case in TURNS}
        Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes have trained, all cases in one start."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(work, args=(port, str(out)), nprocs=WORLD)
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", [*CHOSEN, *TURNS], ids=case_id)
def test_rows_over_two_processes_make_the_steps_of_one(ranks, case):
    model = net()
    alone = train(model, optimizer_for(case, model), batches(STEPS, 1))
    (zero, _), (one, _) = (found[str(case)] for found in ranks)
    assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True))
    start = list(net().parameters())
    moved = max((a - b).abs().max().item() for a, b in zip(alone, start, strict=True))
    assert moved > 0
    assert max((a - b).abs().max().item() for a, b in zip(zero, alone, strict=True)) < max(5e-5, 1e-3 * moved)


@pytest.mark.parametrize("case", CHOSEN, ids=case_id)
def test_state_is_divided_over_the_processes_and_counted_before_it_is_made(ranks, case):
    found = [counted for _, counted in (found[str(case)] for found in ranks)]
    parameters = len(list(net().parameters()))
    assert [each["held"] for each in found] == [each["declared"] for each in found]
    assert sum(each["held"] for each in found) <= found[0]["whole"] + 4 * parameters + 4 * parameters
    assert max(each["held"] for each in found) <= 0.62 * found[0]["whole"] + 4 * parameters


@pytest.mark.parametrize("case", TURNS, ids=case_id)
def test_a_turn_goes_on_from_saved_pieces_with_the_same_bits(ranks, case):
    for found in ranks:
        whole, resumed = found[str(case)][0], found[f"{case} resumed"][0]
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("case", TURNS, ids=case_id)
def test_state_of_a_turn_is_divided_and_that_of_the_last_one_gone(ranks, case):
    held = [counted["held"] for _, counted in (found[str(case)] for found in ranks)]
    assert held == [counted["declared"] for _, counted in (found[str(case)] for found in ranks)]
    assert (
        len(list(net().parameters())) * 4
        < max(held)
        < 0.4 * 2 * 4 * sum(p.numel() for p in net().parameters())
    )


def test_matrices_travel_once_to_their_owners_and_back(ranks):
    galore = str(OF_EACH["galore"][0])
    sent = sum(counted["sent"] for _, counted in (found[galore] for found in ranks))
    assert sent == STEPS * 3 * MATRICES // 2, (
        "gradient, weight and new weight of the half that the owner has not"
    )
    adamw = str(OF_EACH["adamw"][0])
    assert [counted["sent"] for _, counted in (found[adamw] for found in ranks)] == [0, 0]
