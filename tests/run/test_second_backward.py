"""What fused and project do with a gradient cannot be done again: one backward pass a micro-batch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lowmem.errors import RefusedError
from lowmem.run.second_backward import explained
from tests.run.test_execution import GALORE, Net, batches, execution_for, net, optimizer_for, run, train

IDS, OTHER_IDS = batches(1, 2)[0]
freeing = pytest.mark.parametrize("mode", ["project", "fused"])


def begun(mode, model, case=GALORE):
    optimizer = optimizer_for(case, model)
    execution = execution_for(mode, optimizer, model)
    execution.begin_micro_batch(is_first=True, is_last=True)
    return execution


@freeing
def test_a_second_forward_and_backward_in_a_micro_batch_are_refused(mode):
    model = net()
    execution = begun(mode, model)
    model(IDS).backward()
    with pytest.raises(
        RefusedError, match=rf"arrived twice in one micro-batch, and train.execution: {mode}.*plain"
    ):
        model(OTHER_IDS).backward()
    execution.finish_backward()


@freeing
def test_a_retained_graph_is_refused_and_never_gone_through_silently(mode):
    model = net()
    execution = begun(mode, model)
    loss = model(IDS)
    loss.backward(retain_graph=True)
    moved = [param.detach().clone() for param in model.parameters()]
    with pytest.raises((RefusedError, RuntimeError)) as caught:
        loss.backward()
    found = caught.value if isinstance(caught.value, RefusedError) else explained(caught.value, mode)
    assert "backward" in str(found)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), moved, strict=True)), (
        "nothing moved twice"
    )
    execution.finish_backward()


def test_an_error_of_another_kind_is_not_explained_away():
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "fused") is None
    assert explained(RuntimeError("modified by an inplace operation"), "project") is None


def test_plain_steps_add_up_what_several_backward_passes_give():
    model, once = net(), net()
    execution = begun("plain", model)
    loss = model(IDS)
    loss.backward(retain_graph=True)
    loss.backward()
    execution.finish_backward()
    (2 * once(IDS)).backward()
    for ours, theirs in zip(model.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@freeing
@pytest.mark.parametrize("together", ["a sum", "a list"])
def test_several_losses_in_one_backward_pass_make_the_steps_of_plain(mode, together):
    def trained(mode):
        model = net()
        optimizer = optimizer_for(GALORE, model)
        execution = execution_for(mode, optimizer, model)
        for first, second in batches(6, 2):
            execution.begin_micro_batch(is_first=True, is_last=True)
            losses = [model(first), 0.3 * model(second)]
            if together == "a sum":
                sum(losses).backward()
            else:
                torch.autograd.backward(losses)
            execution.finish_backward()
            optimizer.step()
            model.zero_grad()
        return list(model.parameters())

    for ours, theirs in zip(trained(mode), trained("plain"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


class Reentrant(Net):
    """Blocks recomputed in a backward pass inside the backward pass."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return torch.nn.functional.cross_entropy(self.logits(x), ids.roll(-1, 1).flatten())

    def logits(self, x):
        return (x @ self.embed.weight.T).flatten(0, 1)


def reentrant() -> Reentrant:
    torch.manual_seed(0)
    return Reentrant()


@freeing
def test_reentrant_checkpointing_makes_the_steps_of_none(mode):
    data = batches(8, 2)
    model = reentrant()
    optimizer = optimizer_for(GALORE, model)
    found = train(model, optimizer, execution_for(mode, optimizer, model), data)
    for ours, theirs in zip(found, run(mode, GALORE, data), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@freeing
def test_a_weight_shared_between_reentrant_layers_is_refused(mode):
    """Its gradient arrives once for each layer, so the first would move the weight under the second."""
    model = reentrant()
    model.blocks[2] = model.blocks[0]
    execution = begun(mode, model)
    with pytest.raises(RefusedError, match="use_reentrant=False"):
        model(IDS).backward()
    assert execution.frees_gradients


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch._dynamo's own
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch._inductor's own
@freeing
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layers_compiled_one_by_one_make_the_steps_of_plain(mode, backend):
    def trained(mode):
        model = net()
        for block in model.blocks:
            block.compile(backend=backend)
        optimizer = optimizer_for(GALORE, model)
        return train(model, optimizer, execution_for(mode, optimizer, model), batches(4, 1))

    torch._dynamo.reset()
    for ours, theirs in zip(trained(mode), run("plain", GALORE, batches(4, 1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if backend == "inductor" else 1e-6)
