"""What a process sends in a step beside the matrices of the optimizer, by strategy, in values. Imports no torch.

A collective over W processes that ends with n values is taken at what each sends to its neighbour in a ring: all-gather
and reduce-scatter W - 1 parts of n / W values, all-reduce one after the other. NCCL may go other ways. With N trained
values and M micro-batches:

    ddp      all-reduce N, in the last micro-batch; with execution project what gradients are projected to instead, but
             in a step with a refresh
    fsdp2    all-gather N twice a micro-batch, head and last norm once; reduce-scatter N in each micro-batch
    zero1    all-reduce N, after the last micro-batch; all-gather N after the step
    zero2    all-reduce N in each micro-batch; all-gather N after the step
    zero3    all-gather N twice and reduce-scatter N in each micro-batch; at most, since what is soon needed again stays

ZeRO-1 and 2 could reduce-scatter (Rajbhandari et al., "ZeRO", arXiv:1910.02054: 2 N in all). DeepSpeed 0.19.8
all-reduces its buckets by default (`use_multi_rank_bucket_allreduce` in stage_1_and_2.py), which is counted here.
"""

from __future__ import annotations

from lowmem.memory.divided_pieces import Strategy


def moved_values(strategy: Strategy, numel: int, micro_batches: int, *, tail: int = 0) -> int:
    """n (W - 1) / W of which a process sends in a step: this is n.

    numel: of all trained values. tail: those of FSDP2's last unit, which stay whole from forward to backward.
    """
    if strategy == "ddp":
        return 2 * numel
    if strategy == "fsdp2":
        return micro_batches * (3 * numel - tail)
    if strategy == "zero3":
        return 3 * micro_batches * numel
    return (1 if strategy == "zero1" else micro_batches) * 2 * numel + numel


def strategy_sent_values(
    strategy: Strategy, numel: int, processes: int, micro_batches: int, *, tail: int = 0
) -> int:
    """Values that a process sends in a step."""
    moved = moved_values(strategy, numel, micro_batches, tail=tail)
    return round(moved * (processes - 1) / processes)
