"""Every way to make a step under data parallel training, against one process that sees all rows."""

from __future__ import annotations

import copy
import os
import pickle
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

from lowmem.memory.measure import TrackedMeter
from lowmem.optim import build_optimizer
from lowmem.run.refresh_owners import has_basis
from tests.optim.cases import CASES
from tests.run.test_execution import GALORE, Net, batches, execution_for, net, optimizer_for, train

WORLD = 2
COMBINATIONS = [
    (mode, case, micro_batches, clip)
    for case in (
        GALORE,
        ("adamw", {}),
        ("sgd_sai", {}),
        ("sgd", {"momentum": 0.9}),
        ("adafactor", {}),
        ("sinkgd", {}),
        ("frugal", {"refresh_every": 4, "residual": "sgd", "projection": "block"}),
        ("block_adam", {"refresh_every": 2, "order": "ascending"}),
    )
    for mode in ("plain", "project", "fused")
    for micro_batches in (1, 3)
    for clip in (None, "applied", "tensor")
    if not (mode == "project" and case is not GALORE) and not (mode == "fused" and clip == "applied")
]


RECOMPUTED = [
    (mode, case, 3, clip, "activation checkpointing")
    for mode, case, clip in (
        ("plain", GALORE, None),
        ("project", GALORE, "applied"),
        ("fused", GALORE, None),
        ("fused", ("sgd", {"momentum": 0.9}), None),
    )
]
BY_WHOLE_NORM = [("plain", case, 3, "full") for case in (GALORE, ("adamw", {}))]
IN_FLOAT64 = [
    ("plain", next(case for case in CASES if case[0] == name), micro_batches, "full")
    for name in ("adamw", "sgd_sai", "galore", "frugal", "swan", "sinkgd", "adafactor")
    for micro_batches in (1, 2)
]


def halves(step: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    return [ids[rank::WORLD] for ids in step]


def trained(combination, wrap, data, dtype=torch.float32):
    mode, case, micro_batches, clip, *also = combination
    model = net(dtype, recompute=bool(also))
    optimizer = optimizer_for(case, model)
    settings = {} if clip is None else {"clip": clip, "max_norm": 0.05}
    execution = execution_for(mode, optimizer, model, **settings)
    return train(wrap(model), optimizer, execution, data(batches(12, micro_batches)))


def is_the_same_when_resumed(mode: str, case, rank: int) -> bool:
    """After six of twelve steps; the basis of a loaded state is one that no refresh of this process has made."""
    data = [halves(step, rank) for step in batches(12, 2)]

    def begun():
        model = net()
        optimizer = optimizer_for(case, model)
        return model, optimizer, execution_for(mode, optimizer, model)

    model, optimizer, execution = begun()
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, execution, data[:6])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    whole = train(wrapped, optimizer, execution, data[6:])
    model, optimizer, execution = begun()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    rest = train(DistributedDataParallel(model), optimizer, execution, data[6:])
    return all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))


def gradient_bytes_held(mode: str, name: str, settings: dict, process: int) -> int:
    """At the fullest moment of a step; the least of several steps.

    When gloo's all_reduce returns, its thread may still hold the tensor for a moment: of bare calls one in six is
    alive afterwards without a Python object that refers to it. In a step of 50 calls that may make two.
    """
    torch.manual_seed(0)
    model = Net(depth=12, width=64)
    optimizer = build_optimizer(model, name, lr=1e-3, target=["mlp"], **settings)
    execution = execution_for(mode, optimizer, model)
    wrapped = DistributedDataParallel(model)
    micro_batches = 1 if name == "galore" else 2
    held = []
    for number, step in enumerate(batches(10, micro_batches)):
        meter = TrackedMeter(model)
        meter.watch(optimizer)
        with meter.step():
            for index, ids in enumerate(halves(step, process)):
                execution.begin_micro_batch(is_first=index == 0, is_last=index == micro_batches - 1)
                with meter.phase("forward"):
                    loss = wrapped(ids)
                with meter.phase("backward"):
                    loss.backward()
                del loss
            with meter.phase("optimizer"):
                execution.finish_backward()
                optimizer.step()
            model.zero_grad()
        if number > 0:
            held.append(meter.measured().parts["gradients"])
    return min(held)


RESUMED = [
    (mode, case)
    for case in (GALORE, ("q_galore", {"rank": 4, "refresh_every": 9}), ("adafactor", {}))
    for mode in ("plain", "project", "fused")
    if not (mode == "project" and case[0] == "adafactor")
]

SHARED = {
    "svd, kept": ("galore", {"rank": 4, "refresh_every": 3, "projection": "svd"}),
    "rotated, in bits": (
        "galore",
        {
            "rank": 4,
            "refresh_every": 3,
            "on_refresh": "rotate",
            "storage": {"moment": "int8", "variance": "bf16", "basis": "int4"},
        },
    ),
    "when they change": ("q_galore", {"rank": 4, "refresh_every": 2, "similarity_window": 2}),
    "split": ("frugal", {"projection": "svd", "density": 0.2, "refresh_every": 3}),
}


