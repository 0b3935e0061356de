"""Every optimizer under DeepSpeed's ZeRO, in one start of a launcher.

`python -m torch.distributed.run --nproc_per_node 2 -m tests.run.zero_steps STAGE FILE [host]` writes, for each, the
largest difference to one process and the distance that the weights moved, as JSON. With `host` DeepSpeed keeps the
state on the host.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lowmem.optim.registry import OPTIMIZERS
from lowmem.run.layouts.attach import attach_to_zero
from lowmem.run.rehearsal import rehearse_on_cpu
from tests.optim.cases import cases_in_float
from tests.run.test_execution import batches, net, optimizer_for

CHOSEN = [cases_in_float(name)[0] for name in OPTIMIZERS]
MICRO_BATCHES, MAX_NORM = 2, 0.05


def alone(case) -> dict[str, torch.Tensor]:
    model = net()
    optimizer = optimizer_for(case, model)
    for step in batches(8, MICRO_BATCHES):
        for ids in step:
            (model(ids) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def divided(case, stage: int, *, on_host: bool) -> dict[str, torch.Tensor]:
    import deepspeed

    rank, processes = dist.get_rank(), dist.get_world_size()
    model = net()
    optimizer = optimizer_for(case, model)
    attach_to_zero(optimizer)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu" if on_host else "none"}},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    for step in batches(8, MICRO_BATCHES):
        for ids in step:
            engine.backward(engine(ids[rank::processes]))
            engine.step()
    gathered = list(model.parameters()) if stage == 3 else []
    with deepspeed.zero.GatheredParameters(gathered):
        found = {name: param.detach().clone() for name, param in model.named_parameters()}
    engine.destroy()
    return found


def main(stage: int, out: Path, *, on_host: bool) -> None:
    torch.set_num_threads(1)
    rehearse_on_cpu(deepspeed=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    start = dict(net().named_parameters())
    found = {}
    for case in CHOSEN:
        ours, expected = divided(case, stage, on_host=on_host), alone(case)
        moved = max((expected[name] - start[name]).abs().max().item() for name in expected)
        furthest = max((expected[name] - ours[name]).abs().max().item() for name in expected)
        found[case[0]] = {"furthest": furthest, "moved": moved}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), on_host="host" in sys.argv[3:])
