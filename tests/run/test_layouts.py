"""Parameters in pieces over processes, against one process that has them whole."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowmem.optim.registry import OPTIMIZERS
from lowmem.run.layouts.attach import attach_to_fsdp2
from lowmem.run.layouts.exchange import device_to_talk_on
from lowmem.run.layouts.saved_pieces import load_pieces_, saved_pieces
from tests.optim.cases import CASES, case_id, cases_in_float, is_in_codes
from tests.run.test_execution import batches, net, optimizer_for

WORLD = 2
STEPS = 8
OF_EACH = {name: cases_in_float(name)[:2] for name in OPTIMIZERS}
CHOSEN = [case for cases in OF_EACH.values() for case in cases]
FIRST = [cases[0] for cases in OF_EACH.values()]
CODED = [case for case in CASES if is_in_codes(case)]
"""Whose blocks of codes are those of a process' piece, and so not those of the whole parameter."""
TURNS = [
    *(case for case in CASES if case[1].get("projection") == "block"),
    ("block_adam", {"refresh_every": 3, "lr": 1e-2}),
]
"""Whose state is another at each turn."""
OF_TWO = {
    **{str(case): (case, {}) for case in [*CHOSEN, *CODED, *TURNS]},
    **{f"{case} resumed": (case, {"stop": 4}) for case in TURNS},
    **{f"{case} in float64": (case, {"dtype": torch.float64}) for case in FIRST},
}
"""What two processes train, by name: a case and how."""
OF_THREE = {
    f"{name} {width} wide": (OF_EACH[name][0], {"width": width})
    for name in ("sgd_sai", "galore", "swan", "frugal")
    for width in (20, 4)
}
"""Rows that three processes cannot have as many of: 20 are 7, 7 and 6, 40 are 14, 14 and 12, 4 are 2, 2 and none."""
MATRICES = 6 * 24 * 48
"""Values of the linear layers of `net`."""


COLUMNS = 3 * (24 + 48)
"""Of the same."""


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


