"""The formulas of divided models against the code that they repeat, and in their own terms."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lowmem
from lowmem.errors import RefusedError
from lowmem.memory import divided_exchange
from lowmem.memory.architecture import Architecture, Parameter
from lowmem.memory.divided_buffers import reduced_by_ddp
from lowmem.memory.divided_estimate import divided_estimate
from lowmem.memory.divided_exchange import batches, sent_values, updated_one_after_another
from lowmem.memory.divided_pieces import DIVIDING, STRATEGIES, divided, needs_whole
from lowmem.memory.divided_rows import by_rows
from lowmem.memory.estimate import estimate
from lowmem.memory.ledger import PARTS
from lowmem.memory.refresh_flops import product_flops, refresh_flops
from lowmem.memory.state_formulas import TREATS_MATRICES, all_treatments, with_defaults
from lowmem.numerics.linalg import leading_subspace
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.recipe.schema import LoraRecipe, OptimizerRecipe
from lowmem.run.layouts import exchange
from lowmem.run.layouts.by_rows import way_of
from lowmem.run.layouts.pieces import Piece, owners_of
from tests.memory.divided_nets import net, parameters_of
from tests.memory.test_estimate import LLAMA_32_1B, recipe
from tests.memory.test_state_formulas import SHAPES, variations

SMALL_MODEL = Architecture.from_config({**LLAMA_32_1B, "num_hidden_layers": 8})
SHAPE = st.tuples(st.integers(1, 70), st.integers(1, 9))
MODELS = st.lists(st.one_of(SHAPE, st.tuples(st.integers(1, 40))), min_size=1, max_size=12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_stepped_whole_is_what_the_rules_say(name):
    for own in variations(name):
        for shape in SHAPES:
            if not math.prod(shape):
                continue
            optimizer = optimizer_class(name)([torch.nn.Parameter(torch.empty(shape, device="meta"))], **own)
            [group] = optimizer.param_groups
            scope = optimizer.rule_of(group["params"][0], group).scope
            assert needs_whole(name, own, shape) == (scope == "matrix"), (own, shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_what_is_updated_by_rows_is_what_the_layouts_choose(name, processes):
    """Of rows that all processes have, that some lack, and that are cut."""
    for own in variations(name):
        filled = with_defaults(name, own)
        for shape in [*SHAPES, (40, 8), (400, 30), (30, 400), (400, 400), (3, 50)]:
            if not math.prod(shape):
                continue
            optimizer = optimizer_class(name)([torch.nn.Parameter(torch.empty(shape, device="meta"))], **own)
            [group] = optimizer.param_groups
            rule = optimizer.rule_of(group["params"][0], group)
            if rule.scope != "matrix":
                continue
            for share in {
                -(-math.prod(shape) // processes),
                -(-shape[0] // processes) * math.prod(shape[1:]),
            }:
                starts = [min(rank * share, math.prod(shape)) for rank in range(processes + 1)]
                piece = Piece("", shape, tuple(pairwise(starts)), torch.Tensor, lambda: None)
                chosen = way_of(piece, rule).on_rows
                found = by_rows(name, filled, shape, [piece.numel_at(rank) for rank in range(processes)])
                assert found == (None if chosen is None else chosen[1:]), (own, shape)


def shown_of(shapes, strategy, processes, name="muon"):
    parameters = [
        Parameter(f"mlp.{n}.weight", shape, is_linear=len(shape) == 2) for n, shape in enumerate(shapes)
    ]
    if all(len(shape) < 2 for shape in shapes):
        parameters.append(Parameter("mlp.weight", (3, 4), is_linear=True))
    recipe = OptimizerRecipe(name=name, target=["mlp"], settings={"lr": 1e-3})
    return divided(all_treatments(recipe, parameters), strategy, processes)


@settings(max_examples=40, deadline=None)
@given(MODELS, st.sampled_from(DIVIDING), st.integers(1, 9))
def test_every_value_is_in_one_process_and_a_matrix_is_owned_by_one_that_has_some_of_it(
    shapes, strategy, processes
):
    for group in shown_of(shapes, strategy, processes):
        for each in group:
            assert sum(each.sizes) == each.numel
            assert len(each.sizes) == processes
            assert each.owner is None or each.sizes[each.owner] > 0


@settings(max_examples=40, deadline=None)
@given(MODELS, st.sampled_from(DIVIDING), st.integers(1, 9), st.integers(1, 3000))
def test_owners_and_batches_are_those_of_the_layouts(shapes, strategy, processes, limit):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exchange, "BATCH_NUMEL", limit)
        patched.setattr(divided_exchange, "BATCH_NUMEL", limit)
        assert_alike(shapes, strategy, processes)


def assert_alike(shapes, strategy, processes):
    for group in shown_of(shapes, strategy, processes):
        whole = [each for each in group if each.owner is not None]
        pieces = []
        for each in whole:
            starts = [sum(each.sizes[:rank]) for rank in range(processes + 1)]
            ranges = tuple(pairwise(starts))
            pieces.append(Piece("", each.treatment.parameter.shape, ranges, torch.Tensor, lambda: None))
        assert [each.owner for each in whole] == owners_of(pieces, processes)
        sent = [each for each in whole if each.is_sent]
        split = [piece for piece in pieces if len(piece.holders) > 1]
        owners = [each.owner for each in sent]
        assert batches(group) == [sent[part] for part in exchange.batches_of(split, owners)]


def test_as_much_comes_together_as_in_the_layouts():
    assert divided_exchange.BATCH_NUMEL == exchange.BATCH_NUMEL


@settings(max_examples=40, deadline=None)
@given(st.lists(SHAPE, min_size=1, max_size=12), st.integers(1, 9))
def test_with_equal_pieces_three_times_what_the_owner_has_not_is_sent(shapes, processes):
    shapes = [(rows * processes, columns + 1) for rows, columns in shapes if rows * processes > 1] or [
        (2 * processes, 3)
    ]
    shown = shown_of(shapes, "fsdp2", processes)
    numel = sum(math.prod(shape) for shape in shapes)
    assert sum(sent_values(shown, processes)) * processes == 3 * numel * (processes - 1)


def test_matrices_that_one_process_has_all_of_are_not_sent():
    assert sum(sent_values(shown_of([(64, 64)] * 8, "zero1", 4), 4)) == 0
    assert sum(sent_values(shown_of([(64, 64)] * 8, "zero1", 3), 3)) > 0


class Allocated(TorchDispatchMode):
    """Values of the flat tensors that are made with nothing in them."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and made.dim() == 1 and made.is_floating_point():
            self.numel += made.numel()
        return made


