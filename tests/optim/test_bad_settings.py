"""A wrong setting is one clear error at construction, before any step."""

from __future__ import annotations

import pytest
import torch

from lowmem.optim import SGD, AdamW, GaLore, build_optimizer
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.settings import settings_of


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.zeros(shape or (8, 8), dtype=dtype))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1e-3}, "lr must be a finite number >= 0, found -0.001"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": float("inf")}, "lr must be a finite number"),
        ({"lr": "fast"}, "lr must be a finite number >= 0, found 'fast'"),
        ({"lr": torch.ones(2)}, r"lr must be .* found a tensor of shape \(2,\)"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"rounding": "nearset"}, "rounding must be one of stochastic, nearest.*Did you mean 'nearest'"),
        ({"storage": {"momment": "fp32"}}, "no role 'momment'. Did you mean 'moment'"),
        (
            {"storage": {"moment": "fp16"}},
            "storage of moment must be one of param, fp32, bf16, int8, found 'fp16'",
        ),
        ({"seed": -1}, "seed must be a whole number >= 0"),
        ({"seed": True}, "seed must be a whole number"),
    ],
)
def test_values_out_of_range_say_what_is_allowed(name, changes, words):
    if "storage" in changes and "storage" not in settings_of(optimizer_class(name)):
        with pytest.raises(ValueError, match=f"{name} has no setting 'storage'. Settings: lr, betas"):
            optimizer_class(name)([{"params": [parameter()], **changes}])
        return
    with pytest.raises(ValueError, match=words):
        optimizer_class(name)([parameter()], **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1 or None, found 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"betas": (0.9, 1.0)}, "betas must be a pair of numbers >= 0 and < 1"),
        ({"betas": 0.9}, "betas must be a pair"),
        ({"eps": 0.0}, "eps must be a finite number > 0"),
        ({"projection": "svdd"}, "Did you mean 'svd'"),
        ({"refresh_every": 0}, "refresh_every must be"),
        ({"scale": 0}, "scale must be"),
    ],
)
def test_galore_checks_its_own_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        GaLore([parameter()], **changes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unknown_keyword_is_an_error_everywhere(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnk'"):
        optimizer_class(name)([parameter()], rnk=3)
    with pytest.raises(ValueError, match="has no setting 'weight_decy'. Did you mean 'weight_decay'"):
        optimizer_class(name)([{"params": [parameter()], "weight_decy": 0.1}])
    with pytest.raises(ValueError, match="has no setting 'learnrate'"):
        build_optimizer(torch.nn.Linear(4, 4), name, lr=1e-3, learnrate=2, target=["weight"])


def test_a_group_setting_is_checked_like_an_argument():
    with pytest.raises(ValueError, match="rank must be"):
        GaLore([{"params": [parameter()], "rank": -1}])


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(ValueError, match="'galor' is not an optimizer. Did you mean 'galore'"):
        build_optimizer(torch.nn.Linear(4, 4), "galor", lr=1e-3)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="nesterov needs momentum > 0"):
        SGD([parameter()], nesterov=True)


def test_complex_parameters_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="real floating-point parameters, found torch.complex64"):
        AdamW([parameter(dtype=torch.complex64)])
    weight = parameter(6, 4)
    optimizer = AdamW([weight])
    weight.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (6, 4), check_invariants=True)
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        optimizer.step()


def test_a_single_element_tensor_learning_rate_is_accepted():
    weight = parameter()
    optimizer = AdamW([weight], lr=torch.tensor(0.1))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((8, 8), -0.1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_is_documented_and_its_default_is_allowed(name):
    for setting in settings_of(optimizer_class(name)).values():
        assert setting.doc, setting.name
        assert setting.problem(setting.default) is None, setting.name
