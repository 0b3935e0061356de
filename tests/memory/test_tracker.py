from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem.memory.measure import TrackedMeter
from lowmem.memory.owners import owned_tensors
from lowmem.memory.tracker import ByteTracker
from tests.memory.small_training import (
    HIDDEN,
    INPUTS,
    NUM_PARAMETERS,
    NUM_TENSORS,
    OUTPUTS,
    batch,
    exact_tracker,
    network,
    train_step,
)

FLOAT = 4


def no_owners() -> list:
    return []


def peak_of(work, *, round_to: int = 1) -> int:
    tracker = ByteTracker(no_owners, round_to=round_to)
    with tracker:
        work()
    return tracker.fullest().peak_bytes


# ------------------------------------------------------------------ single tensors


def test_a_tensor_counts_while_it_lives_and_not_after():
    def work():
        torch.empty(1000)
        torch.empty(3000)  # the first is gone
        a = torch.empty(500)
        b = torch.empty(700)
        del a, b

    assert peak_of(work) == 3000 * FLOAT


def test_views_detached_and_in_place_results_count_once():
    def work():
        a = torch.empty(100, 10, requires_grad=True)
        kept = [a.view(1000), a.detach(), a[3:], a.t(), a.data, a.detach().add_(1), a.unbind(0)]
        del kept

    assert peak_of(work) == 1000 * FLOAT


def test_a_small_view_keeps_its_whole_storage_counted():
    def work():
        view = torch.empty(1000)[:1]
        other = torch.empty(10)
        del view, other

    assert peak_of(work) == 1010 * FLOAT


def test_a_storage_held_only_by_autograd_stays_counted():
    weight = torch.ones(1000, requires_grad=True)
    tracker = ByteTracker(no_owners, round_to=1)
    with tracker:
        result = (weight * 2).exp().sum()  # exp saves its result, nothing in Python holds it
        gc.collect()
        torch.empty(5000)
        result.backward()
    weight_and_saved = 2 * 1000 * FLOAT
    assert tracker.fullest().peak_bytes == weight_and_saved + FLOAT + 5000 * FLOAT


def test_sizes_are_rounded_up_to_512_bytes_by_default():
    def work():
        tensors = [torch.empty(1), torch.empty(128), torch.empty(129), torch.empty(0)]
        del tensors

    assert peak_of(work, round_to=512) == 512 + 512 + 1024 + 0


def test_a_resized_storage_counts_with_its_new_size_from_then_on():
    def work():
        a = torch.empty(1000)
        a.untyped_storage().resize_(0)
        b = torch.empty(1200)
        del b
        a.untyped_storage().resize_(400 * FLOAT)
        c = torch.empty(900)
        del c, a

    assert peak_of(work) == 1300 * FLOAT


def test_a_tensor_that_grows_in_place_counts_with_its_new_size():
    def work():
        a = torch.empty(10)
        a.resize_(2000)
        out = torch.empty(0)
        torch.add(a, 1, out=out)

    assert peak_of(work) == 4000 * FLOAT


def test_resizing_is_untouched_after_the_tracker():
    before = torch.UntypedStorage.resize_
    with ByteTracker(no_owners):
        pass
    assert torch.UntypedStorage.resize_ is before


def test_a_tensor_made_from_python_numbers_is_new_and_not_a_resident():
    def work():
        torch.empty(1000)
        a = torch.tensor([1.0] * 300)
        del a

    assert peak_of(work) == 1000 * FLOAT


def test_a_tensor_from_before_counts_for_the_whole_step_wherever_it_is_first_used():
    before = torch.ones(1000)
    tracker = ByteTracker(no_owners, round_to=1)
    with tracker:
        torch.empty(5000)
        before.add_(1)
    assert tracker.fullest().peak_bytes == 6000 * FLOAT
    assert tracker.fullest().parts["other"] == 1000 * FLOAT


def test_sparse_gradients_count_their_indices_and_values():
    table = nn.Embedding(1000, 8, sparse=True)
    rows = torch.arange(20)
    tracker = ByteTracker(lambda: owned_tensors(table, None), round_to=1)
    with tracker:
        loss = table(rows).sum()
        with tracker.phase("backward"):
            loss.backward()
        torch.empty(100_000)
    assert tracker.fullest().parts["gradients"] == 20 * 8 + 20 * 8 * FLOAT


def test_a_layout_that_cannot_be_counted_is_said():
    dense = torch.ones(8, 8)
    tracker = ByteTracker(no_owners)
    with tracker:
        torch.ops.aten.to_mkldnn(dense)
    assert tracker.uncounted == {"the bytes of torch._mkldnn tensors cannot be counted"}


