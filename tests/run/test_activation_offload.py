"""Offloaded inputs of checkpointed layers: the same bits, few tensors on the device, copies waited for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem.memory.host_memory import SMALLEST_OFFLOADED_BYTES
from lowmem.run.activation_offload import SMALLEST_BYTES, OffloadedInputs
from lowmem.run.cuda_copies import CudaCopies

LAYERS, WIDTH = 6, 8


class LateCopies:
    """Stands for a device and a host. A copy is made only when it is waited for, and holds nonsense until then."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, ...]] = []
        self.fetched = 0
        self.on_host = 0
        self.most_on_host = 0

    def out(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        self.sent.append(tuple(tensor.shape))
        host = torch.full_like(tensor, float("nan"))
        self.on_host += 1
        self.most_on_host = max(self.most_on_host, self.on_host)
        weakref.finalize(host, self._gone)
        return host, partial(_copy, host, weakref.ref(tensor))

    def back(self, host: Tensor) -> tuple[Tensor, Callable[[], None]]:
        self.fetched += 1
        tensor = torch.full_like(host, float("nan"))
        return tensor, partial(_copy, tensor, weakref.ref(host))

    def _gone(self) -> None:
        self.on_host -= 1


def _copy(to: Tensor, from_: weakref.ref[Tensor]) -> None:
    source = from_()
    assert source is not None, "the source of a copy was given up before the copy was waited for"
    with torch.no_grad():
        to.copy_(source)


class Layer(nn.Module):
    """Knows how many of the layers' inputs were alive when it ran, and when it ran again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)) * mask)


def layers() -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleList(Layer() for _ in range(LAYERS))


def run(stack: nn.ModuleList, recompute: Callable[..., Tensor], *, rows: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(rows, WIDTH, generator=generator), torch.ones(2 * WIDTH)
    x = x * 1.0
    for layer in stack:
        x = recompute(layer, x, mask)
    return x.square().sum()


PLAIN = partial(checkpoint, use_reentrant=False)


def offloading(copies: LateCopies, **settings: object) -> Callable[..., Tensor]:
    offload = OffloadedInputs(copies, lambda tensor: True, **{"smallest_bytes": 1, **settings})
    return offload.around(PLAIN)


def gradients(stack: nn.ModuleList) -> list[Tensor]:
    return [param.grad for param in stack.parameters() if param.grad is not None]


def test_gradients_have_the_bits_of_a_run_without_over_several_micro_batches():
    with_offload, without = layers(), layers()
    recompute = offloading(LateCopies())
    for seed in range(3):
        run(with_offload, recompute, seed=seed).backward()
        run(without, PLAIN, seed=seed).backward()
    pairs = list(zip(gradients(with_offload), gradients(without), strict=True))
    assert len(pairs) == 4 * LAYERS
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_each_layers_input_goes_out_once_and_comes_back_once_but_for_the_newest_which_is_still_there():
    copies = LateCopies()
    run(layers(), offloading(copies)).backward()
    assert copies.sent == [(5, WIDTH)] * LAYERS
    assert copies.fetched == LAYERS - 1


def test_masks_that_all_layers_share_and_what_layers_save_stay():
    copies = LateCopies()
    stack = layers()
    run(stack, offloading(copies)).backward()
    assert (2 * WIDTH,) not in copies.sent
    assert len(copies.sent) == LAYERS  # recomputation saves much more, none of which leaves


def inputs_alive(stack: nn.ModuleList, recompute: Callable[..., Tensor]) -> tuple[list[int], list[int]]:
    """How many inputs of layers are alive when each layer begins, in forward and when it is computed again."""
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    counts: list[int] = []

    def begins(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        alive.add(args[0].untyped_storage())
        gc.collect()
        counts.append(len({storage._cdata for storage in alive}))

    hooks = [layer.register_forward_pre_hook(begins) for layer in stack]
    run(stack, recompute).backward()
    for hook in hooks:
        hook.remove()
    return counts[:LAYERS], counts[LAYERS:]


def test_in_forward_only_the_newest_input_is_held_and_without_offload_all_are():
    forward, backward = inputs_alive(layers(), offloading(LateCopies()))
    # The caller's own input of the first layer, the one before, and the one that begins.
    assert max(forward) <= 3
    assert max(backward) <= 3
    kept, _ = inputs_alive(layers(), PLAIN)
    assert kept[-1] == LAYERS


def test_the_host_holds_all_inputs_after_forward_and_none_after_backward():
    copies = LateCopies()
    loss = run(layers(), offloading(copies))
    assert copies.on_host == LAYERS
    loss.backward()
    del loss
    assert copies.on_host == 0
    assert copies.most_on_host == LAYERS


def test_a_graph_that_is_kept_can_be_walked_twice():
    with_offload, without = layers(), layers()
    for stack, recompute in ((with_offload, offloading(LateCopies())), (without, PLAIN)):
        loss = run(stack, recompute)
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(map(torch.equal, gradients(with_offload), gradients(without)))


def test_a_graph_that_is_dropped_with_copies_under_way_waits_for_them():
    waited: list[str] = []

    class Noted(LateCopies):
        def out(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
            host, wait = super().out(tensor)
            return host, lambda: (waited.append("out"), wait())[1]

    loss = run(layers(), offloading(Noted()))
    assert len(waited) == LAYERS - 1
    del loss
    assert len(waited) == LAYERS


def test_small_tensors_and_those_elsewhere_stay():
    copies = LateCopies()
    run(layers(), offloading(copies, smallest_bytes=5 * WIDTH * 4 + 1)).backward()
    elsewhere = OffloadedInputs(copies, lambda tensor: tensor.is_cuda, smallest_bytes=1)
    run(layers(), elsewhere.around(PLAIN)).backward()
    assert copies.sent == []
    run(layers(), offloading(copies, smallest_bytes=5 * WIDTH * 4)).backward()
    assert len(copies.sent) == LAYERS


def test_without_gradients_nothing_leaves():
    copies = LateCopies()
    with torch.no_grad():
        run(layers(), offloading(copies))
    assert copies.sent == []


def test_the_plan_and_the_run_mean_the_same_smallest_tensor():
    assert SMALLEST_BYTES == SMALLEST_OFFLOADED_BYTES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_bits_are_the_same_and_the_peak_is_lower():
    device = torch.device("cuda")
    found = []
    for recompute in (
        PLAIN,
        OffloadedInputs(CudaCopies(device), lambda tensor: tensor.is_cuda).around(PLAIN),
    ):
        stack = layers().to(device)
        torch.cuda.reset_peak_memory_stats()
        for seed in range(3):
            x = torch.randn(2**17, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device) * 1.0
            for layer in stack:
                x = recompute(layer, x, torch.ones(2 * WIDTH, device=device))
            x.square().sum().backward()
        found.append(([grad.cpu() for grad in gradients(stack)], torch.cuda.max_memory_allocated()))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert found[1][1] < found[0][1]
