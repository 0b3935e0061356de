"""Optimizer state that one launch has saved, for another number of processes."""

from __future__ import annotations

import functools
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

from lowmem.errors import RefusedError
from lowmem.optim.registry import OPTIMIZERS
from lowmem.run.checkpoint_probe import piece_file_bytes, pieces_in_small
from lowmem.run.layouts.attach import attach_to_fsdp2
from lowmem.run.layouts.load_whole_state import load_whole_state_
from lowmem.run.layouts.saved_pieces import saved_pieces
from lowmem.run.layouts.whole_state import whole_state_of_one, whole_state_of_pieces
from tests.optim.cases import case_id, cases_in_float
from tests.run.test_execution import batches, net, optimizer_for
from tests.run.test_layouts import TURNS, train

STEPS, STOP = 8, 4
INT8 = ("adamw", {"lr": 1e-2, "storage": {"moment": "int8", "variance": "int8"}})
LIBRARY = ("adamw8bit", {"lr": 1e-2, "min_8bit_size": 1})
OF_EACH = [cases_in_float(name)[0] for name in OPTIMIZERS]
ALL = [*OF_EACH, *TURNS, INT8, LIBRARY]
FEW = [*(case for case in OF_EACH if case[0] in ("adamw", "sgd_sai", "galore")), TURNS[0], INT8, LIBRARY]
OF_WORLD = {2: FEW, 3: ALL}
PAIRS = [
    *(pytest.param(2, case, id=f"2-{case_id(case)}") for case in FEW),
    *(pytest.param(3, case, id=f"3-{case_id(case)}", marks=pytest.mark.slow) for case in ALL),
]


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in net().named_parameters()}


def in_rows(case, weights, world: int):
    model = net()
    optimizer = optimizer_for(case, model)
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (world,))
    with torch.no_grad():
        for param, value in zip(model.parameters(), weights, strict=True):
            param.copy_(value)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group, own in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [sharded[name] for name in own]
    return model, optimizer, attach_to_fsdp2(optimizer, model)


def alone(case, stop: int = STEPS):
    model = net()
    optimizer = optimizer_for(case, model)
    weights = train(model, optimizer, batches(STEPS, 1)[:stop])
    return weights, optimizer


