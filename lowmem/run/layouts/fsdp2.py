"""FSDP2: every parameter is a DTensor of which a process has some rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lowmem.errors import RefusedError
from lowmem.run.layouts.pieces import Piece


class RowShards:
    """Parameters and gradients that `torch.distributed.fsdp.fully_shard` has cut by rows, as torch.chunk does."""

    always_has_gradients = False
    keeps_finer_weights = False

    def __init__(self, names: dict[int, str]):
        """names: of the parameters, by the id of the DTensor."""
        self._names = names

    def pieces_of(self, param: Tensor) -> Sequence[Piece]:
        name = self._names[id(param)]
        if not isinstance(param, DTensor):
            raise RefusedError(
                f"{name} is not sharded, and others are. FSDP2 must wrap the whole model: apply fully_shard to the "
                "root module last."
            )
        if param.device_mesh.ndim != 1 or tuple(param.placements) != (Shard(0),):
            raise RefusedError(
                f"{name} is placed as {tuple(param.placements)} on a mesh of {param.device_mesh.ndim} dimensions. Only "
                "FSDP2 by rows over one dimension is supported: no tensor parallel, no hybrid sharding."
            )
        rows, processes = param.shape[0], param.device_mesh.size()
        row = param.numel() // max(1, rows)
        step = -(-rows // processes)
        ranges = tuple(
            (min(rank * step, rows) * row, min((rank + 1) * step, rows) * row) for rank in range(processes)
        )

        def grad() -> Tensor | None:
            found = param.grad
            return None if found is None else _local(found).reshape(-1)

        piece = Piece(name, tuple(param.shape), ranges, lambda: _local(param.detach()).view(-1), grad)
        found, expected = piece.weight().numel(), piece.numel_at(param.device_mesh.get_local_rank())
        assert found == expected, (
            f"{name}: this process has {found} values where torch.chunk gives {expected}"
        )
        return [piece]


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
