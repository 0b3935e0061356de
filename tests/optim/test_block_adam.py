"""BAdam by layers: what is a block, who moves when, and what that holds."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from lowmem.optim import AdamW, BlockAdam, build_optimizer
from lowmem.optim.block_switch import active_in_turn
from lowmem.optim.layer_blocks import layer_of


class Layers(nn.Module):
    """The names of a LLaMA: embedding, four layers with a norm, a last norm and a head."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(11, 6)
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for _ in range(4)
        )
        self.model.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def step(optimizer, model, seed: int = 0) -> set[str]:
    """The names of what a step has moved."""
    generator = torch.Generator().manual_seed(seed)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    return {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}


def names(model, *, layer: int | None = None, of: str = "") -> set[str]:
    found = {name for name, _ in model.named_parameters()}
    return {name for name in found if name.startswith(f"model.layers.{layer}." if layer is not None else of)}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.mlp.up_proj.weight", "model.layers.7"),
        ("transformer.h.11.attn.c_attn.bias", "transformer.h.11"),
        ("model.layers.3.mlp.experts.5.w1.weight", "model.layers.3"),
        ("0.weight", "0"),
        ("model.embed_tokens.weight", None),
        ("layer0.weight", None),
        ("model.fc2.weight", None),
    ],
)
def test_the_first_number_of_a_path_is_its_layer(name, layer):
    assert layer_of(name) == layer


def test_embedding_layers_and_head_have_their_turns_and_all_else_stays_to_the_bit():
    model = Layers()
    optimizer = build_optimizer(
        model, "block_adam", lr=1e-2, refresh_every=2, order="ascending", weight_decay=0.1
    )
    moved = [step(optimizer, model, seed) for seed in range(14)]
    last = names(model, layer=3) | names(model, of="model.norm")
    expected = [
        {"model.embed_tokens.weight"}, *(names(model, layer=i) for i in range(3)), last, {"lm_head.weight"},
        {"model.embed_tokens.weight"},
    ]  # fmt: skip
    assert moved == [each for each in expected for _ in range(2)]


def test_a_tied_head_has_its_turn_with_the_embedding():
    model = Layers(tied=True)
    optimizer = build_optimizer(model, "block_adam", lr=1e-2, refresh_every=1, order="ascending")
    moved = [step(optimizer, model, seed) for seed in range(6)]
    assert moved[0] == moved[5] == {"model.embed_tokens.weight"}
    assert moved[4] == names(model, layer=3) | names(model, of="model.norm")


def test_what_is_outside_of_the_layers_can_be_frozen():
    model = Layers()
    optimizer = build_optimizer(model, "block_adam", lr=1e-2, refresh_every=1, others="frozen")
    moved = [step(optimizer, model, seed) for seed in range(8)]
    assert sorted(map(sorted, moved[:4])) == [sorted(names(model, layer=i)) for i in range(4)]
    assert set().union(*moved) == set().union(*(names(model, layer=i) for i in range(4)))


def test_what_is_outside_of_the_layers_can_take_a_fallback_at_every_step():
    model = Layers()
    optimizer = build_optimizer(
        model, "block_adam", lr=1e-2, refresh_every=1, order="ascending", target=["mlp"],
        fallback={"name": "adamw"},
    )  # fmt: skip
    for number in range(8):
        moved = step(optimizer, model, number)
        matrices = {f"model.layers.{i}.mlp.weight" for i in range(4)}
        assert moved & matrices == {f"model.layers.{number % 4}.mlp.weight"}
        assert moved - matrices == names(model) - matrices


@pytest.mark.parametrize("active", [1, 2, 4, 9])
def test_a_shuffled_round_gives_each_block_one_turn(active):
    windows = -(-6 // min(active, 6))
    for number in range(5):
        turns = [
            active_in_turn(number * windows + i, 6, min(active, 6), "shuffled", 0) for i in range(windows)
        ]
        assert sorted(block for turn in turns for block in turn) == list(range(6))
    first, second = ([active_in_turn(r * 6 + i, 6, 1, "shuffled", 0) for i in range(6)] for r in range(2))
    assert first != second, "the next round has another order"
    assert first != [active_in_turn(i, 6, 1, "shuffled", 1) for i in range(6)]


def test_the_active_layer_moves_as_adam_moves_it_from_nothing():
    model, whole = Layers(), None
    optimizer = build_optimizer(model, "block_adam", lr=1e-2, refresh_every=3, order="descending")
    for number in range(9):
        if number % 3 == 0:
            whole = copy.deepcopy(model)
            adam = AdamW(whole.parameters(), lr=1e-2, weight_decay=0.0)
        moved = step(optimizer, model, number)
        step(adam, whole, number)
        theirs = dict(whole.named_parameters())
        for name, param in model.named_parameters():
            if name in moved:
                torch.testing.assert_close(param, theirs[name])


def test_state_is_that_of_the_active_block_alone():
    model = Layers()
    optimizer = build_optimizer(model, "block_adam", lr=1e-2, refresh_every=2)
    for number in range(12):
        declared = optimizer.state_bytes()
        moved = step(optimizer, model, number)
        active = [param for name, param in model.named_parameters() if name in moved]
        held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
        assert declared == sum(2 * 4 * param.numel() + 4 for param in active)
        assert held == (declared if number % 2 == 0 else 0), "freed when the turn ends"


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
def test_a_run_stopped_inside_or_between_turns_goes_on_to_the_same_bits(stop):
    def begun():
        torch.manual_seed(0)
        model = Layers()
        return model, build_optimizer(model, "block_adam", lr=1e-2, refresh_every=3, seed=5)

    model, optimizer = begun()
    for number in range(stop):
        step(optimizer, model, number)
    other, resumed = begun()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for number in range(stop, 12):
        assert step(optimizer, model, number) == step(resumed, other, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_without_names_each_tensor_has_its_turn_and_the_log_says_so(caplog):
    params = [nn.Parameter(torch.zeros(3, 4)) for _ in range(3)]
    with caplog.at_level(logging.WARNING, "lowmem"):
        optimizer = BlockAdam(params, lr=1e-2, refresh_every=1, order="ascending")
    assert "each tensor has its own turn" in caplog.text
    for number in range(4):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert [bool((param != 0).any()) for param in params] == [i <= number for i in range(3)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"others": "frozen"}, "no parameter's name has a layer's number"),
        ({"active": 0}, "active must be a whole number >= 1"),
        ({"order": "random"}, "order must be one of shuffled, ascending, descending, mirror"),
        ({"refresh_every": 0}, "refresh_every must be a whole number >= 1"),
    ],
)
def test_wrong_settings_are_one_clear_error_at_construction(changes, words):
    with pytest.raises(ValueError, match=words):
        BlockAdam([nn.Parameter(torch.zeros(3, 4))], **changes)


def test_a_head_of_which_there_is_a_flat_piece_is_a_block_of_its_own_as_the_whole_one_is():
    shapes = {"embed": (6, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "norm": (4,), "head": (6, 4)}
    whole = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    pieces = [(name, torch.nn.Parameter(param.detach().flatten()[:3])) for name, param in whole]

    class OfPieces(BlockAdam):
        def _whole_shape(self, param):
            return next(shapes[name] for name, piece in pieces if piece is param)

    found = []
    for optimizer, named in ((BlockAdam(whole), whole), (OfPieces(pieces), pieces)):
        [group] = optimizer.param_groups
        found.append([optimizer._turn(param, group, 0)[1:3] for _, param in named])
    assert found[0] == found[1]
    assert len({block for block, _ in found[0]}) == 4, "the norm goes with the last layer"