def work(rank: int, world: int, port: int, given: str, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        states = torch.load(given, weights_only=True)
        found = {}
        for case in OF_WORLD[world]:
            data = [[ids[rank::world] for ids in step] for step in batches(STEPS, 1)]
            model, optimizer, steps = in_rows(case, net().parameters(), world)
            small, nbytes = pieces_in_small(steps.pieces), piece_file_bytes(steps.pieces)
            half = train(model, optimizer, data[:STOP])
            saved = pickle.loads(pickle.dumps(saved_pieces(steps.pieces)))
            model, optimizer, steps = in_rows(case, states[str(case)]["weights"], world)
            load_whole_state_(steps.pieces, states[str(case)]["whole"])
            found[str(case)] = {"half": half, "saved": saved, "end": train(model, optimizer, data[STOP:])}
            found[str(case)] |= {"small": pickle.loads(pickle.dumps(small)), "nbytes": nbytes}
        torch.save(found, Path(out, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory):
    """For a number of processes: what they have saved after half of the steps, and what became of the half that one
    process had trained. Each number starts once."""

    @functools.cache
    def ranks(world: int) -> list[dict]:
        out = tmp_path_factory.mktemp("ranks")
        states = {}
        for case in OF_WORLD[world]:
            weights, optimizer = alone(case, STOP)
            whole = whole_state_of_one(optimizer.state_dict(), shapes())
            states[str(case)] = {"weights": weights, "whole": whole}
        torch.save(states, out / "states.pt")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes.spawn(work, args=(world, port, str(out / "states.pt"), str(out)), nprocs=world)
        return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return ranks


def close(case, found, expected) -> None:
    start = list(net().parameters())
    moved = max((a - b).abs().max().item() for a, b in zip(expected, start, strict=True))
    bound = max(5e-5, 1e-3 * moved)
    if case in (INT8, LIBRARY):  # other blocks of 256 values, so other rounding: a few of the steps of 1e-2
        bound = 2e-2
    assert max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) < bound


def kinds_of(saved) -> dict[int, dict[str, torch.dtype]]:
    state = saved["state"]["state"]
    return {index: {key: value.dtype for key, value in each.items()} for index, each in state.items()}


WITHOUT_TURNS = [each for each in PAIRS if each.values[1] not in TURNS and each.values[1][0] != "block_adam"]


@pytest.mark.parametrize(("world", "case"), WITHOUT_TURNS)
def test_before_the_first_step_a_process_knows_what_it_will_save(ranks_of, world, case):
    for found in ranks_of(world):
        small, saved = found[str(case)]["small"], found[str(case)]["saved"]
        assert kinds_of(small) == kinds_of(saved)
        assert small["places"] == saved["places"]
        tensors = [value for each in saved["state"]["state"].values() for value in each.values()]
        assert found[str(case)]["nbytes"] == sum(value.nbytes for value in tensors) > 0
        assert all(value.numel() == 1 for each in small["state"]["state"].values() for value in each.values())


@pytest.mark.parametrize(("world", "case"), PAIRS)
def test_what_one_process_has_saved_goes_on_in_several(ranks_of, world, case):
    ranks = ranks_of(world)
    close(case, ranks[0][str(case)]["end"], alone(case)[0])


@pytest.mark.parametrize(("world", "case"), PAIRS)
def test_what_several_have_saved_goes_on_in_one(ranks_of, world, case):
    ranks = ranks_of(world)
    found = [each[str(case)] for each in ranks]
    whole = whole_state_of_pieces([each["saved"] for each in found], shapes())
    model = net()
    with torch.no_grad():
        for param, value in zip(model.parameters(), found[0]["half"], strict=True):
            param.copy_(value)
    optimizer = optimizer_for(case, model)
    load_whole_state_(optimizer, whole)
    close(case, train(model, optimizer, batches(STEPS, 1)[STOP:]), alone(case)[0])


@pytest.mark.parametrize("case", ALL, ids=case_id)
def test_through_whole_state_and_back_one_process_goes_on_with_the_same_bits(case):
    weights, optimizer = alone(case, STOP)
    whole = whole_state_of_one(optimizer.state_dict(), shapes())
    model = net()
    with torch.no_grad():
        for param, value in zip(model.parameters(), weights, strict=True):
            param.copy_(value)
    again = optimizer_for(case, model)
    load_whole_state_(again, whole)
    end = train(model, again, batches(STEPS, 1)[STOP:])
    if (
        case is LIBRARY
    ):  # its codes have no level of -1, so a block whose largest value is negative has a new scale
        close(case, end, alone(case)[0])
        return
    assert all(torch.equal(a, b) for a, b in zip(end, alone(case)[0], strict=True))


def test_state_of_another_optimizer_or_rank_is_refused_in_words():
    galore = next(case for case in OF_EACH if case[0] == "galore")
    whole = whole_state_of_one(alone(galore, 1)[1].state_dict(), shapes())
    for case, words in [
        (("adamw", {"lr": 1e-2}), "the saved state has galore for .*, and here it is adamw's"),
        (("galore", {**galore[1], "rank": 2}), r"keeps \(.*Continue with the settings .* rank and storage"),
    ]:
        with pytest.raises(RefusedError, match=words):
            load_whole_state_(optimizer_for(case, net()), whole)


def test_files_of_two_launches_are_not_put_together(ranks_of):
    ranks = ranks_of(2)
    case = str(OF_EACH[0])
    saved = [each[case]["saved"] for each in ranks]
    with pytest.raises(RefusedError, match="is not of the same launch"):
        whole_state_of_pieces(saved[::-1], shapes())
    with pytest.raises(RefusedError, match="is not of the same launch"):
        whole_state_of_pieces(saved[:1], shapes())
