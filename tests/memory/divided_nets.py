"""A small network over processes: the formulas' view of it, and optimizers to try."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.memory.architecture import Parameter
from lowmem.memory.divided_exchange import sent_values, summed_values
from lowmem.memory.divided_pieces import Shown, Strategy, divided
from lowmem.memory.divided_state import divided_state_bytes, itemsize_of_stepped
from lowmem.memory.divided_tensors import Setting, divided_tensors
from lowmem.memory.state_formulas import all_treatments
from lowmem.optim import build_optimizer
from lowmem.recipe.schema import OptimizerRecipe
from tests.run.test_execution import Net

LOW_BIT = {"moment": "int8", "variance": "int8", "basis": "int4"}
GALORE = {"rank": 4, "refresh_every": 9}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("adamw", {"storage": {"moment": "int8", "variance": "int8"}}),
    ("sgd_sai", {}),
    ("adafactor", {}),
    ("sinkgd", {"momentum": 0.9, "fallback": {"name": "adafactor"}}),
    ("swan", {"storage": {"moment": "fp32"}}),
    ("muon", {"storage": {"moment": "int8"}}),
    ("galore", GALORE),
    ("galore", {**GALORE, "storage": LOW_BIT, "fallback": {"name": "adamw", "storage": {"moment": "int8"}}}),
    (
        "galore",
        {**GALORE, "groups": [{"match": ["mlp_down"], "rank": 8}, {"match": ["norm"], "name": "sgd"}]},
    ),
    ("q_galore", GALORE),
    ("fira", GALORE),
    ("frugal", {"density": 0.3}),
    ("frugal", {"density": 0.3, "projection": "subspace"}),
    ("block_adam", {"refresh_every": 1}),
]


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def net(dtype: torch.dtype) -> Net:
    """Of rows that neither two nor three processes divide evenly."""
    torch.manual_seed(0)
    return Net(depth=2, width=25).to(dtype)


def optimizer_for(case: tuple[str, dict[str, Any]], model: nn.Module) -> Any:
    return build_optimizer(model, case[0], lr=1e-3, target=["mlp"], **case[1])


def parameters_of(model: nn.Module) -> list[Parameter]:
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = []
    for name, param in model.named_parameters():
        layer = re.search(r"\.(\d+)\.", name)
        number = None if layer is None else int(layer[1])
        found.append(Parameter(name, tuple(param.shape), name in linear, number))
    return found


def shown_of(
    case: tuple[str, dict[str, Any]], strategy: Strategy, processes: int, dtype: torch.dtype
) -> list[Shown]:
    name, settings = case
    settings = dict(settings)
    apart = {key: settings.pop(key) for key in ("fallback", "groups") if key in settings}
    recipe = OptimizerRecipe(name=name, target=["mlp"], settings={"lr": 1e-3, **settings}, **apart)
    return divided(all_treatments(recipe, parameters_of(net(dtype))), strategy, processes)


def by_formula(
    case: tuple[str, dict[str, Any]],
    strategy: Strategy,
    processes: int,
    dtype: torch.dtype,
    micro_batches: int,
) -> list[dict[str, int]]:
    """What each process is said to hold and to send."""
    parameters = parameters_of(net(dtype))
    shown = shown_of(case, strategy, processes, dtype)
    at = Setting(processes, dtype.itemsize, micro_batches)
    tensors = divided_tensors(shown, parameters, strategy, at)
    state = divided_state_bytes(shown, processes, itemsize_of_stepped(strategy, dtype.itemsize))
    sent = sent_values(shown, processes)
    summed = [summed_values(shown)] * processes
    columns = (tensors.weights, tensors.gradients, tensors.gradients_in_backward, state, sent, summed)
    names = ("weights", "gradients", "gradients_in_backward", "state", "sent", "summed")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages behind `tensors`, each once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())
