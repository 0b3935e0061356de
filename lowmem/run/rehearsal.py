"""A cluster run rehearsed on a machine without accelerators.

Accelerate enables FSDP and DeepSpeed where it finds an accelerator, and quietly trains unsharded copies where it finds
none. Here it is told that processes on a CPU, which talk through gloo, are such a place. What runs then is its real
code path and the libraries' own; only NCCL and the kernels of a GPU are not rehearsed.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def rehearse_on_cpu(*, deepspeed: bool) -> None:
    """Let Accelerate shard over processes on CPUs; to be called before anything of Accelerate's has state."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def backend_of_cpus(
        self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
    ) -> tuple[str | None, DistributedType]:
        if int(os.environ.get("LOCAL_RANK", "-1")) == -1:
            return None, DistributedType.NO
        if deepspeed:
            return "gloo", DistributedType.MULTI_CPU  # Accelerate makes DEEPSPEED of it
        self.device = torch.device("cpu")
        return "gloo", DistributedType.MULTI_GPU  # it makes FSDP of it

    PartialState._prepare_backend = backend_of_cpus
    if deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed as library

        # Without this it compiles an extension at each start, for minutes; killed meanwhile, it waits for ever after.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