def test_the_reducer_of_ddp_has_buckets_of_all_gradients_that_are_its_own(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net(torch.float32)
        leaving = ["blocks.0.mlp_up.weight", "blocks.1.mlp_down.weight"]
        for ignored in ([], leaving):
            model._ddp_params_and_buffers_to_ignore = ignored
            with Allocated() as allocated:
                torch.nn.parallel.DistributedDataParallel(model)
            parameters = parameters_of(model)
            left = [each for each in parameters if each.name in ignored]
            assert 4 * allocated.numel == reduced_by_ddp(parameters, left, 4)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- whole plans


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["adamw", "galore", "sinkgd"])
def test_parts_add_up_and_more_processes_hold_less(name, strategy):
    architecture = SMALL_MODEL
    work = recipe(name, gradient_accumulation_steps=2, activation_checkpointing=True)
    found = [divided_estimate(work, architecture, strategy, world) for world in (2, 8, 64)]
    for each in found:
        assert sum(each.fullest.parts.values()) == each.fullest.peak_bytes
        assert list(each.fullest.parts) == list(PARTS)
        assert sum(held.nbytes for held in each.held) == each.fullest.peak_bytes
    peaks = [each.fullest.peak_bytes for each in found]
    assert peaks == sorted(peaks, reverse=True)
    assert (peaks[0] > peaks[2]) == (strategy != "ddp")
    owns = name in TREATS_MATRICES and strategy != "ddp"
    assert [sum(each.matrices) + each.by_rows for each in found] == [7 * 8 * owns] * 3
    assert (found[0].by_rows > 0) == (owns and strategy in ("fsdp2", "zero3")), "rows are whole there"
    assert (max(found[2].sent) > 0) == owns