def shared_refreshes(case, rank: int) -> dict[str, object]:
    """Weights, how often this process has looked for a basis, and what each process' load is."""
    model = net()
    optimizer = optimizer_for(case, model)
    execution = execution_for("project" if case[0] == "galore" else "plain", optimizer, model)
    owners = optimizer.refresh_owners
    found = 0

    def counted(param, rule, ctx, find):
        def finding():
            nonlocal found
            found += 1
            return find()

        return owners(param, rule, ctx, finding if optimizer_has_basis(rule, param) else find)

    optimizer.refresh_owners = counted
    data = [halves(step, rank) for step in batches(8, 1)]
    weights = train(DistributedDataParallel(model), optimizer, execution, data)
    return {"weights": weights, "found": found, "sent": owners.sent}


def optimizer_has_basis(rule, param) -> bool:
    return has_basis(rule, tuple(param.shape))


HELD = {
    "project": ("galore", {"rank": 4}),
    "fused": ("galore", {"rank": 4}),
    "fused, added to the momentum": ("sgd", {"momentum": 0.9}),
}


def work(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        found = {
            str(combination): trained(
                combination, DistributedDataParallel, lambda data: [halves(step, rank) for step in data]
            )
            for combination in (*COMBINATIONS, *RECOMPUTED, *BY_WHOLE_NORM)
        }
        found |= {
            f"{combination} in float64": trained(
                combination,
                DistributedDataParallel,
                lambda data: [halves(step, rank) for step in data],
                torch.float64,
            )
            for combination in IN_FLOAT64
        }
        held = {
            way: gradient_bytes_held(way.split(",")[0], name, settings, rank)
            for way, (name, settings) in HELD.items()
        }
        resumed = {str(way): is_the_same_when_resumed(*way, rank) for way in RESUMED}
        shared = {name: shared_refreshes(case, rank) for name, case in SHARED.items()}
        Path(out, f"{rank}.pickle").write_bytes(pickle.dumps((found, held, resumed, shared)))
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


@pytest.mark.parametrize("combination", [*COMBINATIONS, *RECOMPUTED, *BY_WHOLE_NORM], ids=str)
def test_two_processes_make_the_steps_of_one(ranks, combination):
    alone = trained(combination, lambda model: model, lambda data: data)
    zero, one = (found[str(combination)] for found, *_ in ranks)
    assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True)), "the processes agree to the bit"
    assert max((a - b).abs().max().item() for a, b in zip(zero, alone, strict=True)) < 2e-5


@pytest.mark.parametrize("combination", IN_FLOAT64, ids=str)
def test_in_float64_two_processes_make_the_steps_of_one_to_1e_9(ranks, combination):
    alone = trained(combination, lambda model: model, lambda data: data, torch.float64)
    for found, *_ in ranks:
        pairs = zip(found[f"{combination} in float64"], alone, strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-9


@pytest.mark.parametrize("way", RESUMED, ids=str)
def test_two_processes_go_on_from_a_loaded_state_with_the_same_bits(ranks, way):
    assert [resumed[str(way)] for _, _, resumed, _ in ranks] == [True] * WORLD


@pytest.mark.parametrize("name", SHARED)
def test_each_basis_is_found_by_one_process_and_is_that_of_one_process_alone(ranks, name):
    case = SHARED[name]
    zero, one = (shared[name] for *_, shared in ranks)
    assert all(torch.equal(a, b) for a, b in zip(zero["weights"], one["weights"], strict=True))

    model = net()
    optimizer = optimizer_for(case, model)
    execution = execution_for("project" if case[0] == "galore" else "plain", optimizer, model)
    looked = 0

    def counted(param, rule, ctx, find):
        nonlocal looked
        looked += optimizer_has_basis(rule, param)
        return find(), False

    optimizer.refresh_owners = counted
    alone = train(model, optimizer, execution, batches(8, 1))
    bound = 2e-2 if "bits" in name else 2e-5  # sums in another order, rounded into few bits
    assert max((a - b).abs().max().item() for a, b in zip(zero["weights"], alone, strict=True)) < bound
    assert looked > 8
    assert zero["found"] + one["found"] == looked
    assert abs(zero["found"] - one["found"]) <= looked / 4
    assert zero["sent"] > 0 < one["sent"]


def test_one_layers_gradient_at_a_time_is_alive_and_the_reducer_gives_none_back(ranks):
    matrix, others = 64 * 128 * 4, 11 * 64 * 4 + 12 * (2 * 64 + 128) * 4
    accumulators = 24 * 4 * 128 * 4
    for _, held, *_ in ranks:
        assert held["fused"] <= matrix + 512 * 4
        assert held["fused, added to the momentum"] <= matrix + 512 * 4
        assert held["project"] <= accumulators + others + matrix + 512 * 100
