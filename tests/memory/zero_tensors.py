"""What a process of DeepSpeed's ZeRO holds, counted, in one start of a launcher.

`python -m torch.distributed.run --nproc_per_node W -m tests.memory.zero_tensors STAGE FOLDER` writes the counts of each
process as JSON. One engine at a time: what its optimizer's attributes lead to is all that is counted.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowmem.run.layouts.attach import StepsInPieces, attach_to_zero
from lowmem.run.rehearsal import rehearse_on_cpu
from tests.memory.divided_nets import CASES, net, optimizer_for, storage_bytes
from tests.run.test_execution import batches

KINDS = ((torch.bfloat16, 1), (torch.float32, 2))
"""The weights' dtype, and micro-batches a step."""
CHOSEN = [
    case for case in CASES if case[0] in ("adamw", "adafactor", "galore", "q_galore", "block_adam", "swan")
]


def counted(case: Any, stage: int, dtype: torch.dtype, micro_batches: int) -> dict[str, int]:
    import deepspeed

    model = net(dtype)
    optimizer = optimizer_for(case, model)
    steps = attach_to_zero(optimizer)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    zero = engine.optimizer
    gradients: list[int] = []

    def step(outer: Any) -> None:
        gradients.append(storage_bytes(gradients_of(zero, stage)))
        steps(outer)

    optimizer.steps_in_pieces = step
    found = {}
    for number, ids in enumerate(batches(1, micro_batches)[0]):
        engine.backward(engine(ids))
        if stage == 1 and number == 0 and micro_batches > 1:
            found["gradients_in_backward"] = storage_bytes(param.grad for param in model.parameters())
        engine.step()
    found |= {"gradients": max(gradients), "weights": storage_bytes(weights_of(model, zero, stage))}
    return found | state_of(steps) | {"sent": steps.pieces.sent}


def weights_of(model: Any, zero: Any, stage: int) -> list[torch.Tensor]:
    own = list(model.parameters())
    if stage == 3:
        persistent = [param for param in own if param.ds_persist]
        assert all(param.numel() == param.ds_numel for param in persistent)
        return [*persistent, *(param.ds_tensor for param in own), *zero.fp32_partitioned_groups_flat]
    return [*own, *zero.bit16_groups_flat, *zero.single_partition_of_fp32_groups]


def gradients_of(zero: Any, stage: int) -> list[torch.Tensor]:
    lists = [each for each in zero.averaged_gradients.values() if each is not None]
    averaged = [grad for grads in lists for grad in grads]
    flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    shown = [flat.grad for flat in flats if flat.grad is not None]
    whole = [zero.grad_partitions_flat_buffer] if stage == 3 else []
    return [*averaged, *shown, *whole]


def state_of(steps: StepsInPieces) -> dict[str, int]:
    pieces = steps.pieces
    if all(group["algorithm"] != "block_adam" for group in pieces.param_groups):
        return {"state": storage_bytes(each for state in pieces.state.values() for each in state.values())}
    found = []
    for number in range(3):
        for group in pieces.param_groups:
            group["steps"] = number
        found.append(pieces.state_bytes())
    return {"state": max(found)}


def defaults() -> list[int | bool]:
    """DeepSpeed's own, where a configuration says nothing."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(stage=1)
    numels = [
        zero.reduce_bucket_size,
        zero.max_live_parameters,
        zero.param_persistence_threshold,
        zero.sub_group_size,
    ]
    return [*numels, zero.use_multi_rank_bucket_allreduce, zero.overlap_comm]


def main(stage: int, out: Path) -> None:
    torch.set_num_threads(1)
    rehearse_on_cpu(deepspeed=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    found = [[counted(case, stage, *kind) for kind in KINDS] for case in CHOSEN]
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    (out / "defaults.json").write_text(json.dumps(defaults()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
