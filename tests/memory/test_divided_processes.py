"""What each process is said to hold and to send, against what processes hold and send."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lowmem.memory import divided_exchange
from lowmem.memory.divided_buffers import BUCKET_NUMEL, LIVE_NUMEL
from lowmem.memory.divided_pieces import SUB_GROUP_NUMEL, padded_rows
from lowmem.memory.divided_tensors import PERSISTENT_NUMEL
from lowmem.memory.divided_traffic import strategy_sent_values
from lowmem.run.layouts import exchange, piece_optimizer
from lowmem.run.layouts.fsdp2 import RowShards
from lowmem.run.layouts.piece_optimizer import PieceOptimizer
from tests.memory import zero_tensors
from tests.memory.divided_nets import (
    CASES,
    by_formula,
    case_id,
    net,
    optimizer_for,
    parameters_of,
    shown_of,
    storage_bytes,
)
from tests.run.test_execution import batches

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.prefix, "deepspeed")
COLLECTIVES = (
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)
"""FSDP2's, under the names of torch 2.13 and before."""
KINDS = {2: (torch.float32, 2), 3: (torch.bfloat16, 1)}
"""What is trained by how many processes: the weights' dtype and micro-batches a step."""


def in_rows(case, mesh, dtype):
    model = net(dtype)
    optimizer = optimizer_for(case, model)
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group, own in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [sharded[name] for name in own]
    layout = RowShards({id(param): name for name, param in sharded.items()})
    tensors = [group["params"] for group in optimizer.param_groups]
    pieces = PieceOptimizer(optimizer.param_groups, tensors, layout, mesh.get_group())
    optimizer.steps_in_pieces = pieces.step_for
    return model, optimizer, pieces


def counted(case, mesh, dtype, micro_batches: int) -> dict[str, int]:
    model, optimizer, pieces = in_rows(case, mesh, dtype)
    found = {"weights": storage_bytes(param._local_tensor for param in model.parameters())}
    [step] = batches(1, micro_batches)
    for number, ids in enumerate(step):
        model(ids).backward()
        if number == 0:
            found["gradients_in_backward"] = storage_bytes(gradients(model))
    found["gradients"] = storage_bytes(gradients(model))
    optimizer.step()
    found["sent"], found["summed"] = pieces.sent, pieces.summed
    found["state"] = storage_bytes(each for state in pieces.state.values() for each in state.values())
    if any(group["algorithm"] == "block_adam" for group in optimizer.param_groups):
        found["state"] = max(turn_bytes(pieces))
    return found


def turn_bytes(pieces: PieceOptimizer) -> list[int]:
    """Of the turns that all blocks have once, by declaration: what a turn made goes at its end."""
    found = []
    for number in range(3):
        for group in pieces.param_groups:
            group["steps"] = number
        found.append(pieces.state_bytes())
    return found


def gradients(model):
    """Divided, or where they are not reduced yet, whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for param in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                if param.sharded_param.grad is not None:
                    yield param.sharded_param.grad._local_tensor
                if hasattr(param, "_unsharded_param") and param._unsharded_param.grad is not None:
                    yield param._unsharded_param.grad


def whole_until_the_last_micro_batch(mesh) -> tuple[int, int]:
    """Bytes of gradients after a micro-batch that is not reduced, and of all gradients."""
    model, _, _ = in_rows(CASES[0], mesh, torch.float32)
    model.set_requires_gradient_sync(False)
    model(batches(1, 1)[0][0]).backward()
    return storage_bytes(gradients(model)), 4 * sum(param.numel() for param in model.parameters())


def sent_by_fsdp2(mesh, micro_batches: int) -> tuple[int, int]:
    """Values that a ring sends from a process in a step's collectives, and what the formula says of them."""
    model, _, _ = in_rows(CASES[0], mesh, torch.float32)
    sent = []

    def counting(collective):
        def call(*args, **kwargs):
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            divided = min(
                tensor.numel() for tensor in tensors
            )  # what goes in of a gather, or comes out of a reduction
            sent.append(divided * (mesh.size() - 1))
            return collective(*args, **kwargs)

        return call

    kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    try:
        for name, collective in kept.items():
            setattr(dist, name, counting(collective))
        for ids in batches(1, micro_batches)[0]:
            model(ids).backward()
    finally:
        for name, collective in kept.items():
            setattr(dist, name, collective)
    padded = {
        each.name: mesh.size() * padded_rows(each.shape, mesh.size())
        for each in parameters_of(net(torch.float32))
    }
    tail = sum(numel for name, numel in padded.items() if "blocks" not in name)
    numel = sum(padded.values())
    return sum(sent), strategy_sent_values("fsdp2", numel, mesh.size(), micro_batches, tail=tail)