def test_one_process_of_ddp_needs_what_one_device_does():
    architecture, work = SMALL_MODEL, recipe("galore", execution="auto")
    assert divided_estimate(work, architecture, "ddp", 1).fullest == estimate(work, architecture)


def test_gradients_that_are_projected_or_used_as_they_arrive_leave_no_bucket():
    architecture = SMALL_MODEL
    buckets = {}
    for execution in ("plain", "project", "fused"):
        work = recipe("galore", execution=execution, settings={"rank": 128})
        alone = estimate(work, architecture)
        buckets[execution] = (
            divided_estimate(work, architecture, "ddp", 4).fullest.peak_bytes - alone.peak_bytes
        )
    assert buckets["plain"] == 2 * architecture.num_parameters
    linear = sum(each.numel for each in architecture.parameters if each.is_linear)
    assert buckets["project"] == 2 * (architecture.num_parameters - linear)
    assert buckets["fused"] == 2 * 2048, "the smallest one stays"


def test_under_ddp_what_gradients_are_projected_to_is_averaged_in_their_place():
    whole, low = (
        divided_estimate(recipe("galore", execution=execution, settings={"rank": 128}), SMALL_MODEL, "ddp", 2)
        for execution in ("plain", "project")
    )
    assert whole.strategy_sent == 2 * SMALL_MODEL.num_parameters
    linear = [each for each in SMALL_MODEL.parameters if each.is_linear]
    saved = sum(each.numel - 128 * max(each.shape) for each in linear)
    assert whole.strategy_sent - low.strategy_sent == 2 * saved


def test_of_matrices_that_come_together_each_is_at_another_owner(monkeypatch):
    monkeypatch.setattr(divided_exchange, "BATCH_NUMEL", 64)
    shown = shown_of([(8, 8)] * 8, "fsdp2", 4)
    assert [len(batch) for batch in batches(shown[0])] == [4, 4]
    assert updated_one_after_another(shown) == 2 * 64
    assert updated_one_after_another(shown_of([(8, 8)] * 8, "fsdp2", 1)) == 8 * 64


def test_owners_of_matrices_that_are_not_sent_do_not_wait_for_each_other():
    shown = shown_of([(8, 8)] * 8, "zero1", 4)
    assert batches(shown[0]) == []
    assert updated_one_after_another(shown) == 2 * 64


def test_adapters_are_planned_under_ddp_and_refused_where_a_model_is_divided():
    work = recipe("adamw", lora=LoraRecipe(r=8))
    architecture = SMALL_MODEL
    assert divided_estimate(work, architecture, "ddp", 2).fullest.peak_bytes > 0
    with pytest.raises(RefusedError, match="--strategy ddp"):
        divided_estimate(work, architecture, "zero2", 2)


def test_the_plan_of_a_recipe_takes_its_strategy_from_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_32_1B, "num_hidden_layers": 8}))
    changes = [f"model.name_or_path={tmp_path}", "distributed.strategy=zero3"]
    found = lowmem.plan("llama32_1b_galore", changes, world=8)
    assert found.document["processes"]["strategy"] == "zero3"
    assert found.document["conditions"]["world_size"] == 8
    by_name = lowmem.plan("llama32_1b_galore", changes, world=8, strategy="fsdp2")
    assert by_name.document["processes"]["strategy"] == "fsdp2"
    assert by_name.peak_bytes < found.peak_bytes


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("shape", "rank"), [((64, 96), 8), ((48, 48), 40), ((200, 30), 5)])
def test_the_products_of_a_refresh_are_those_that_torch_counts(shape, rank, is_first):
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(min(shape), max(shape), generator=generator)
    start = None if is_first else torch.linalg.qr(torch.randn(min(shape), rank, generator=generator)).Q
    with FlopCounterMode(display=False) as counter:
        leading_subspace(G, rank, start=start, generator=generator)
    assert product_flops(shape, rank, is_first=is_first) == counter.get_total_flops()
    assert refresh_flops(shape, rank, is_first=is_first) > counter.get_total_flops()
