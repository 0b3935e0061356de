"""SinkGD by what its step is, and against the iterated matrix in float64."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem.hf.make_optimizer import make_optimizer
from lowmem.numerics import tiles
from lowmem.numerics.sinkhorn import sinkhorn_scalings
from lowmem.optim import SinkGD, build_optimizer
from lowmem.optim.rule import Context
from lowmem.optim.rules.normalized import NormalizedGradient
from lowmem.recipe.load import load_recipe
from tests.optim.live_bytes import PeakOfNewBytes
from tests.reference.sinkgd import SinkGDReference

MIB = 1 << 20


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def iterated(G: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    return SinkGDReference([], lr=0, iterations=iterations).normalized(G.double())


def step_of(G: torch.Tensor, **settings) -> torch.Tensor:
    """What one update subtracts from a float32 weight of zeros, over lr."""
    weight = torch.nn.Parameter(torch.zeros(G.shape))
    weight.grad = G
    SinkGD([weight], lr=1.0, **{"scale": 1.0, **settings}).step()
    return -weight.detach()


@settings(deadline=None)
@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    iterations=st.integers(1, 6),
    tile=st.integers(1, 200),
    seed=st.integers(0, 3),
)
def test_iterating_two_vectors_gives_the_iterated_matrix(m, n, iterations, tile, seed):
    G = gaussian(m, n, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_NUMEL", tile)
        X = step_of(G, iterations=iterations)
    torch.testing.assert_close(X.double(), iterated(G, iterations), rtol=1e-5, atol=1e-6)


def test_the_two_agree_to_a_millionth_where_rows_and_columns_differ_by_orders_of_magnitude():
    G = gaussian(300, 200).double()
    G *= torch.logspace(-8, 0, 300, dtype=torch.float64)[:, None]
    G *= torch.logspace(-3, 3, 200, dtype=torch.float64)
    expected = iterated(G.float())
    distance = (step_of(G.float()).double() - expected).norm() / expected.norm()
    assert distance < 1e-6


def test_every_column_has_root_mean_square_one_and_every_row_nearly():
    X = step_of(gaussian(64, 96))
    assert X.square().mean(0).sqrt().sub(1).abs().max() < 1e-5
    assert X.square().mean(1).sqrt().sub(1).abs().max() < 1e-2
    rows = step_of(gaussian(64, 96), normalize="row")
    assert rows.square().mean(1).sqrt().sub(1).abs().max() < 1e-5
    columns = step_of(gaussian(64, 96), normalize="column")
    assert columns.square().mean(0).sqrt().sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("normalize", ["sinkhorn", "row", "column"])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-22, 1e-8, 1e8, 1e22, 1e30])
def test_the_step_does_not_depend_on_the_size_of_the_gradient(normalize, size):
    G = torch.tensor([[1.0, -2.0, 4.0], [8.0, 2.0, 1.0]]).repeat(5, 4)
    scaled = (G.double() * size).float()
    tolerance = 1e-5 if size > 1e-38 else 0.3  # numbers so small have a digit or two
    torch.testing.assert_close(
        step_of(scaled, normalize=normalize), step_of(G, normalize=normalize), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("normalize", ["sinkhorn", "row", "column"])
def test_rows_and_columns_of_zeros_stay_and_the_others_take_no_notice(normalize, momentum):
    G = gaussian(30, 20)
    G[[0, 7, 29]] = 0
    G[:, [3, 19]] = 0
    X = step_of(G, normalize=normalize, momentum=momentum)
    assert not X[[0, 7, 29]].any()
    assert not X[:, [3, 19]].any()
    assert X.isfinite().all()
    kept = X.abs().sum(1) > 0
    if normalize == "column":
        torch.testing.assert_close(X.square().mean(0)[[0, 1, 18]], torch.ones(3))
    else:
        squares = X[kept].square().sum(1) / (20 if normalize == "row" else 18)
        assert squares.sqrt().median() == pytest.approx(
            1 if normalize == "row" else (30 / 27) ** 0.5, rel=0.1
        )
    assert not step_of(torch.zeros(4, 5), normalize=normalize, momentum=momentum).any()


@pytest.mark.parametrize("pattern", ["one entry", "triangle", "one row", "rank one", "a lone column"])
def test_matrices_that_have_no_limit_give_finite_steps(pattern):
    G = torch.zeros(12, 12)
    if pattern == "one entry":
        G[3, 4] = 1
    elif pattern == "triangle":
        G = torch.tril(torch.ones(12, 12))
    elif pattern == "one row":
        G[5] = gaussian(12)
    elif pattern == "rank one":
        G = torch.outer(gaussian(12), gaussian(12, seed=1))
    else:
        G[:, 2] = gaussian(12)
    X = step_of(G, iterations=20)
    assert X.isfinite().all()
    torch.testing.assert_close(X.double(), iterated(G, 20), rtol=1e-3, atol=1e-5)


def test_a_batch_of_experts_is_a_matrix_each():
    G = gaussian(3, 10, 14)
    G[1] = 0
    X = step_of(G)
    assert not X[1].any()
    for index in (0, 2):
        torch.testing.assert_close(X[index], step_of(G[index]))


def test_momentum_is_the_mean_of_gradients_and_is_normalised():
    """One buffer in the dtype that the storage says; the size of the step is that without momentum."""
    weight = torch.nn.Parameter(torch.zeros(16, 24, dtype=torch.bfloat16))
    optimizer = SinkGD([weight], lr=1.0, scale=1.0, momentum=0.9, storage={"moment": "fp32"})
    M = torch.zeros(16, 24, dtype=torch.float64)
    for seed in range(5):
        weight.grad = gaussian(16, 24, seed=seed).bfloat16()
        M = 0.9 * M + 0.1 * weight.grad.double()
        before = weight.detach().clone()
        optimizer.step()
    buffer = optimizer.state[weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    torch.testing.assert_close(buffer.double(), M, rtol=1e-5, atol=1e-6)
    step = (before.float() - weight.detach().float()).double()
    torch.testing.assert_close(step, iterated(M), rtol=0.05, atol=0.1)


def test_matrices_have_no_state_and_the_rest_takes_the_fallback():
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 12), "embed": torch.nn.Embedding(20, 8)})
    optimizer = build_optimizer(model, "sinkgd", lr=1e-3, target=["mlp"], fallback={"name": "adafactor"})
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(optimizer.state[model["mlp"].weight]) == {"step"}
    assert set(optimizer.state[model["embed"].weight]) == {"exp_avg_sq_row", "exp_avg_sq_col", "step"}


SCALE = """
model: {name_or_path: builtin:tiny-llama}
data: {train: {builtin: arithmetic}}
optimizer:
  {name: sinkgd, lr: 1.0e-3, normalize: row, scale: 1.0,
   head: {name: sinkgd, momentum: 0.9}, fallback: {name: sinkgd, normalize: column}}