def test_many_short_lives_at_reused_addresses_are_told_apart():
    def work():
        for _ in range(500):
            a = torch.empty(64)
            b = a + 1
            del a
            c = b * 2
            del b, c

    assert peak_of(work) == 2 * 64 * FLOAT


# ------------------------------------------------------------------ a training step, counted by hand


@pytest.mark.parametrize("variant", ["fused", "foreach"])
def test_adamw_holds_two_states_and_foreach_one_more_copy_of_the_weights(variant):
    model, inputs = network(), batch(2)
    optimizer = torch.optim.AdamW(model.parameters(), **{variant: True})
    train_step(model, inputs, optimizer, exact_tracker(model))  # states exist
    tracker = exact_tracker(model, optimizer)
    with tracker:
        train_step(model, inputs, optimizer, tracker)
    fullest = tracker.fullest()
    parts = fullest.parts
    assert parts["weights"] == parts["gradients"] == NUM_PARAMETERS * FLOAT
    assert parts["optimizer_state"] == 2 * NUM_PARAMETERS * FLOAT + NUM_TENSORS * FLOAT
    assert parts["other"] == inputs.nbytes
    if variant == "foreach":  # the fullest moment is inside step(): the square roots of all second moments
        assert parts["temporary"] == NUM_PARAMETERS * FLOAT
        assert parts["activations"] == 0
    else:  # step() makes nothing, so it is the last product of backward, beside the loss and its gradient
        assert parts["temporary"] == 2 * HIDDEN * FLOAT + FLOAT
        assert parts["activations"] == FLOAT
    assert fullest.peak_bytes == sum(parts.values())


