"""What a process saves of an optimizer in pieces, and how it is known again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem.errors import RefusedError
from lowmem.run.layouts.piece_optimizer import PieceOptimizer


def file_name(rank: int, processes: int) -> str:
    return f"optimizer-{rank}-of-{processes}.pt"


def saved_pieces(pieces: PieceOptimizer) -> dict[str, Any]:
    """Tensors, numbers and strings only: state, where the pieces lie, and weights that nobody else keeps."""
    return {"places": _places(pieces), "state": pieces.state_dict(), "weights": own_weights(pieces)}


def load_pieces_(pieces: PieceOptimizer, saved: dict[str, Any]) -> None:
    """Raises RefusedError for what another number of processes, or another strategy, has saved."""
    if saved["places"] != _places(pieces):
        raise RefusedError(
            "the optimizer's state was saved with its parameters divided in another way: by another number of "
            "processes, another strategy, or of another model. Continue with the launch that saved it."
        )
    pieces.load_state_dict(saved["state"])
    own = own_weights(pieces)
    for name, value in saved["weights"].items():
        own[name].copy_(value)


def _places(pieces: PieceOptimizer) -> dict[str, Any]:
    found = {piece.name: [list(each) for each in piece.ranges] for piece in pieces.all_pieces()}
    return {
        "rank": pieces.rank,
        "processes": pieces.processes,
        "ranges": found,
        "by_rows": pieces.by_rows(),
    }


def own_weights(pieces: PieceOptimizer) -> dict[str, Tensor]:
    """This process' pieces, by name, in a layout that keeps finer weights than the model has."""
    if not pieces.layout.keeps_finer_weights:
        return {}
    return {piece.name: piece.weight() for piece in pieces.all_pieces()}