def batches_of_matrices(mesh) -> tuple[int, int]:
    """How often matrices came together in a step, where few may at one time, and how often it is said that they do."""
    case, numel = ("muon", {}), 1000
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exchange, "BATCH_NUMEL", numel)
        patched.setattr(divided_exchange, "BATCH_NUMEL", numel)
        made = []

        def counting(*given):
            made.append(exchange.Exchange(*given))
            return made[-1]

        patched.setattr(piece_optimizer, "Exchange", counting)
        model, optimizer, _ = in_rows(case, mesh, torch.float32)
        model(batches(1, 1)[0][0]).backward()
        optimizer.step()
        groups = shown_of(case, "fsdp2", mesh.size(), torch.float32)
        return len(made), sum(len(divided_exchange.batches(group)) for group in groups)


def work(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=max(KINDS))
    try:
        found = {}
        for world, kind in KINDS.items():
            mesh = DeviceMesh("cpu", list(range(world)))
            for case in CASES if rank < world else []:
                found[world, str(case)] = counted(case, mesh, *kind)
        found["not reduced"] = whole_until_the_last_micro_batch(mesh)
        found["batches"] = batches_of_matrices(mesh)
        found["sent"] = [sent_by_fsdp2(mesh, micro_batches) for micro_batches in (1, 2)]
        Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(work, args=(port, str(out)), nprocs=max(KINDS))
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(max(KINDS))]


@pytest.mark.parametrize("world", KINDS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_processes_of_fsdp2_hold_and_send_what_the_formulas_say(ranks, case, world):
    expected = by_formula(case, "fsdp2", world, *KINDS[world])
    assert [ranks[rank][world, str(case)] for rank in range(world)] == expected


def test_gradients_that_wait_to_be_reduced_would_be_whole_in_every_process(ranks):
    """Why recipes have them reduced in each micro-batch."""
    for found in ranks:
        waiting, whole = found["not reduced"]
        assert waiting == whole


def test_fsdp2_gathers_twice_and_reduces_once_in_each_micro_batch(ranks):
    """The root, which stays whole from forward to backward, is gathered once."""
    for found in ranks:
        for counted_values, expected in found["sent"]:
            assert counted_values == expected


def test_matrices_come_together_as_often_as_it_is_said(ranks):
    for found in ranks:
        made, expected = found["batches"]
        assert made == expected > 1


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="needs DeepSpeed beside the environment")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_processes_of_zero_hold_and_send_what_the_formulas_say(tmp_path, stage, world):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--standalone"]
    path = os.pathsep.join([str(ROOT), str(DEEPSPEED), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-m", "tests.memory.zero_tensors", str(stage), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    constants = json.loads((tmp_path / "defaults.json").read_text())
    assert constants == [BUCKET_NUMEL, LIVE_NUMEL, PERSISTENT_NUMEL, SUB_GROUP_NUMEL, True, False]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for number, case in enumerate(zero_tensors.CHOSEN):
        for kind, (dtype, micro_batches) in enumerate(zero_tensors.KINDS):
            expected = by_formula(case, f"zero{stage}", world, dtype, micro_batches)
            for rank in range(world):
                found = ranks[rank][number][kind]
                assert found == {name: expected[rank][name] for name in found}, (case, dtype, rank)
