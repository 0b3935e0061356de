"""Time one optimizer step against the peers' on this machine, and the refresh of a basis against a full SVD.

    python scripts/bench_step.py [--json] [--size 4096] [--rank 128] [--repeat 5]

Needs the extra [peers] (galore-torch, sgd-sai). One thread, process time, minimum over the repeats; ours
and the peer's are timed in turn, so a ratio holds where the machine's speed drifts. On one line each:
our milliseconds, the peer's, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.numerics.linalg import leading_subspace, top_singular_vectors
from lowmem.optim import SGD, AdamW, GaLore, SGDSaI


def matrix_with_slow_spectrum(size: int, generator: torch.Generator) -> Tensor:
    """A gradient whose singular values fall slowly, sigma_k ~ k^-1/2 over a quarter of the size: hard to compress."""
    k = size // 8
    left = torch.linalg.qr(torch.randn(size, k, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(size, k, generator=generator)).Q
    return (left * torch.arange(1, k + 1).float().rsqrt()) @ right.mT


def cpu_ms(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


def pair(ours: Callable[[], object], peer: Callable[[], object], repeat: int) -> dict[str, float]:
    """Minimum CPU milliseconds of both, timed in turn after one call each, and their ratio."""
    ours(), peer()
    times = [(cpu_ms(ours), cpu_ms(peer)) for _ in range(repeat)]
    our_ms, peer_ms = (min(column) for column in zip(*times, strict=True))
    return {"ours_ms": round(our_ms, 2), "peer_ms": round(peer_ms, 2), "ratio": round(our_ms / peer_ms, 3)}


def stepping(make: Callable[[torch.nn.Parameter], torch.optim.Optimizer], grad: Tensor) -> Callable[[], None]:
    """A function that makes one step on a parameter of the gradient's shape, warmed up by two."""
    param = torch.nn.Parameter(torch.zeros_like(grad))
    optimizer = make(param)

    def step() -> None:
        param.grad = grad
        optimizer.step()

    step(), step()
    return step


def energy(G: Tensor, P: Tensor) -> float:
    """||P^T G||^2 / ||G||^2"""
    return float((P.mT @ G).square().sum() / G.square().sum())


def peer_galore(param: torch.nn.Parameter, rank: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    group = {"params": [param], "rank": rank, "update_proj_gap": 10**9, "scale": 1.0, "proj_type": "std"}
    return GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True)


def peer_sgd_sai(param: torch.nn.Parameter) -> torch.optim.Optimizer:
    from sgd_sai import SGD_sai

    return SGD_sai([param], lr=1e-3, weight_decay=0.0)


def measure(size: int, rank: int, repeat: int) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    G = matrix_with_slow_spectrum(size, generator)
    results = {}

    ours = stepping(lambda p: GaLore([p], lr=1e-3, rank=rank, refresh_every=10**9), G)
    results["galore step / galore-torch step"] = pair(
        ours, stepping(lambda p: peer_galore(p, rank), G), repeat
    )

    ours = stepping(lambda p: SGDSaI([p], lr=1e-3, weight_decay=0.0), G)
    results["sgd_sai step / sgd-sai step"] = pair(ours, stepping(peer_sgd_sai, G), repeat)

    for name, mine, peer in (
        ("adamw", AdamW, lambda p: torch.optim.AdamW([p], lr=1e-3, fused=True)),
        ("sgd", SGD, lambda p: torch.optim.SGD([p], lr=1e-3, fused=True)),
    ):
        ours = stepping(lambda p, mine=mine: mine([p], lr=1e-3), G)
        results[f"{name} step / torch fused {name} step"] = pair(ours, stepping(peer, G), repeat)

    bases = {}

    def refresh(kind: str, start: Tensor | None) -> Callable[[], None]:
        def fit() -> None:
            bases[kind] = leading_subspace(G, rank, start=start, generator=torch.Generator().manual_seed(1))

        return fit

    exact: dict[str, Tensor] = {}

    def full_svd() -> None:
        exact["basis"] = top_singular_vectors(G, rank)

    svd_ms = cpu_ms(full_svd)
    best = energy(G, exact["basis"])
    noisy = torch.linalg.qr(exact["basis"] + 0.3 / size**0.5 * torch.randn(size, rank, generator=generator)).Q
    for kind, start in (("cold", None), ("warm", noisy)):
        fit = refresh(kind, start)
        fit()
        our_ms = min(cpu_ms(fit) for _ in range(repeat))
        results[f"{kind} refresh / full SVD"] = {
            "ours_ms": round(our_ms, 1),
            "peer_ms": round(svd_ms, 1),
            "ratio": round(our_ms / svd_ms, 4),
            "energy_of_svd": round(energy(G, bases[kind]) / best, 4),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(arguments.size, arguments.rank, arguments.repeat)
    conditions = {
        "size": arguments.size,
        "rank": arguments.rank,
        "threads": 1,
        "dtype": "float32",
        "torch": torch.__version__,
    }
    if arguments.json:
        print(json.dumps({"conditions": conditions, "results": results}, indent=1))
        return
    print(
        f"{arguments.size} x {arguments.size}, rank {arguments.rank}, float32, one thread, torch {torch.__version__}"
    )
    for name, row in results.items():
        tail = f"  energy {row['energy_of_svd']:.4f} of the SVD's" if "energy_of_svd" in row else ""
        print(
            f"{name:40s} {row['ours_ms']:10.1f} ms {row['peer_ms']:10.1f} ms  ratio {row['ratio']:.4f}{tail}"
        )


if __name__ == "__main__":
    main()