"""


def test_a_recipe_gives_scale_momentum_on_the_head_alone(tmp_path):
    """Two steps of SCALE as its paper has it, each part by what it is."""
    (tmp_path / "scale.yaml").write_text(SCALE)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = make_optimizer(model, load_recipe(tmp_path / "scale.yaml"))
    parts = {
        "head": model.lm_head.weight,
        "embedding": model.model.embed_tokens.weight,
        "body": model.model.layers[0].mlp.up_proj.weight,
        "norm": model.model.norm.weight,
    }
    steps = []
    for seed in range(2):
        before = {name: part.detach().clone() for name, part in parts.items()}
        for param in model.parameters():
            param.grad = gaussian(*param.shape, seed=seed)
        optimizer.step()
        steps.append({name: (before[name] - part.detach()) / 1e-3 for name, part in parts.items()})
    keys = {name: set(optimizer.state[part]) for name, part in parts.items()}
    assert keys["head"] == {"momentum_buffer", "step"}
    assert keys["embedding"] == keys["body"] == {"step"}
    assert keys["norm"] == {"exp_avg", "exp_avg_sq", "step"}

    def over_rms(x, dim):
        return x / x.square().mean(dim, keepdim=True).sqrt()

    G = {name: [gaussian(*part.shape, seed=seed) for seed in range(2)] for name, part in parts.items()}
    M = 0.9 * G["head"][0] + G["head"][1]  # the size of the mean does not matter
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    close(steps[1]["head"], over_rms(M, 1))
    close(steps[1]["embedding"], over_rms(G["embedding"][1], 0))
    close(steps[1]["body"], over_rms(G["body"][1], 1))
    close(steps[0]["norm"], G["norm"][0].sign())


class RowsOnDemand:
    """A gradient that exists some rows at a time."""

    def __init__(self, whole: torch.Tensor):
        self._whole, self.shape, self.device = whole, whole.shape, whole.device

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._whole[rows]


@pytest.mark.parametrize("normalize", ["sinkhorn", "row", "column"])
def test_a_gradient_that_gives_only_rows_is_enough(normalize):
    G = gaussian(9, 7)
    rule = NormalizedGradient(normalize=normalize)
    ctx = Context(step=1, name="w", seed=0, known={})
    blocks, _ = rule.update(RowsOnDemand(G), {}, ctx)
    assert torch.equal(blocks.of(0, slice(2, 6)), step_of(G, normalize=normalize)[2:6])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_passes_over_a_large_matrix_hold_a_few_tiles(momentum):
    weight = torch.nn.Parameter(torch.zeros(2048, 8192, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = SinkGD([weight], momentum=momentum)
    optimizer.step()
    with PeakOfNewBytes() as seen:
        optimizer.step()
    assert seen.peak <= 30 * MIB


def test_the_scalings_are_as_many_numbers_as_rows_and_columns():
    G = gaussian(50, 70)
    found = sinkhorn_scalings(lambda rows: G[rows], (50, 70), iterations=5, device=G.device)
    assert sum(each.numel() for each in found) == 50 + 50 + 70