def test_state_that_is_created_in_the_first_step_counts_as_state():
    model, inputs = network(), batch(2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tracker = exact_tracker(model, optimizer)
    with tracker:
        train_step(model, inputs, optimizer, tracker)
    assert tracker.fullest().parts["optimizer_state"] == 2 * NUM_PARAMETERS * FLOAT + NUM_TENSORS * FLOAT


def test_activations_are_what_backward_needs_from_forward():
    rows = 4096
    model, inputs = network(), batch(rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = exact_tracker(model, optimizer)
    with tracker:
        train_step(model, inputs, optimizer, tracker)
    parts = tracker.fullest().parts
    # ReLU keeps its output, which the second layer needs too; nothing keeps the first layer's output.
    # The fullest moment is the ReLU's backward: what square kept is used up by then, the loss still there.
    relu_output, loss = rows * HIDDEN * FLOAT, FLOAT
    assert parts["activations"] == relu_output + loss
    gradient_of_relu_output = gradient_of_first_output = rows * HIDDEN * FLOAT
    gradient_of_loss = FLOAT
    assert parts["temporary"] == gradient_of_relu_output + gradient_of_first_output + gradient_of_loss
    assert parts["gradients"] == (HIDDEN * OUTPUTS + OUTPUTS) * FLOAT  # of the second layer only
    assert parts["other"] == inputs.nbytes
    assert parts["weights"] == NUM_PARAMETERS * FLOAT


def test_accumulation_keeps_one_gradient_and_drops_each_micro_batchs():
    model, inputs = network(), batch(2)
    tracker = exact_tracker(model)
    with tracker:
        for _ in range(3):
            with tracker.phase("forward"):
                loss = model(inputs).square().mean()
            with tracker.phase("backward"):
                loss.backward()
            del loss
    parts = tracker.fullest().parts
    assert parts["gradients"] == NUM_PARAMETERS * FLOAT
    # The largest gradient of a later micro-batch is added to the sum and dropped, beside small ones.
    assert INPUTS * HIDDEN * FLOAT <= parts["temporary"] < 1.2 * INPUTS * HIDDEN * FLOAT


def test_a_gradient_that_is_used_up_inside_backward_is_still_a_gradient():
    model, inputs = network(), batch(2)
    optimizers = {param: torch.optim.AdamW([param], fused=True) for param in model.parameters()}

    def update(param: torch.Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    tracker = exact_tracker(model)
    with tracker:
        loss = model(inputs).sum()
        with tracker.phase("backward"):
            loss.backward()
    assert tracker.fullest().parts["gradients"] == INPUTS * HIDDEN * FLOAT  # the largest, alone


def test_a_batch_made_inside_the_step_is_other():
    model = network()
    tracker = exact_tracker(model)
    with tracker:
        inputs = torch.zeros(8192, INPUTS)
        with tracker.phase("forward"):
            model(inputs)
    assert tracker.fullest().parts["other"] == inputs.nbytes


def test_buffers_are_weights_and_tied_weights_count_once():
    model = network()
    model.register_buffer("table", torch.zeros(1000))
    tied = nn.Linear(HIDDEN, OUTPUTS, bias=False)
    tied.weight = model[2].weight
    model.append(nn.Linear(OUTPUTS, HIDDEN)).append(tied)
    tracker = exact_tracker(model)
    with tracker:
        pass
    expected = NUM_PARAMETERS + 1000 + OUTPUTS * HIDDEN + HIDDEN
    assert tracker.fullest().parts["weights"] == tracker.fullest().peak_bytes == expected * FLOAT


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_reduces_activations_by_exactly_the_layers_it_drops(use_reentrant):
    rows, width, layers = 64, 32, 6

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            return self.down(torch.nn.functional.gelu(self.up(x)))

    def activations(checkpointed: bool) -> int:
        blocks = nn.ModuleList(Block() for _ in range(layers))
        x = torch.ones(rows, width, requires_grad=True)
        tracker = exact_tracker(blocks)
        with tracker:
            with tracker.phase("forward"):
                for block in blocks:
                    x = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
            del block
            torch.empty(10_000_000)  # makes the end of forward the fullest moment
            with tracker.phase("backward"):
                x.sum().backward()
        return tracker.fullest().parts["activations"]

    inner = 2 * rows * 4 * width * FLOAT  # the input and the result of gelu
    assert activations(False) - activations(True) == layers * inner


# ------------------------------------------------------------------ what a tracker must not do


def test_tracking_changes_no_bit_of_losses_and_weights():
    def run(tracked: bool) -> tuple[list[float], list[torch.Tensor]]:
        model, inputs = network(), batch(16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
        meter = TrackedMeter(model)
        meter.watch(optimizer)
        losses = []
        for _ in range(3):
            if tracked:
                with meter.step():
                    losses.append(train_step(model, inputs, optimizer, meter))
            else:
                losses.append(train_step(model, inputs, optimizer, meter))
        return losses, [param.detach().clone() for param in model.parameters()]

    losses, weights = run(tracked=False)
    tracked_losses, tracked_weights = run(tracked=True)
    assert losses == tracked_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, tracked_weights, strict=True))


def test_two_runs_count_the_same_bytes():
    def run():
        model, inputs = network(), batch(100)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        meter = TrackedMeter(model)
        meter.watch(optimizer)
        for _ in range(2):
            with meter.step():
                train_step(model, inputs, optimizer, meter)
        return meter.measured()

    assert run() == run()


def test_nothing_is_kept_alive():
    model, inputs = network(), batch(16)
    tracker = exact_tracker(model)
    with tracker:
        with tracker.phase("forward"):
            hidden = model[0](inputs)
            seen = weakref.ref(hidden.untyped_storage())
            output = model[2](hidden).sum()
        del hidden
        assert seen() is not None, "autograd needs it"
        with tracker.phase("backward"):
            output.backward()
        assert seen() is None, "freed at once, without the garbage collector"


def test_a_finished_tracker_hears_of_no_later_death():
    tracker = ByteTracker(no_owners, round_to=1)
    with tracker:
        kept = torch.empty(1000)
    gone = weakref.ref(tracker)
    del tracker
    assert gone() is None
    del kept


def test_an_error_inside_leaves_no_tracker_behind():
    resize = torch.UntypedStorage.resize_
    tracker = ByteTracker(no_owners, round_to=1)
    with pytest.raises(RuntimeError, match="shape"), tracker, tracker.phase("forward"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    peak = tracker.fullest().peak_bytes
    torch.empty(100_000)
    assert tracker.fullest().peak_bytes == peak
    assert torch.UntypedStorage.resize_ is resize


def test_phases_do_not_nest_and_have_known_names():
    tracker = ByteTracker(no_owners)
    with tracker, tracker.phase("forward"), pytest.raises(ValueError, match="leave that one first"):
        tracker.phase("backward").__enter__()
    with tracker, pytest.raises(ValueError, match="'evaluation' is not a phase"):
        tracker.phase("evaluation").__enter__()


def test_fake_tensors_are_counted_as_if_they_were_real():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = network()
        inputs = torch.empty(4096, INPUTS)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        fake = exact_tracker(model, optimizer)
        with fake, fake.phase("forward"):
            model(inputs).square().mean()
    model, inputs = network(), torch.empty(4096, INPUTS)
    real = exact_tracker(model)
    with real, real.phase("forward"):
        model(inputs).square().mean()
    assert fake.fullest() == real.fullest()