def trained_in_rows(case, stop: int = STEPS, **shape) -> tuple[list[torch.Tensor], dict]:
    """All steps; those after the first `stop` by another optimizer that has loaded what this one saved."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizer, steps, whole_bytes = in_rows(case, **shape)
    data = [[ids[rank::world] for ids in step] for step in batches(STEPS, 1, rows=world)]
    weights = train(model, optimizer, data[:stop])
    if stop < len(data):
        saved, trained = saved_pieces(steps.pieces), model
        model, optimizer, steps, _ = in_rows(case, **shape)
        for new, old in zip(model.parameters(), trained.parameters(), strict=True):
            new.data.copy_(old.data)
        load_pieces_(steps.pieces, saved)
        weights = train(model, optimizer, data[stop:])
    pieces = steps.pieces
    kept = {
        (name, key): tensor
        for group in pieces.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if name in pieces.by_rows()
        for key, tensor in pieces.state[param].items()
    }
    held = sum(tensor.nbytes for state in pieces.state.values() for tensor in state.values())
    return weights, {
        "held": held,
        "whole": whole_bytes,
        "sent": pieces.sent,
        "summed": pieces.summed,
        "kept by rows": kept,
        "gsnr": [
            float(state["gsnr"]) if "gsnr" in (state := pieces.state[param]) else None
            for group in pieces.param_groups
            for param in group["params"]
        ],
        "declared": pieces.state_bytes(),
    }


def in_rows(case, **shape):
    model = net(**shape)
    optimizer = optimizer_for(case, model)
    whole_bytes = optimizer.state_bytes()
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    by_name = dict(model.named_parameters())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
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


def work(rank: int, ports: list[int], out: str) -> None:
    """Three processes, and then the first two of them."""
    torch.set_num_threads(1)
    found = {}
    for port, (world, jobs) in zip(ports, ((3, OF_THREE), (WORLD, OF_TWO)), strict=True):
        if rank >= world:
            continue
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
        try:
            found |= {name: trained_in_rows(case, **how) for name, (case, how) in jobs.items()}
        finally:
            dist.destroy_process_group()
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three processes have trained, all cases in one start; the first two have also what two have trained."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as one, socket.socket() as other:
        ports = [free.bind(("127.0.0.1", 0)) or free.getsockname()[1] for free in (one, other)]
    processes.spawn(work, args=(ports, str(out)), nprocs=3)
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(3)]


@pytest.fixture(scope="module")
def ranks(three):
    return three[:WORLD]


def furthest_from_one_process(found: list, case, **shape) -> tuple[float, float]:
    """The largest difference of a weight, and the distance that the weights have moved."""
    model = net(**shape)
    alone = train(model, optimizer_for(case, model), batches(STEPS, 1, rows=len(found)))
    ours, *others = (weights for weights, _ in found)
    assert all(torch.equal(a, b) for other in others for a, b in zip(ours, other, strict=True))
    moved = max((a - b).abs().max().item() for a, b in zip(alone, net(**shape).parameters(), strict=True))
    assert moved > 0
    return max((a - b).abs().max().item() for a, b in zip(ours, alone, strict=True)), moved


@pytest.mark.parametrize("case", [*CHOSEN, *TURNS], ids=case_id)
def test_rows_over_two_processes_make_the_steps_of_one(ranks, case):
    furthest, moved = furthest_from_one_process([found[str(case)] for found in ranks], case)
    assert furthest < max(5e-5, 1e-3 * moved)


@pytest.mark.parametrize("case", FIRST, ids=case_id)
def test_in_float64_rows_over_two_processes_make_the_steps_of_one_to_1e_9(ranks, case):
    """Where rows are updated apart, their float32 sums are made in another order, which is all that differs."""
    found = [found[f"{case} in float64"] for found in ranks]
    furthest, moved = furthest_from_one_process(found, case, dtype=torch.float64)
    assert furthest < (1e-6 * moved if found[0][1]["kept by rows"] else 1e-9)


@pytest.mark.parametrize("name", OF_THREE)
def test_three_processes_with_rows_that_they_cannot_share_equally_make_the_steps_of_one(three, name):
    case, shape = OF_THREE[name]
    furthest, moved = furthest_from_one_process([found[name] for found in three], case, **shape)
    assert furthest < max(5e-5, 1e-3 * moved)


@pytest.mark.parametrize("case", CODED, ids=case_id)
def test_codes_in_blocks_of_a_process_own_round_otherwise_and_no_more(ranks, case):
    model = net()
    alone = train(model, optimizer_for(case, model), batches(STEPS, 1))
    (zero, _), (one, _) = (found[str(case)] for found in ranks)
    assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True))
    apart = sum((a - b).abs().sum() for a, b in zip(zero, alone, strict=True))
    moved = sum((a - b).abs().sum() for a, b in zip(alone, net().parameters(), strict=True))
    assert 0 < apart < 0.05 * moved


@pytest.mark.parametrize("case", [*CHOSEN, *CODED], ids=case_id)
def test_state_is_divided_over_the_processes_and_counted_before_it_is_made(ranks, case):
    found = [counted for _, counted in (found[str(case)] for found in ranks)]
    parameters = len(list(net().parameters()))
    assert [each["held"] for each in found] == [each["declared"] for each in found]
    begun = 8 if is_in_codes(case) else 4  # bytes: a step count, and scales of a block that is cut in two
    repeated = bytes_alike(*(each["kept by rows"] for each in found))
    assert repeated <= 4 * MATRICES / WORLD / 4, "a quarter of what a process has of the matrices"
    extra = 4 * parameters + begun * parameters + repeated
    assert sum(each["held"] for each in found) <= found[0]["whole"] + extra
    assert max(each["held"] for each in found) <= 0.62 * found[0]["whole"] + 4 * parameters + repeated


def bytes_alike(zero: dict, one: dict) -> int:
    """Of state that two processes have both, step counts apart."""
    return sum(
        tensor.nbytes
        for key, tensor in zero.items()
        if key[1] != "step" and tensor.shape == one[key].shape and torch.equal(tensor, one[key])
    )


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


def test_matrices_travel_once_to_their_owners_and_back_or_sums_of_their_columns_do(ranks):
    galore = str(OF_EACH["galore"][0])
    sent = sum(counted["sent"] for _, counted in (found[galore] for found in ranks))
    assert sent == STEPS * 3 * MATRICES // 2, (
        "gradient, weight and new weight of the half that the owner has not"
    )
    sinkgd, iterations = str(OF_EACH["sinkgd"][0]), 5
    for counted in (found[sinkgd][1] for found in ranks):
        assert counted["sent"] == 0
        assert counted["summed"] == STEPS * iterations * COLUMNS
    adamw = str(OF_EACH["adamw"][0])
    assert [counted["sent"] for _, counted in (found[adamw] for found in ranks)] == [0, 0]


def test_the_ratio_of_a_tensor_is_that_of_its_whole_first_gradient_also_where_a_process_has_none_of_it(three):
    """Four rows of three processes are 2, 2 and none."""
    case, shape = OF_THREE["sgd_sai 4 wide"]
    model = net(**shape)
    optimizer = optimizer_for(case, model)
    train(model, optimizer, batches(1, 1, rows=3))
    alone = [optimizer.state[param]["gsnr"] for group in optimizer.param_groups for param in group["params"]]
    for found in three:
        ratios = found["sgd_sai 4 wide"][1]["gsnr"]
        assert len(ratios) == len(alone)
        for ratio, expected in zip(ratios, alone, strict=True):
            assert ratio is None or ratio == pytest.approx(expected.item(), rel=1e-5)
    assert any(None in found["sgd_sai 4 wide"][1]["gsnr"] for found in three)


def test_pieces_on_the_host_travel_on_a_device_that_the_processes_talk_on():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for talks, found in (([cuda], cuda), ([cpu, cuda], cpu)):
        assert device_to_talk_on(cpu, SimpleNamespace(_device_types=talks)) == found
